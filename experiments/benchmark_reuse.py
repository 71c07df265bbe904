"""What keeping frozen features is worth to a configuration: the same update from kept features and from observations.

    python experiments/benchmark_reuse.py --config experiments/configs/pi0_eighth.json
    python experiments/benchmark_reuse.py --config experiments/configs/pi0.json --fresh --trainer.autocast=bf16

One rollout is collected; from the same weights, with the same minibatches, an update then reads what the rollout kept
of the frozen stages, or runs them again for every minibatch (`policy.feature_reuse: off`), by turns. The losses of both
should be equal, to rounding. Flags are those of ppo_vla.py, and these:

    --fresh           random weights of the configured sizes, where no checkpoint is at hand
    --repeats N       updates of each kind that are timed, after one of each that is not; default 3
    --output FILE     a row is added to this table; default runs/throughput/reuse.csv
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import packages  # noqa: F401

import torch
from algorithms import make_ppo
from assembling import choose_device, seed_everything
from building import make_model, make_policy
from configuration import read_experiment, split_flag
from tensordict import TensorDictBase

from agents.cost import flops_per_transition
from agents.policy import VLAPolicy
from envs import make_env
from research.config import ExperimentConfig
from research.errors import UserError
from research.schema import OBSERVATION
from research.training.algorithm import Progress
from research.training.host_memory import keep_freed_memory
from research.training.rollout import Rollouts
from research.training.threads import choose_threads
from research.training.utilisation import matmul_flops_per_second, timed

FROM_FILES = ("pretrained", "tokenizer", "statistics", "dataset")  # arguments of models that name files
ARMS = ("kept", "recomputed")


def main(argv: list[str] | None = None) -> int:
    argv, fresh = split_flag(sys.argv[1:] if argv is None else argv, "--fresh")
    try:
        repeats, output = int(taken(argv, "--repeats", "3")), taken(argv, "--output", None)
        row = Comparison(read_experiment(ExperimentConfig, argv, __doc__), fresh).row(max(1, repeats))
        table = Path(output or "runs/throughput/reuse.csv")
        append(row, table)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(row), table, sep="\n")
    return 0


def taken(argv: list[str], flag: str, default: str | None) -> str | None:
    """The value of a flag of this script, which is taken out of the arguments: `--flag value` or `--flag=value`."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag:
            if not equals and i + 1 == len(argv):
                raise UserError(f"{flag}: expected a value")
            del argv[i]
            return value if equals else argv.pop(i)
    return default


class Comparison:
    """A configured model with its rollout, and an update of either kind."""

    def __init__(self, config: ExperimentConfig, fresh: bool):
        self.config, trainer = config, config.trainer
        self.device = choose_device(trainer.device)
        torch.set_num_threads(choose_threads(trainer.threads)[0])
        keep_freed_memory()  # as a run does
        seed_everything(trainer.seed)
        if fresh:
            arguments = config.policy.vla_config.model_config
            config.policy.vla_config.model_path = None
            config.policy.vla_config.model_config = {k: v for k, v in arguments.items() if k not in FROM_FILES}
        self.env = make_env(trainer.env, trainer.num_envs, trainer.env_config, self.device, trainer.seed)
        self.few = self.env.observation_spec[OBSERVATION].zero()[:2]
        self.shape = self.env.action_spec.shape[1:]
        self.built = make_model(config, self.few, self.shape, self.device, expect_fresh=fresh)
        self.start = {n: p.detach().clone() for n, p in self.built.model.named_parameters() if p.requires_grad}
        self.policies = {arm: self._policy(arm) for arm in ARMS}
        self.kept_keys = {arm: policy.kept_keys for arm, policy in self.policies.items()}
        if not self.policies["kept"].frozen_stages:
            raise UserError(
                f"policy.freeze is {config.policy.scope}: no stage of {type(self.built.model).__name__} is frozen, and "
                "there is nothing to keep; see what is frozen in which scope in docs/models.md"
            )

    def _policy(self, arm: str) -> VLAPolicy:
        reuse = self.config.policy.feature_reuse if arm == "kept" else "off"
        config = replace(self.config, policy=replace(self.config.policy, feature_reuse=reuse))
        return make_policy(config, self.built.model, self.few, self.shape)

    def row(self, repeats: int) -> dict:
        """Measure; the row of the table."""
        policy, trainer = self.policies["kept"], self.config.trainer
        cfg = self.config.algorithm.cfg
        peak = matmul_flops_per_second(
            torch.float32 if trainer.autocast == "off" else torch.bfloat16, self.device
        )  # before the processor is hot
        collected_flops, _ = flops_per_transition(policy, self.few[:1], rows=2)
        policy.kept_keys = list(dict.fromkeys([*self.kept_keys["kept"], *self.kept_keys["recomputed"]]))
        rollouts = Rollouts(self.env, policy, trainer.buffer_size)
        rollouts.next()  # the first one warms up
        rollout: list[TensorDictBase] = []
        collect_s = timed(lambda: rollout.append(rollouts.next()), self.device)
        rollouts.shutdown()
        ppo = make_ppo(self.config, policy, self.built.value_head, self.few)
        batch, _ = ppo.prepare(rollout[0])
        others = [key for key in batch.keys(True, True) if key not in policy.kept_keys]
        seconds, metrics = {arm: [] for arm in ARMS}, {}
        for repeat in range(repeats + 1):
            for arm in ARMS:
                own = batch.select(*self.kept_keys[arm], *others)
                took, metrics[arm], steps = self._update(arm, own)
                if repeat:
                    seconds[arm].append(took)
        update = {arm: statistics.median(times) for arm, times in seconds.items()}
        _, trained_flops = flops_per_transition(policy, self.few[:1], rows=2)
        parameters = list(self.built.model.parameters())
        stored = {arm: bytes_of(batch.select(*self.kept_keys[arm])) / len(batch) for arm in ARMS}
        return {
            "configuration": trainer.exp_name,
            "machine": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "autocast": trainer.autocast,
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "decisions_per_s": trainer.buffer_size / collect_s,
            "epochs": cfg.n_epochs,
            "minibatch": cfg.batch_size,
            **{f"{arm}_ms_per_minibatch": 1000 * update[arm] / steps for arm in ARMS},
            "times_as_fast": statistics.median(b / a for a, b in zip(*(seconds[arm] for arm in ARMS), strict=True)),
            **{f"{arm}_bytes_per_transition": stored[arm] for arm in ARMS},
            "largest_difference": max(
                abs(metrics["kept"][name] - value) for name, value in metrics["recomputed"].items()
            ),
            "collect_mfu": collected_flops * trainer.buffer_size / collect_s / peak,
            "update_mfu": trained_flops * len(batch) * cfg.n_epochs / update["kept"] / peak,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None,
            "repeats": repeats,
        }

    def _update(self, arm: str, batch: TensorDictBase) -> tuple[float, dict[str, float], int]:
        """Seconds of one update from the first weights, its losses, and its gradient steps."""
        with torch.no_grad():
            for name, parameter in self.built.model.named_parameters():
                if name in self.start:
                    parameter.copy_(self.start[name])
        ppo = make_ppo(self.config, self.policies[arm], self.built.value_head, self.few)
        torch.manual_seed(self.config.trainer.seed)  # the same minibatches
        found: dict[str, float] = {}
        took = timed(lambda: found.update(ppo.update(batch, Progress(iterations=1))), self.device)
        losses = {name: value for name, value in found.items() if name.startswith("train/loss")}
        return took, losses, int(found["train/gradient_steps"])


def bytes_of(batch: TensorDictBase) -> int:
    return sum(value.numel() * value.element_size() for value in batch.values(True, True))


def append(row: dict, table: Path) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def describe(row: dict) -> str:
    memory = f", {row['peak_memory_gib']:.1f} GiB at most" if row["peak_memory_gib"] else ""
    return (
        f"{row['configuration']}: {row['trained']:,} of {row['parameters']:,} parameters train; "
        f"{row['decisions_per_s']:.1f} decisions/s (MFU {row['collect_mfu']:.1%}); a minibatch of {row['minibatch']} "
        f"takes {row['kept_ms_per_minibatch']:.0f} ms from kept features (MFU {row['update_mfu']:.1%}) and "
        f"{row['recomputed_ms_per_minibatch']:.0f} ms without: {row['times_as_fast']:.1f} times as fast, for "
        f"{row['kept_bytes_per_transition']:,.0f} bytes per transition instead of "
        f"{row['recomputed_bytes_per_transition']:,.0f}{memory}; losses differ by {row['largest_difference']:.2g}"
    )


if __name__ == "__main__":
    sys.exit(main())
