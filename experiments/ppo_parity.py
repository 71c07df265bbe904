"""Is this PPO the PPO that others have? A state-only model on Gymnasium's tasks, against Stable-Baselines3's.

    pip install -e .[bench,mujoco]                          # Stable-Baselines3
    python experiments/ppo_parity.py                        # both, all tasks, 5 seeds; goes on where it stopped
    python experiments/ppo_parity.py --show                 # the table of what is there

A run of ours is `ppo_vla.py` with `agents.state_mlp.StateMLP`, as a user starts it; one of Stable-Baselines3's is its
PPO with its MlpPolicy. Alike are the network and its start, hyper-parameters, environments, threads, actions (from
[-1, 1], rescaled), bootstrapping at time limits, and the evaluation: deterministic, on the same initial states. Unlike
there, gradients of value and policy are clipped apart here, and running statistics are taken in once per rollout.

A row per run is added to --table at once, and is not run again; several of this script may share a table. Seed by seed.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import packages  # noqa: F401

import gymnasium
import numpy as np
import torch
from trained_policy import load_policy

from research.errors import UserError
from research.progress_bar import ProgressBar
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics
from research.schema import PROPRIO
from research.study.comparison import VERDICT_SEEDS
from research.study.statistics import Estimate, difference_interval, mean_interval

HERE = Path(__file__).parent
OURS, THEIRS = "ours", "stable-baselines3"
# Stable-Baselines3's names, and what its PPO has by default, but for eight environments instead of one.
DEFAULTS = {
    "n_steps": 256, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4, "gamma": 0.99, "gae_lambda": 0.95,
    "clip_range": 0.2, "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5,
}  # fmt: skip
OUR_NAMES = {"clip_range": "clip_coef"}


class Task(NamedTuple):
    """An environment and how it is trained.

    Attributes:
        env_steps: a whole number of rollouts.
        num_envs: N.
        normalize: observations and rewards, by running statistics.
        changed: of `DEFAULTS`.
    """

    env_steps: int
    num_envs: int = 8
    normalize: bool = False
    changed: dict[str, Any] = {}  # noqa: RUF012

    @property
    def settings(self) -> dict[str, Any]:
        return DEFAULTS | self.changed


TASKS = {
    "InvertedPendulum-v5": Task(51_200),
    # As in rl-baselines3-zoo, but without state-dependent exploration.
    "Pendulum-v1": Task(102_400, 4, changed={"n_steps": 1024, "gamma": 0.9, "learning_rate": 1e-3}),
    "Hopper-v5": Task(307_200, normalize=True),
    "HalfCheetah-v5": Task(307_200, normalize=True),
}


class Row(NamedTuple):
    """One run, evaluated.

    Attributes:
        mean_return: over episodes.
        seconds: of collecting and updating.
        returns: of the episodes from the initial states 0, 1, ..., with spaces between them.
    """

    algorithm: str
    env: str
    seed: int
    env_steps: int
    mean_return: float
    seconds: float
    returns: str

    @property
    def scores(self) -> list[float]:
        return [float(word) for word in self.returns.split()]


class Trained(NamedTuple):
    """What a run ended with."""

    act: Callable[[np.ndarray], np.ndarray]
    """An observation `[P]` as the environment has it -> the likeliest action `[A]`, in [-1, 1]."""
    seconds: float
    """Of collecting and updating."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        if not options.show:
            run_what_is_missing(options)
        print(table_of(read_table(options.table)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--envs", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all of %(choices)s")
    add("--algorithms", nargs="+", choices=(OURS, THEIRS), default=[OURS, THEIRS], help="default: both")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="default 1 2 3 4 5")
    add("--env_steps", type=int, help="for all, default: what TASKS says")
    add("--episodes", type=int, default=20, help="of an evaluation, default %(default)s")
    add("--table", type=Path, default=Path("runs/parity/runs.csv"), help="rows, default %(default)s")
    add("--folder", type=Path, default=Path("runs/parity"), help="run folders, default %(default)s")
    add("--show", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def run_what_is_missing(options: argparse.Namespace) -> None:
    """Every seed on every environment, by either algorithm."""
    torch.set_num_threads(1)
    for seed, env, algorithm in ProgressBar(list(product(options.seeds, options.envs, options.algorithms))):
        task = TASKS[env]
        task = task._replace(env_steps=options.env_steps or task.env_steps)
        if is_there(options, algorithm, env, seed, task.env_steps):
            continue
        ours = algorithm == OURS
        trained = train_ours(env, task, seed, options.folder.absolute()) if ours else train_theirs(env, task, seed)
        returns = evaluate(trained.act, env, options.episodes)
        words = " ".join(f"{value:.3f}" for value in returns)
        mean = round(float(np.mean(returns)), 3)
        append(options.table, Row(algorithm, env, seed, task.env_steps, mean, round(trained.seconds, 3), words))


def is_there(options: argparse.Namespace, algorithm: str, env: str, seed: int, env_steps: int) -> bool:
    """Whether a run has its row.

    Raises:
        UserError: the environment has rows of other lengths, or of other numbers of episodes.
    """
    rows = [row for row in read_table(options.table) if row.env == env] if options.table.exists() else []
    for row in rows:
        before, now = (row.env_steps, len(row.scores)), (env_steps, options.episodes)
        if before != now:
            raise UserError(
                f"--table: rows of {env} in {options.table} have {before[0]} env steps and {before[1]} episodes, not "
                f"{now[0]} and {now[1]}; set --env_steps and --episodes as they were, or give another --table"
            )
    return any((row.algorithm, row.seed) == (algorithm, seed) for row in rows)


# ---- training


def train_ours(env: str, task: Task, seed: int, folder: Path) -> Trained:
    """A run of `ppo_vla.py`, in a process of its own; one that was killed goes on from its checkpoint."""
    name, settings = f"{env}_{task.env_steps}_{seed}", dict(task.settings)  # no run goes on from one of another length
    trainer = {
        "exp_name": name, "run_dir": folder, "resume": "auto", "env": f"gym:{env}", "seed": seed, "device": "cpu",
        "threads": 1, "num_envs": task.num_envs, "buffer_size": settings.pop("n_steps") * task.num_envs,
        "max_env_steps": task.env_steps, "enable_eval": "false", "use_wandb": "false", "progress_bar": "false",
        "save_freq": 50_000,
    }  # fmt: skip
    cfg = {OUR_NAMES.get(key, key): value for key, value in settings.items()}
    cfg |= dict.fromkeys(("normalize_reward", "normalize_proprio"), str(task.normalize).lower())
    flags = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    flags += [f"--algorithm.cfg.{key}={value}" for key, value in cfg.items()]
    flags += [f"--config={HERE / 'configs' / 'state_mlp.json'}"]
    done = subprocess.run([sys.executable, str(HERE / "ppo_vla.py"), *flags], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"ppo_vla.py {' '.join(flags)} ended with exit code {done.returncode}; what it said is above")
    (run,) = (path for path in folder.glob(f"{name}-*") if RunFolder(path).last_checkpoint)
    act = load_policy(str(run), device="cpu")
    rows = read_metrics(run)
    seconds = sum(row.get("time/collect_s", 0.0) + row.get("time/update_s", 0.0) for row in rows)
    return Trained(lambda seen: act({PROPRIO: seen.astype(np.float32)}), seconds)


def train_theirs(env: str, task: Task, seed: int) -> Trained:
    """Stable-Baselines3's PPO, with its own statistics where there are any."""
    try:
        from stable_baselines3 import PPO  # an optional dependency
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
    except ImportError as error:
        raise UserError("--algorithms: stable-baselines3 is not installed; pip install -e .[bench]") from error
    vector = DummyVecEnv([lambda: make_env(env)] * task.num_envs)
    if task.normalize:
        vector = VecNormalize(vector, gamma=task.settings["gamma"])
    ppo = PPO("MlpPolicy", vector, seed=seed, device="cpu", **task.settings)
    start = time.perf_counter()
    ppo.learn(task.env_steps)
    seconds = time.perf_counter() - start
    normalise = vector.normalize_obs if task.normalize else lambda seen: seen
    vector.close()
    return Trained(lambda seen: ppo.predict(normalise(seen), deterministic=True)[0], seconds)


def make_env(env: str) -> gymnasium.Env:
    """With actions from [-1, 1]; others are clipped before they come here."""
    return gymnasium.wrappers.RescaleAction(gymnasium.make(env), np.float32(-1.0), np.float32(1.0))


def evaluate(act: Callable[[np.ndarray], np.ndarray], env: str, episodes: int) -> list[float]:
    """Returns of episodes from the initial states 0, 1, ..., which training of ours never draws."""
    simulator, returns = make_env(env), []
    for state in range(episodes):
        seen, ended, total = simulator.reset(seed=state)[0], False, 0.0
        while not ended:
            seen, reward, terminated, truncated, _ = simulator.step(np.clip(act(seen), -1.0, 1.0))
            ended, total = terminated or truncated, total + float(reward)
        returns.append(total)
    simulator.close()
    return returns


# ---- the table


def append(table: Path, row: Row) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(Row._fields)
        writer.writerow(row)


def read_table(table: Path) -> list[Row]:
    """The rows.

    Raises:
        UserError: there is no table, or it is another one.
    """
    if not table.exists():
        raise UserError(f"--table: there is no {table} yet")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Row(r["algorithm"], r["env"], int(r["seed"]), int(r["env_steps"]), float(r["mean_return"]),
                float(r["seconds"]), r["returns"])
            for r in rows
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--table: {table} is no table of this script; give another --table") from error


def table_of(rows: Sequence[Row]) -> str:
    """Means with 95 % intervals over seeds and initial states, their difference, and what follows from it."""
    lines = ["| environment | env steps | seeds | ours | Stable-Baselines3 | ours - theirs | verdict | seconds |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for env in dict.fromkeys(row.env for row in rows):
        ours, theirs = ([r for r in rows if (r.env, r.algorithm) == (env, name)] for name in (OURS, THEIRS))
        seeds, steps = f"{len(ours)}, {len(theirs)}", (ours or theirs)[0].env_steps
        scores = [np.array([row.scores for row in side]) for side in (ours, theirs)]
        means = [said(mean_interval(s, bounded=False)) if len(s) else "-" for s in scores]
        less = difference_interval(*scores, bounded=False) if min(map(len, scores)) > 1 else None
        took = [f"{np.mean([row.seconds for row in side]):.0f}" if side else "-" for side in (ours, theirs)]
        cells = [env, f"{steps:,}", seeds, *means, said(less) if less else "-", verdict(less, min(map(len, scores)))]
        cells.append(" / ".join(took))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(less: Estimate | None, seeds: int) -> str:
    """Which is better, where the interval of the difference leaves out 0; there is none where nothing varies."""
    if less is None or seeds < VERDICT_SEEDS:
        return "too few seeds"
    if np.isnan(less.low):
        return "equal" if less.value == 0 else "no interval"
    return "ours" if less.low > 0 else "Stable-Baselines3" if less.high < 0 else "not separable"


def said(estimate: Estimate) -> str:
    interval = "" if np.isnan(estimate.low) else f" [{estimate.low:.0f}, {estimate.high:.0f}]"
    return f"{estimate.value:.0f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
