"""Training runs as rows of one table, read from their folders, from W&B, or from a `runs.csv`.

The three give the same `Run`, and a comparison works from nothing else, so that a committed `runs.csv` recomputes every
number of it. Its columns:

| column             | meaning                                                                                     |
|--------------------|---------------------------------------------------------------------------------------------|
| `run`              | the run folder's name                                                                       |
| `status`           | `complete`, or why the run is kept but excluded from all means                              |
| `scope`            | what was frozen: `policy.freeze`, a list joined by `+`                                      |
| `learning_rate`    | `algorithm.cfg.learning_rate`                                                               |
| `seed`             | `trainer.seed`                                                                              |
| `environment`      | `trainer.env`                                                                               |
| `env_config`       | `trainer.env_config` as JSON with dotted keys                                               |
| `states`           | ids of the evaluation's initial states, as in `0-255`                                       |
| `measure`          | what scores are: `success` where the run logged it in its evaluations, else `return`        |
| `training_score`   | mean score of the training episodes in the last tenth of the env steps                      |
| `eval_steps`       | env steps of the evaluations, separated by spaces                                           |
| `eval_seconds`     | wall-clock seconds at the same evaluations                                                  |
| `eval_scores`      | their mean scores: success rates, or mean undiscounted returns                              |
| `final_episodes`   | scores of the last evaluation's episodes in the order of `states`: `0110`, 1 = success, or  |
|                    | returns separated by spaces; empty where not known                                          |
| `splits`           | JSON: a split's name -> its episodes, as in `final_episodes`; see below                     |
| `settings`         | JSON: the other settings in which the runs of the table differ                              |

Splits are what `evaluate_vla.py --split=all` wrote into the folder `splits/` of a run folder, from the run's last
checkpoint and the same initial states as its own evaluations.
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from research.config import FREEZE_SWITCHES, split_switches
from research.options import flatten_dict
from research.runs.folder import RunFolder, read_json, read_rows
from research.runs.tracking import read_metrics
from research.schema import UserError, one_line

# Settings that do not change what is learned, or that have a column of their own.
_OWN_COLUMN = (
    "trainer.env_config.", "policy.vla_config.model_config.freeze_", "trainer.wandb_",
    "policy.learning_rate_by_scope", "policy.learning_rate_factor",  # how a sweep arrives at the learning rate
)  # fmt: skip
_IRRELEVANT = (
    "trainer.exp_name", "trainer.env", "trainer.env_config", "trainer.seed", "trainer.run_dir", "trainer.use_wandb",
    "trainer.resume", "trainer.progress_bar", "trainer.save_freq", "trainer.eval_freq", "trainer.num_eval_envs",
    "trainer.num_eval_episodes", "trainer.threads", "policy.freeze", "algorithm.cfg.learning_rate",
)  # fmt: skip


class Measure(NamedTuple):
    """What the scores of a run are."""

    metric: str
    """Its name below `eval/` and `rollout/`."""
    field: str
    """Its name in `episodes.jsonl`."""
    extent: tuple[float, float] | None
    """The lowest and the highest score there can be; None for scores without bounds."""


MEASURES = {
    "success": Measure("success_rate", "success", (0.0, 1.0)),
    "return": Measure("return", "episode_return", None),
}


@dataclass
class Run:
    """One training run; see the table at the top of this module."""

    run: str
    status: str
    scope: str
    learning_rate: float
    seed: int
    environment: str
    env_config: dict[str, Any]
    states: str
    measure: Literal["success", "return"]
    training_score: float
    eval_steps: list[float]
    eval_seconds: list[float]
    eval_scores: list[float]
    final_episodes: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    folder: RunFolder | None = None
    """Where its videos are; None for a run that was not read from its folder."""

    @property
    def complete(self) -> bool:
        return self.status == "complete"

    @property
    def cell(self) -> tuple[str, float]:
        """Scope and learning rate: runs that agree in both are repetitions."""
        return self.scope, self.learning_rate

    @property
    def bounded(self) -> bool:
        """Whether its scores lie within 0..1."""
        return MEASURES[self.measure].extent is not None

    def at_step(self, step: float) -> float:
        """Mean score at an env step, linear between evaluations."""
        return float(np.interp(step, self.eval_steps, self.eval_scores))

    def at_second(self, second: float) -> float:
        """Mean score at a wall-clock time, linear between evaluations."""
        return float(np.interp(second, self.eval_seconds, self.eval_scores))

    def scores(self, episodes: str) -> list[float]:
        """Scores of single episodes, from `final_episodes` or one of `splits`; ValueError where they are no numbers."""
        return [float(score) for score in (episodes if self.measure == "success" else episodes.split())]


# ---- reading


def read_folders(paths: Sequence[str]) -> list[Run]:
    """Read run folders, and those anywhere below the folders given; `paths` may hold globs.

    Raises:
        UserError: a path that does not exist, no runs at all, or a file that cannot be read.
    """
    folders: set[RunFolder] = set()
    for pattern in paths:
        found = [Path(path) for path in sorted(glob.glob(pattern))] if glob.has_magic(pattern) else [Path(pattern)]
        if missing := [path for path in found if not path.is_dir()] if not glob.has_magic(pattern) else []:
            raise UserError(f"no such folder: {missing[0]}")
        for path in found:
            folders.update(RunFolder.all_below(path))
    if not folders:
        raise UserError(f"no runs found in {' '.join(paths)}: a run folder holds config.json and metrics.jsonl")
    return _only_differing_settings([_read_folder(folder) for folder in sorted(folders)])


def _read_folder(folder: RunFolder) -> Run:
    rows = read_metrics(folder)
    if folder.summary.is_file():
        code = read_json(folder.summary).get("exit_code", 0)
        status = "complete" if code == 0 else f"exit code {code}"
    else:
        status = f"no {folder.summary.name}: killed, or still running"
    config = read_json(folder.config)
    run = _make_run(folder.path.name, status, config, rows)
    run.folder = folder
    if run.complete and folder.episodes.is_file():
        scores = _final_episodes(folder.episodes, run.eval_steps[-1], run.measure)
        if len(scores) == config["trainer"]["num_eval_episodes"] and all(map(_finite, scores.values())):
            run.states = _as_ranges(sorted(scores))
            run.final_episodes = _as_text(scores, run.measure)
            run.splits = _read_splits(folder.splits, sorted(scores), run.measure)
    return run


def _final_episodes(path: Path, step: float, measure: str) -> dict[int, float | None]:
    """Scores by initial state in the evaluation at an env step; of one that a resumed run repeated, the last."""
    rows = read_rows(path, torn_anywhere=True)
    return {row["initial_state"]: row[MEASURES[measure].field] for row in rows if row["global_step"] == step}


def _read_splits(path: Path, states: Sequence[int], measure: str) -> dict[str, str]:
    """The episodes of every split that was evaluated from exactly these states."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(path, torn_anywhere=True) if path.is_file() else ():
        scores[row.get("split", "")][row["initial_state"]] = row[MEASURES[measure].field]
    return {split: _as_text(found, measure) for split, found in scores.items() if split and sorted(found) == states}


def _as_text(scores: Mapping[int, float], measure: str) -> str:
    """Scores by initial state as the text that `Run.scores` reads, in the order of the states."""
    ordered = [scores[state] for state in sorted(scores)]
    return "".join(str(int(score)) for score in ordered) if measure == "success" else _numbers(ordered)


def _numbers(values: Iterable[float]) -> str:
    """Numbers separated by spaces, with all of their digits."""
    return " ".join(repr(float(x)).removesuffix(".0") for x in values)


def read_wandb(path: str) -> list[Run]:
    """Read the runs of a W&B sweep, `entity/project/sweep_id`, or of a project, `entity/project`.

    Single episodes are not on W&B: differences are then not paired by initial state.

    Raises:
        UserError: W&B has no such sweep or project, cannot be reached, or has no runs there.
    """
    import wandb

    try:
        api = wandb.Api()
        runs = list(api.sweep(path).runs if path.count("/") == 2 else api.runs(path))
        found = [_read_wandb_run(run) for run in runs]
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B: cannot read {path}: {one_line(error)}") from error
    if not found:
        raise UserError(f"W&B: no runs in {path}")
    return _only_differing_settings(found)


def _read_wandb_run(run: Any) -> Run:
    # Rows that hold all of the keys: evaluations and rollouts are logged in rows of their own.
    for metric in (measure.metric for measure in MEASURES.values()):
        evaluations = list(run.scan_history(keys=["global_step", "time/elapsed_s", f"eval/{metric}"]))
        if evaluations:
            break
    rollouts = run.scan_history(keys=["global_step", f"rollout/{metric}", "rollout/episodes"])
    status = "complete" if run.state == "finished" else f"W&B state {run.state}"
    return _make_run(run.name, status, dict(run.config), [*evaluations, *rollouts])


def _make_run(name: str, status: str, config: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Run:
    config = flatten_dict(config)
    try:
        scope, rate, seed = config["policy.freeze"], config["algorithm.cfg.learning_rate"], config["trainer.seed"]
        environment, episodes = config["trainer.env"], config["trainer.num_eval_episodes"]
    except KeyError as error:
        raise UserError(f"{name} is not a run of ppo_vla.py: its config has no {error.args[0]}") from None
    switches = {name: config.get(f"policy.vla_config.model_config.{name}", False) for name in FREEZE_SWITCHES}
    scope, _ = split_switches(scope, switches)

    rows = [row for row in rows if _finite(row.get("global_step"))]
    measure = "success" if any(_finite(row.get("eval/success_rate")) for row in rows) else "return"
    metric = MEASURES[measure].metric
    by_step = {row["global_step"]: row for row in rows if _finite(row.get(f"eval/{metric}"))}
    evaluations = [by_step[step] for step in sorted(by_step)]  # W&B keeps what a resumed run logs twice
    rollouts = {row["global_step"]: row for row in rows if _finite(row.get(f"rollout/{metric}"))}
    late = [row for step, row in rollouts.items() if step > 0.9 * max(rollouts)]
    weights = [row.get("rollout/episodes", 1) for row in late]
    if status == "complete" and not evaluations:
        status = "no evaluations in its metrics"
    return Run(
        run=name,
        status=status,
        scope=scope if isinstance(scope, str) else "+".join(scope),
        learning_rate=float(rate),
        seed=int(seed),
        environment=environment,
        env_config={
            k.removeprefix("trainer.env_config."): v for k, v in config.items() if k.startswith("trainer.env_config.")
        },
        states=_as_ranges(range(episodes)),
        measure=measure,
        training_score=(
            float(np.average([row[f"rollout/{metric}"] for row in late], weights=weights))
            if sum(weights) > 0
            else math.nan
        ),
        eval_steps=[float(row["global_step"]) for row in evaluations],
        eval_seconds=[float(row.get("time/elapsed_s", math.nan)) for row in evaluations],
        eval_scores=[float(row[f"eval/{metric}"]) for row in evaluations],
        settings={
            # The checkpoint's name: the folder it lies in differs between machines.
            key: Path(value).name if key == "policy.vla_config.model_path" and value else value
            for key, value in config.items()
            if key not in _IRRELEVANT and not key.startswith(_OWN_COLUMN) and not key.startswith("_")
        },
    )


def _only_differing_settings(runs: list[Run]) -> list[Run]:
    texts: dict[str, set[str]] = defaultdict(set)
    for key in {key for run in runs for key in run.settings}:
        texts[key] = {json.dumps(run.settings.get(key), sort_keys=True) for run in runs}
    for run in runs:
        run.settings = {key: value for key, value in sorted(run.settings.items()) if len(texts[key]) > 1}
    return runs


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _as_ranges(ids: Sequence[int]) -> str:
    """Sorted ids as text: "0-255", "0-9 20"."""
    starts = [i for i, n in enumerate(ids) if i == 0 or n != ids[i - 1] + 1]
    spans = [(ids[i], ids[j - 1]) for i, j in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


# ---- the table

_COLUMNS = [name for name in Run.__dataclass_fields__ if name != "folder"]
_LISTS = ("eval_steps", "eval_seconds", "eval_scores")
_OBJECTS = ("env_config", "splits", "settings")


def write_table(path: Path, runs: Sequence[Run]) -> None:
    """Write `runs.csv`: one row per run, all that `compare` needs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for run in runs:
            values = {name: getattr(run, name) for name in _COLUMNS}
            values |= {name: _numbers(values[name]) for name in _LISTS}
            values |= {name: json.dumps(values[name], sort_keys=name != "splits") for name in _OBJECTS}
            writer.writerow(values.values())


def read_table(path: str | Path) -> list[Run]:
    """Read a `runs.csv`.

    Raises:
        UserError: no such file, missing columns, or a value that does not parse (with its line).
    """
    runs = []
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or [])]:
                raise UserError(f"{path} has no column {', '.join(missing)}: compare_runs.py writes such a table")
            for row in reader:
                values: dict[str, Any] = {name: row[name] for name in _COLUMNS}
                try:
                    values |= {name: [float(word) for word in row[name].split()] for name in _LISTS}
                    values |= {name: json.loads(row[name]) for name in _OBJECTS}
                    values |= {name: float(row[name]) for name in ("learning_rate", "training_score")}
                    if row["measure"] not in MEASURES:
                        raise ValueError(f"measure is {row['measure']!r}, neither of {', '.join(MEASURES)}")
                    runs.append(Run(**values | {"seed": int(row["seed"])}))
                except (ValueError, AttributeError) as error:
                    raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not runs:
        raise UserError(f"no runs found: {path} has no rows")
    return runs
