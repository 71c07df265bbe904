"""Small worlds that the tests of studies share: run folders of a comparison, and a sweep file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import yaml
from scipy.special import expit
from standin_wandb_server import Run, StandInServer

from research.options import flatten_dict
from research.runs.video import write_video

STATES = 40
EASY = np.where(np.arange(STATES) % 2 == 0, 5.0, -5.0)  # what a state adds to every run's return; variance 25 * 40 / 39


def simulate(
    repeats, mean, seed_sd, state_sd, seeds=5, settings=1, shift=0.0, rng_seed=0, states=128
):  # fmt: skip
    """Success `[settings, repeats, seeds, states]`: logit of the rate = mean + seed + state, states shared by all."""
    rng = np.random.default_rng(rng_seed)
    of_seed = rng.normal(0, seed_sd, (settings, repeats, seeds, 1))
    of_state = rng.normal(0, state_sd, (repeats, 1, states))
    level = mean - shift * np.arange(settings).reshape(-1, 1, 1, 1)
    return (rng.random((settings, repeats, seeds, states)) < expit(level + of_seed + of_state)).astype(np.float32)


def config_of(scope="none", rate=1e-4, seed=1, **changes):
    """The configuration of a run, as much of it as a comparison reads."""
    config = {
        "trainer": {"env": "tabletop", "env_config": {"task": "pick_place"}, "seed": seed, "num_eval_episodes": STATES},
        "policy": {"freeze": scope, "vla_config": {"model_path": None, "model_config": {}}},
        "algorithm": {"cfg": {"learning_rate": rate, "n_epochs": 4}},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for name in parents:
            node = node[name]
        node[last] = value
    return config


def make_run(
    folder, scope="none", rate=1e-4, seed=1, final=0.8, sampled=None, steps=(0, 1000, 2000), pace=0.1, returns=None,
    **changes,
):  # fmt: skip
    """A run folder as ppo_vla.py leaves it: success goes from 0.5 to `final`, `pace` seconds per env step.

    `final` is a rate, whose episodes are then drawn, or the outcomes of the final episodes themselves. With `returns`,
    those of the final episodes, the environment is one without success, and returns rise from 0.03.
    """
    if returns is not None:
        changes = {"trainer__env": "gym:InvertedPendulum-v5", "trainer__env_config": {}, **changes}
    config = config_of(scope, rate, seed, **changes)
    if isinstance(final, float):
        rng = np.random.default_rng([seed, int(rate * 1e7), len(str(scope))])
        final = rng.random(config["trainer"]["num_eval_episodes"]) < final
    has_success = returns is None
    returns = np.asarray(-7.0 * np.asarray(final) if has_success else returns, dtype=float)  # logged with success, too
    final = np.asarray(final if has_success else np.zeros(len(returns)), dtype=bool)
    trained = {"rollout/return": returns.mean() if sampled is None else sampled, "rollout/episodes": 10.0}
    if has_success:
        trained["rollout/success_rate"] = final.mean() if sampled is None else sampled
    rows, episodes = [], []
    for i, step in enumerate(steps):
        done = i / (len(steps) - 1)
        states = np.arange(len(final))
        # Before training every other state succeeds; the final outcomes come in from the first state on.
        success = np.where(states < done * len(final), final, states % 2 == 0)
        of_states = 0.03 + done * (returns - 0.03)
        row = {"global_step": step, "time/elapsed_s": pace * step, "eval/return": of_states.mean()}
        if has_success:
            row["eval/success_rate"] = float(success.mean())
        rows += [row, {"global_step": step + 1, "time/elapsed_s": pace * step, **trained}]
        episodes += [
            {
                "global_step": step, "seed": seed, "initial_state": state, "instruction": "",
                "success": bool(success[state]) if has_success else None, "episode_return": float(of_states[state]),
            }
            for state in range(len(final))
        ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "videos").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
    (folder / "summary.json").write_text(json.dumps({"global_step": steps[-1], "exit_code": 0}))
    return folder


def write_study(folder):
    """Two scopes, two rates each, three seeds: vision is best at 3e-4, none at 1e-4 and clearly worse."""
    rates = {("vision", 3e-4): 0.95, ("vision", 1e-4): 0.7, ("none", 1e-4): 0.6, ("none", 1e-5): 0.5}
    for ((scope, rate), success), seed in itertools.product(rates.items(), (1, 2, 3)):
        make_run(folder / f"{scope}-{rate:g}-{seed}", scope, rate, seed, success)
    write_video(np.zeros((4, 16, 16, 3), dtype=np.uint8), folder / "vision-0.0003-1/videos/eval_000000000.mp4", 10)
    for seed in (1, 2, 3):
        path = folder / f"vision-0.0003-{seed}/videos/eval_000002000.mp4"
        write_video(np.full((4, 16, 16, 3), 40 * seed, dtype=np.uint8), path, 10)
    return folder


def write_return_study(folder):
    """Seeds 10 apart, states 10 apart, and nothing else: the variances are known. vision is best at 3e-4."""
    means = {("vision", 3e-4): 987.6, ("vision", 1e-4): 700.0, ("none", 1e-4): 900.0, ("none", 1e-5): 0.03}
    for ((scope, rate), mean), seed in itertools.product(means.items(), (1, 2, 3)):
        returns = mean + 10 * (seed - 2) + EASY
        make_run(folder / f"{scope}-{rate:g}-{seed}", scope, rate, seed, returns=returns, sampled=mean / 10)
    return folder


def write_splits(run, **outcomes):
    """What `evaluate_vla.py --split=all --output=<run>/splits` leaves behind."""
    (run / "splits").mkdir()
    rows = [
        {"split": split, "initial_state": i, "success": bool(mark)}
        for split, marks in outcomes.items()
        for i, mark in enumerate(marks)
    ]
    (run / "splits" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_choosing(run, outcomes, first=STATES):
    """What `evaluate_vla.py --first_state=<first> --output=<run>/choosing` leaves behind."""
    (run / "choosing").mkdir()
    rows = [
        {"split": "train", "initial_state": first + i, "success": bool(mark), "episode_return": float(mark)}
        for i, mark in enumerate(outcomes)
    ]
    (run / "choosing" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluated(run, name, **facts):
    """What `evaluate_vla.py --output=<run>/<name>` says there of what it evaluated, beside the episodes."""
    evaluated = {
        "env": "tabletop", "env_config": {"task": "pick_place"}, "eval_mode": "mode", "max_eval_steps": 64,
        "env_steps": 2000, "weights_sha256": run.name,
    }  # fmt: skip
    (run / name / "summary.json").write_text(json.dumps({"eval/return": 0.5, "evaluated": evaluated | facts}))


def write_sweep(rates=(0.5, 1.0), **changes) -> str:
    """A grid of two seeds and some learning rates for `script.py`, in the working directory; None leaves a key out."""
    content = {
        "program": "script.py", "method": "grid", "name": "s",
        "metric": {"name": "eval/success_rate", "goal": "maximize"},
        "parameters": {"trainer.seed": {"values": [1, 2]}, "algorithm.cfg.learning_rate": {"values": list(rates)}},
    }  # fmt: skip
    content["parameters"] |= changes.pop("parameters", {})
    path = Path("s.yaml")
    path.write_text(yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None}, sort_keys=False))
    return str(path)


def put_on_wandb(server: StandInServer, study: Path, project: str, sweep: str | None = None) -> list[Path]:
    """The run folders of a study as runs of a server, `id0`, `id1`, ...; returns the folders in that order."""
    folders = sorted(study.iterdir())
    for place, folder in enumerate(folders):
        config = flatten_dict(json.loads((folder / "config.json").read_text())) | {"trainer.exp_name": "exp"}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        server.runs[f"id{place}"] = Run(
            f"id{place}", project, sweep, state="finished", config=config, files={"episodes.jsonl"},
            history=[{"_step": step, **row} for step, row in enumerate(rows)],
            attributes={"displayName": "one name for all"},
        )  # fmt: skip
        server.contents[f"/upload/id{place}/episodes.jsonl"] = (folder / "episodes.jsonl").read_bytes()
    return folders


def written(*results) -> str:
    """Runs, estimates, ... field by field and exactly, to compare where some fields are NaN (equal to nothing)."""
    return "\n".join(map(repr, results))
