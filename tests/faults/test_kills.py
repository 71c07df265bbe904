"""Chains of kill -9 and resumes: no row is lost or doubled, and the end is that of a run that nobody killed.

A child process is forked for every start, so that it need not import everything again. It dies at a random moment, or
at a random one of the calls by which files are written: before it, or with half of it done.
"""

from __future__ import annotations

import builtins
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ppo_vla
import pytest
import torch
import training_run
from worlds import rows_without_times, write_config

from research.runs import checkpoint, folder
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder, read_json, read_rows

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ITERATIONS = 12


def mujoco(name: str, workers: int) -> dict:
    """Of which qpos, qvel, time and generator come back."""
    return {
        "trainer__env": f"gym:{name}",
        "trainer__env_config": {"max_episode_steps": 20, "workers": workers},
        "policy__action_dim": None,
        "policy__vla_config": {
            "model_class": "agents.small_vla.SmallVLA",
            "model_config": {"modalities": ["proprio"], "hidden_size": 16},
        },
    }


WORLDS = {
    "tabletop": {},
    "mujoco": mujoco("Hopper-v5", workers=1),
    "mujoco, two workers": mujoco("InvertedPendulum-v5", workers=2),
    "workers that collect": {"trainer__buffer_type": "vla", "trainer__max_staleness": 1000},
}


def arm(rng: random.Random, longest: float) -> None:
    """Let this process, and none that it starts, die by itself: after a while, or at a call that writes."""
    me = os.getpid()

    def die() -> None:
        os.kill(me, signal.SIGKILL)

    if rng.random() < 0.5:
        timer = threading.Timer(rng.uniform(0.0, longest), die)
        timer.daemon = True
        timer.start()
        return
    left = [rng.randint(1, 25)]

    def dying(call: Callable, half: Callable | None = None) -> Callable:
        def wrapped(*arguments, **options):
            left[0] -= os.getpid() == me
            if left[0] == 0:
                if half is not None:
                    half(*arguments, **options)
                die()
            return call(*arguments, **options)

        return wrapped

    def half_of_a_checkpoint(state, file):
        file.write(os.urandom(rng.randint(0, 10_000)))
        file.flush()

    def half_of_the_rows(path, rows):
        text = "".join(folder.as_json(row) + "\n" for row in rows)
        with path.open("a") as file:
            file.write(text[: rng.randint(0, len(text))])

    def half_of_a_removal(path, **_):
        for file in list(Path(path).glob("*"))[:1]:  # there may be nothing to remove
            file.unlink()

    calls = {name: dying(getattr(os, name)) for name in ("fsync", "rename", "replace")}
    folder.os = checkpoint.os = Patched(os, **calls)
    checkpoint.torch = Patched(torch, save=dying(torch.save, half_of_a_checkpoint))
    checkpoint.shutil = Patched(shutil, rmtree=dying(shutil.rmtree, half_of_a_removal))
    training_run.append_rows = dying(folder.append_rows, half_of_the_rows)


class Patched:
    """A module with some functions replaced, for one of those that import it."""

    def __init__(self, module: ModuleType, **functions: Callable):
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def start(argv: list[str], log: Path, dying: Callable[[], None] | None) -> int:
    """Run the main job in a forked child; returns its exit code, -9 where it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            if dying is not None:
                dying()
            code = ppo_vla.main(argv)
        except BaseException as error:
            builtins.print("raised", repr(error), flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def arguments(tmp_path: Path, world: str) -> list[str]:
    tmp_path.mkdir(exist_ok=True)
    config = write_config(
        tmp_path,
        **{
            "trainer__iterations": ITERATIONS,
            "trainer__eval_freq": 256,
            "trainer__save_freq": 64,
            "trainer__use_wandb": False,
            **WORLDS[world],
        },
    )
    return ["--config", str(config), "--trainer.resume=auto", "--trainer.threads=1"]


def finished(tmp_path: Path) -> Path:
    """The run that came to its end; one that was killed before its first checkpoint has had no successor."""
    (run,) = (run for run in (tmp_path / "runs").iterdir() if RunFolder(run).finished)
    return run


def check_rows(run: Path) -> None:
    """Every iteration and every evaluation episode once, and everything where it belongs."""
    rows = rows_without_times(run)
    assert [row["global_step"] for row in rows if "train/approx_kl" in row] == list(range(64, 64 * ITERATIONS + 1, 64))
    evaluations = [row["global_step"] for row in rows if "eval/return" in row]
    assert evaluations == [0, 256, 512, 768]
    episodes = [(row["global_step"], row["initial_state"]) for row in read_rows(run / "episodes.jsonl")]
    assert episodes == [(step, state) for step in evaluations for state in range(8)]
    assert read_json(run / "summary.json")["exit_code"] == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """World -> a run that nobody killed, and how many seconds it took."""
    made = {}

    def get(world: str) -> tuple[Path, float]:
        if world not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            argv, began = arguments(folder, world), time.monotonic()
            assert start(argv, folder / "log", None) == 0, (folder / "log").read_text()[-2000:]
            made[world] = finished(folder), time.monotonic() - began
        return made[world]

    return get


CHAINS = [
    (world, chain) for world in WORLDS for chain in range({"tabletop": 9, "workers that collect": 5}.get(world, 5))
]


@pytest.mark.parametrize(("world", "chain"), CHAINS)
def test_a_chain_of_kills_ends_where_an_undisturbed_run_does(tmp_path, undisturbed, world, chain):
    whole, seconds = undisturbed(world)
    rng, kills, most = random.Random(f"{world} {chain}"), 0, 8 if world == "tabletop" else 5
    argv = arguments(tmp_path / "killed", world)
    for _ in range(40):
        dying = (lambda: arm(rng, 0.5 * seconds)) if kills < most else None
        code = start(argv, tmp_path / "log", dying)
        rng.random()  # the child's draws do not come back
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
        kills += 1
    assert code == 0
    print(f"{world}, chain {chain}: {kills} kills")
    run = finished(tmp_path / "killed")
    check_rows(run)
    assert not list((run / "checkpoints").glob("*.partial"))
    if world != "workers that collect":  # which repeats nothing bit for bit
        assert rows_without_times(run) == rows_without_times(whole)
        ours, theirs = (load_checkpoint(one)["model_state_dict"] for one in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
