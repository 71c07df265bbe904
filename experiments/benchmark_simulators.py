"""How near collection comes to what simulators can do: env steps per second, by actions per decision and processes.

    python experiments/benchmark_simulators.py                                  # Meta-World's reach, encoders frozen
    python experiments/benchmark_simulators.py --chunks 4 --workers 0 2 --sb3   # beside Stable-Baselines3

A row has so many actions per decision (H) and so many processes that simulate (0: in the main process). What it times,
by turns and several times over:

    limit     the simulators alone: their control steps, and the one picture that a decision needs; actions are at hand
    collect   rollouts of a policy whose encoders are frozen, as ppo_vla.py collects them
    train     rollouts and updates
    sb3       rollouts and updates of Stable-Baselines3 with the same worlds and network (`SubprocVecEnv`);
              it has no chunks, so a decision of H control steps is given to it as one step of its environment

Random policies differ in nothing that matters here from trained ones but in how long episodes are. Medians of the
repeats are printed and written, with the ratios within a repeat, to <output>.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from pathlib import Path

import packages  # noqa: F401

import torch
from algorithms import make_ppo
from building import make_model, make_policy
from tensordict import TensorDictBase

from envs import make_env
from research.config import AlgorithmConfig, ExperimentConfig, PolicyConfig, PPOConfig, TrainerConfig, VLAConfig
from research.errors import UserError
from research.schema import ACTION, OBSERVATION
from research.training.algorithm import Progress, env_steps_in
from research.training.rollout import Rollouts
from research.training.turns import Turns

COLUMNS = (
    "chunk", "workers", "num_envs", "decisions", "threads", "limit", "collect", "train", "sb3", "collect_over_limit",
    "train_over_sb3", "limit_low", "limit_high", "repeats", "env", "env_config", "model",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    try:
        return measure(parse_options(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_options(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--env", default="metaworld", help="as trainer.env, default %(default)s; one whose env_config knows workers")
    add("--env_config", type=json.loads, default={"task": "reach-v3"}, metavar="JSON", help="default %(default)s")
    add("--model", default="agents.dual_encoder_vla.DualEncoderVLA", help="as policy.vla_config.model_class")
    add("--model_config", type=json.loads, default={}, metavar="JSON", help="its arguments")
    add("--chunks", type=int, nargs="+", default=[1, 4, 8], help="actions per decision, default 1 4 8")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that simulate, default 0 1 2")
    add("--num_envs", type=int, default=24, help="default %(default)s")
    add("--decisions", type=int, default=20, help="per rollout and environment, default %(default)s")
    add("--repeats", type=int, default=3, help="default %(default)s")
    add("--threads", type=int, default=1, help="of torch in the main process, default %(default)s")
    add("--sb3", action="store_true", help="time Stable-Baselines3 too (pip install -e .[bench])")
    add("--output", type=Path, default=Path("runs/throughput/simulators.csv"), help="table, default %(default)s")
    options = parser.parse_args(argv)
    for name in ("num_envs", "decisions", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def measure(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    rows = []
    for chunk in options.chunks:
        for workers in options.workers:
            rows.append(measure_row(options, chunk, workers))
            write_table(rows, options.output)
            print(describe(rows[-1]), flush=True)
    print(options.output)
    return 0


def measure_row(options: argparse.Namespace, chunk: int, workers: int) -> dict:
    ours = Ours(options, chunk, workers)
    sb3 = None
    if options.sb3:
        from throughput.sb3_simulators import StableBaselinesOfSimulators

        sb3 = StableBaselinesOfSimulators(ours.env, ours.model, options.decisions, ours.config.algorithm.cfg)
    found: dict[str, list[float]] = {"limit": [], "collect": [], "train": [], "sb3": []}
    for repeat in range(options.repeats + 1):  # the first warms up: scenes are loaded, memory is taken
        speeds = {"limit": ours.limit(), "collect": ours.collect(), "train": ours.train()}
        speeds |= {"sb3": sb3.train()} if sb3 else {}
        for name, speed in speeds.items() if repeat else ():
            found[name].append(speed)
    ours.rollouts.shutdown()
    if sb3:
        sb3.close()

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))

    return {
        "chunk": chunk, "workers": workers, "num_envs": options.num_envs, "decisions": options.decisions,
        "threads": options.threads, "repeats": options.repeats, "env": options.env,
        "env_config": json.dumps(options.env_config), "model": options.model,
        **{name: statistics.median(speeds) for name, speeds in found.items() if speeds},
        "limit_low": min(found["limit"]), "limit_high": max(found["limit"]),
        "collect_over_limit": ratio("collect", "limit"), **({"train_over_sb3": ratio("train", "sb3")} if sb3 else {}),
    }  # fmt: skip


class Ours:
    """The parts of `ppo_vla.py`; each method that times something returns env steps per second."""

    def __init__(self, options: argparse.Namespace, chunk: int, workers: int):
        frames = options.num_envs * options.decisions
        env_config = {**options.env_config, "workers": workers, "chunk": chunk}
        vla = VLAConfig(model_class=options.model, model_config=options.model_config)
        self.config = ExperimentConfig(
            TrainerConfig(env=options.env, env_config=env_config, num_envs=options.num_envs, buffer_size=frames),
            PolicyConfig(freeze=["vision", "language"], vla_config=vla),
            AlgorithmConfig(cfg=PPOConfig(batch_size=min(480, frames))),
        )
        self.decisions = options.decisions
        self.env = make_env(options.env, options.num_envs, env_config)
        few, shape = self.env.observation_spec[OBSERVATION].zero()[:2], self.env.action_spec.shape[1:]
        built = make_model(self.config, few, shape, torch.device("cpu"), expect_fresh=True)
        self.model, policy = built.model, make_policy(self.config, built.model, few, shape)
        self.ppo = make_ppo(self.config, policy, built.value_head, few)
        self.rollouts = Rollouts(self.env, policy, frames)

    def limit(self) -> float:
        """Simulators alone. Those in other processes have their next actions before they are waited for."""
        actions = self.env.action_spec.rand()

        def act(rows: slice, now: TensorDictBase) -> TensorDictBase:
            return now.set(ACTION, actions[rows])

        turns, taken, start = Turns(self.env), 0, time.perf_counter()
        for _, _, step in turns.play(self.env.reset(), act, self.decisions):
            taken += env_steps_in(step)
        return taken / (time.perf_counter() - start)

    def collect(self) -> float:
        """A rollout."""
        start = time.perf_counter()
        self.rollout = self.rollouts.next()
        return env_steps_in(self.rollout) / (time.perf_counter() - start)

    def train(self) -> float:
        """A rollout and an update on it."""
        start = time.perf_counter()
        self.collect()
        batch, _ = self.ppo.prepare(self.rollout)
        self.ppo.update(batch, Progress(iterations=1))
        self.rollouts.publish()
        return env_steps_in(self.rollout) / (time.perf_counter() - start)


def write_table(rows: list[dict], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def describe(row: dict) -> str:
    """A row for a person."""
    sb3 = f", Stable-Baselines3 {row['sb3']:.0f}: {row['train_over_sb3']:.1f} times" if "sb3" in row else ""
    return (
        f"H = {row['chunk']}, {row['workers']} processes: simulators alone {row['limit']:.0f} env steps/s "
        f"({row['limit_low']:.0f} to {row['limit_high']:.0f}), collected {row['collect']:.0f} "
        f"({row['collect_over_limit']:.2f} of it), trained {row['train']:.0f}{sb3}"
    )


if __name__ == "__main__":
    sys.exit(main())
