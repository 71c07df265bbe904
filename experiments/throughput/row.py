"""One row of `benchmark_throughput.py`'s table, measured in a process of its own.

python -m throughput.row SETTINGS.json RESULT.json, with experiments/ on the path
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torchrl.envs import EnvBase

from agents.critic import detach_value_head
from agents.flop_counter import FlopCounter
from agents.policy import VLAPolicy
from agents.residual import RESIDUAL, add_residual, policy_at
from research.config import PPOConfig, ResidualConfig
from research.errors import UserError
from research.runs.machine import machine
from research.schema import OBSERVATION
from research.training.advantages import GAEAdvantages
from research.training.algorithm import Progress
from research.training.asynchronous import AsynchronousRollouts
from research.training.freezing import HEADS, freeze, named_parameters_within, parameter_groups
from research.training.host_memory import keep_freed_memory
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts
from research.training.utilisation import matmul_flops_per_second, timed
from research.training.vtrace import VTraceAdvantages
from throughput.models import build_env, build_model
from throughput.peers import Floor, Loop, TorchRLRecipe
from throughput.profiling import profile

EXPERIMENTS = Path(__file__).resolve().parents[1]


@dataclass
class Settings:
    """What a row measures, and at which sizes.

    Attributes:
        loop: "ours", "sb3", "torchrl"; results also have "floor".
        freeze: a preset of `research.training.freezing`.
        precision: "fp32" or "bf16", and "-compiled" behind it for `trainer.compile: on`.
        buffer: `trainer.buffer_type`.
        num_envs, steps: N and T of a rollout.
        epochs, batch_size: of the update.
        iterations, warmup: rollouts with their updates that are timed, and those before.
        floor: also time the floor, by turns, where `loop` is ours and the buffer standard.
        profile: file for where the time goes, or none. In the table, its name within the output folder.
    """

    loop: str
    freeze: str
    precision: str = "fp32"
    buffer: str = "standard"
    model: str = "small"
    model_config: dict = field(default_factory=dict)
    env: str = "tabletop"
    image_size: int = 64
    device: str = "cpu"
    num_envs: int = 64
    steps: int = 32
    epochs: int = 4
    batch_size: int = 512
    num_collectors: int = 1
    iterations: int = 5
    warmup: int = 1
    threads: int = 1
    floor: bool = True
    profile: str | None = None

    @property
    def row(self) -> str:
        """The row's name."""
        return f"{self.loop}/{self.freeze}/{self.precision}/{self.buffer}"

    @property
    def bf16(self) -> bool:
        """Whether layers run in bfloat16."""
        return self.precision.startswith("bf16")

    @property
    def frames(self) -> int:
        """Transitions per rollout."""
        return self.num_envs * self.steps

    def build_env(self, worker: int = 0) -> EnvBase:
        """The environment, or a worker's share of it."""
        share = self.num_envs // (self.num_collectors if self.buffer == "vla" else 1)
        return build_env(self.env, share, self.image_size, torch.device(self.device), worker)


def run(settings: Settings) -> list[dict] | None:
    """Measure a row in a process of its own: its columns and its floor's. None: it failed, the reason is printed."""
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "settings.json", Path(folder) / "result.json"
        task.write_text(json.dumps(asdict(settings)))
        command = [sys.executable, "-m", "throughput.row", str(task), str(result)]
        path = os.pathsep.join([str(EXPERIMENTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        if process.returncode == 0:
            return json.loads(result.read_text())
    print(f"failed: {(process.stderr.strip().splitlines() or [f'exit code {process.returncode}'])[-1]}", flush=True)
    return None


class Ours:
    """The loop of `experiments/ppo_vla.py`: the same objects, called in the same order."""

    def __init__(self, settings: Settings, model: nn.Module, cfg: PPOConfig):
        compiled = settings.precision.endswith("-compiled")
        env = settings.build_env()
        self.policy = VLAPolicy(model, autocast="bf16" if settings.bf16 else "off", compile=compiled)
        optimizer = torch.optim.Adam(parameter_groups(model, cfg.learning_rate, {}), eps=1e-5, fused=True)
        value_head = list(named_parameters_within(model, ["value_head"]).values())
        apart = not detach_value_head(model, value_head, env.observation_spec[OBSERVATION].zero()[:2])
        step = PolicyUpdate(make_loss(self.policy.actor, self.policy.critic, cfg), optimizer, cfg, value_head, apart)
        self.correct = VTraceAdvantages(self.policy, cfg.gamma, cfg.gae_lambda)
        if settings.buffer == "standard":
            self.rollouts = Rollouts(env, self.policy, settings.frames)
            advantages = GAEAdvantages(self.policy, cfg.gamma, cfg.gae_lambda)
        else:
            env.close()
            self.rollouts = AsynchronousRollouts(
                settings.build_env, settings.num_envs, self.policy, settings.num_collectors, settings.frames,
                max_staleness=2, seed=1,
            )  # fmt: skip
            advantages = self.correct
        self.ppo = PPO(advantages, step, cfg)

    def collect(self) -> None:
        self.rollout = self.rollouts.next()
        self.batch, _ = self.ppo.prepare(self.rollout)

    def update(self) -> None:
        self.ppo.update(self.batch, Progress(iterations=1))
        self.rollouts.publish()
        self.rollouts.metrics()

    def correct_staleness(self) -> None:
        """What the main process does with a rollout of buffer type vla, besides the update."""
        self.correct(self.rollout)

    def bytes_per_transition(self) -> float:
        return self.rollout.bytes() / self.rollout.numel()

    def close(self) -> None:
        """Stop the workers, close the environment."""
        self.rollouts.shutdown()


def build_loop(settings: Settings, cfg: PPOConfig) -> Loop:
    """The row's loop around a model with the same initial weights as every other row's."""
    env = settings.build_env() if settings.loop != "ours" else None
    model = build_model(settings.model, settings.model_config, action_dim=3, device=torch.device(settings.device))
    heads = HEADS
    if settings.freeze == RESIDUAL:
        few = build_env(settings.env, 2, settings.image_size, torch.device(settings.device))
        add_residual(model, *policy_at(model.eval(), few.reset()[OBSERVATION]), ResidualConfig().units)
        heads = HEADS[1:]
    freeze(model, settings.freeze, heads=heads)
    model.eval()
    if settings.loop == "ours":
        return Ours(settings, model, cfg)
    if settings.loop == "torchrl":
        return TorchRLRecipe(env, model, settings.steps, cfg)
    from throughput.sb3 import StableBaselines  # an optional dependency

    return StableBaselines(env, model, settings.steps, cfg)


def measure(settings: Settings) -> list[dict]:
    """The row's columns, and behind them those of its floor, timed by turns with it: a machine's speed drifts."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()  # as a run does; the other loops have it, too
    device = torch.device(settings.device)
    cfg = PPOConfig(n_epochs=settings.epochs, batch_size=settings.batch_size)
    peak = matmul_flops_per_second(torch.bfloat16 if settings.bf16 else torch.float32, device)
    with closing(build_loop(settings, cfg)) as loop:
        rows, memory = measure_speed(settings, loop, cfg)
        if settings.profile:
            Path(settings.profile).parent.mkdir(parents=True, exist_ok=True)
            Path(settings.profile).write_text(profile(loop, device))
    if settings.buffer == "vla":
        largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        memory += settings.num_collectors * largest_child
    collect_flops, update_flops = count_flops(settings, cfg)
    flops_per_second = (collect_flops + update_flops) / rows[0]["iteration_s"]
    rows[0] |= {
        "flops_per_collected_step": collect_flops / settings.steps,
        "flops_per_minibatch": update_flops / (settings.epochs * -(-settings.frames // settings.batch_size)),
        "flops_per_env_step": (collect_flops + update_flops) / settings.frames,
        "model_flops_per_second": flops_per_second,
        "peak_flops_per_second": peak,
        "mfu": flops_per_second / peak,
        "peak_memory_mib": memory,
    }
    return rows


def measure_speed(settings: Settings, loop: Loop, cfg: PPOConfig) -> tuple[list[dict], float]:
    """Columns of the row, and of its floor's where it has one; and the loop's peak memory, MiB."""
    device, compiled = torch.device(settings.device), settings.precision.endswith("-compiled")
    for _ in range(settings.warmup + 2 * compiled):  # varying shapes compile twice
        loop.collect()
        loop.update()
    memory = peak_memory(device)
    loops = [loop]
    if settings.floor and settings.loop == "ours" and settings.buffer == "standard":
        floor = Floor(settings.build_env(), loop.policy, settings.steps, cfg, bf16=settings.bf16)
        floor.collect()
        floor.update()
        loops.append(floor)
    times = [[] for _ in loops]
    for _ in range(settings.iterations):
        for each, measured in zip(loops, times, strict=True):
            measured.append((timed(each.collect, device), timed(each.update, device)))
    rows = [columns(settings, loop.bytes_per_transition(), times[0])]
    if len(loops) == 2:
        rows.append(columns(replace(settings, loop="floor"), floor.bytes_per_transition(), times[1]))
        ratios = [sum(ours) / sum(least) for ours, least in zip(*times, strict=True)]
        rows[0] |= {"floor_s": rows[1]["iteration_s"], "iteration_over_floor": statistics.median(ratios)}
        floor.env.close()
    return rows, memory


def columns(settings: Settings, bytes_per_transition: float, times: list[tuple[float, float]]) -> dict:
    """What every row has: its settings, its speed and its memory per transition."""
    totals = [sum(pair) for pair in times]
    median = statistics.median(totals)
    collect_s, update_s = (statistics.median(part) for part in zip(*times, strict=True))
    return {
        "row": settings.row,
        **asdict(settings),
        "model_config": json.dumps(settings.model_config),
        "profile": settings.profile and Path(settings.profile).name,
        "env_steps_per_second": settings.frames / median,
        "iteration_s": median,
        "iteration_s_min": min(totals),
        "iteration_s_max": max(totals),
        "collect_s": collect_s,
        "update_s": update_s,
        "bytes_per_transition": bytes_per_transition,
        "machine": machine(torch.device(settings.device)),
        "torch": torch.__version__,
    }


def count_flops(settings: Settings, cfg: PPOConfig) -> tuple[float, float]:
    """FLOPs of one iteration's collection and of its update, multiply and add counted as two.

    Counted over one epoch of an uncompiled loop in this process: the counter sees neither workers nor compiled code.
    """
    settings, cfg = replace(settings, precision="fp32"), replace(cfg, n_epochs=1)
    with closing(build_loop(replace(settings, buffer="standard"), cfg)) as loop:
        loop.collect()  # frozen instruction features are known from here on
        with FlopCounter() as collected:
            loop.collect()
        with FlopCounter() as updated:
            loop.update()
        collect_flops, update_flops = collected.get_total_flops(), updated.get_total_flops()
        if settings.buffer == "vla":
            with FlopCounter() as corrected:
                loop.correct_staleness()
            collect_flops += corrected.get_total_flops()
    return collect_flops, settings.epochs * update_flops


def peak_memory(device: torch.device) -> float:
    """MiB: the most that this process had allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    try:
        rows = measure(Settings(**json.loads(Path(sys.argv[1]).read_text())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Path(sys.argv[2]).write_text(json.dumps(rows))
