"""Runs read from run folders and from W&B, as the rows of `run_table`.

Whatever a folder holds, it is one row: a run that crashed, or whose files cannot be read, is kept with the reason as
its status, and a comparison leaves it out. One bad folder does not end the comparison of the others.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from research.config import FREEZE_SWITCHES, split_switches
from research.errors import UserError, one_line
from research.options import flatten_dict
from research.runs.folder import MANIFEST, RunFolder, read_json, read_rows
from research.study.run_settings import keep_what_tells, settings_of
from research.study.run_table import (
    AS_EVALUATED,
    CHOOSING,
    MEASURES,
    SPLITS,
    Run,
    as_ranges,
    as_text,
    check,
    is_number,
    plain,
)

COMPARING = "compare"  # job type of W&B runs that show what others came to, and are none of those compared

LOGGED = "_step"  # W&B's own number of a row, in the order of logging

_WHOLE, _TEXT = "a whole number", "text"


def read_folders(paths: Sequence[str], evaluation: str | None = None) -> list[Run]:
    """Read run folders, and those anywhere below the folders given; `paths` may hold globs.

    Args:
        paths: of folders.
        evaluation: a folder in each run's, which `evaluate_vla.py` was given as `--output`: what it found takes the
            place of the run's own evaluations.
    Raises:
        UserError: a path that does not exist, or no runs at all.
    """
    folders: set[RunFolder] = set()
    for pattern in paths:
        found = [Path(path) for path in sorted(glob.glob(pattern))] if glob.has_magic(pattern) else [Path(pattern)]
        if missing := [path for path in found if not path.is_dir()] if not glob.has_magic(pattern) else []:
            is_file = f", but a file; a table of runs is read by --table={missing[0]}" if missing[0].is_file() else ""
            raise UserError(f"no such folder: {missing[0]}{is_file}")
        for path in found:
            folders.update(RunFolder.all_below(path))
    if not folders:
        raise UserError(f"no runs found in {' '.join(paths)}: a run folder holds config.json and metrics.jsonl")
    return keep_what_tells([_read_folder(folder, evaluation) for folder in sorted(folders)])


def _read_folder(folder: RunFolder, evaluation: str | None) -> Run:
    name = folder.path.name.encode("utf-8", "replace").decode()  # a file system allows names that no text file does
    try:
        rows = _read_rows(folder.metrics)
        run = _make_run(name, _status(folder), _read_object(folder.config), rows)
        _add_origin(run, folder)
        if run.complete and run.eval_steps and folder.episodes.is_file():
            _add_episodes(run, folder)
        if run.complete and evaluation is not None:
            _take_evaluation(run, folder.path / evaluation, evaluation, rows[-1] if rows else {})
        if run.complete and evaluation != CHOOSING:
            run.choosing_states, run.choosing_episodes = _read_choosing(folder.choosing, run)
        used = {CHOOSING: run.choosing_episodes, SPLITS: run.splits, evaluation: run.complete and evaluation}
        run.evaluated = {n: facts for n, is_used in used.items() if is_used and (facts := _evaluated(folder.path / n))}
    except UserError as error:
        run = _unreadable(name, error)
    run.folder = folder
    return _judged(run)


def _judged(run: Run) -> Run:
    """The run, with what is wrong with its evaluations as its status."""
    if run.complete:
        try:
            check(run)
        except UserError as error:
            run.status = one_line(error)
    return run


def _unreadable(name: str, error: UserError) -> Run:
    """The row of a run of which only its name is known, and why."""
    status = f"cannot be read: {one_line(error)[:200]}"
    return Run(name, status, "", math.nan, 0, "", {}, "", "success", math.nan, [], [], [])


def _status(folder: RunFolder) -> str:
    if not folder.summary.is_file():
        return f"no {folder.summary.name}: killed, or still running"
    code = _read_object(folder.summary).get("exit_code", 0)
    return "complete" if code == 0 else f"exit code {str(code)[:20]}"


def _add_origin(run: Run, folder: RunFolder) -> None:
    """When, where and by which code a run was made, as far as its folder says so."""
    if match := re.match(r"(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)\d\d_", folder.id):
        run.started = "{}-{}-{} {}:{}".format(*match.groups())
    with suppress(UserError):
        summary = _read_object(folder.summary)
        run.machine, run.url = _text(summary.get("machine")), _text(summary.get("wandb_url"))
    if newest := folder.last_checkpoint:
        with suppress(UserError):
            run.code = _text(_read_object(newest / MANIFEST).get("code"))


def _text(value: Any) -> str:
    """A text on one line; empty where it is none."""
    return plain(value)[:200] if isinstance(value, str) else ""


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; UserError with the file's name, not its folder's, where it holds no such thing."""
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise UserError("expected a JSON object")
        json.dumps(value, ensure_ascii=False).encode()  # half of a character can be escaped, but not written
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: {error}") from None
    return value


def _read_rows(path: Path, torn_anywhere: bool = False) -> list[dict[str, Any]]:
    try:
        rows = read_rows(path, torn_anywhere)
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path.name}: a line is no JSON object")
    return rows


def _add_episodes(run: Run, folder: RunFolder) -> None:
    """The single episodes of a run's evaluations; of an evaluation that a resumed run repeated, the last."""
    by_step: dict[float, dict[int, float | None]] = defaultdict(dict)
    tasks: dict[int, str] = {}
    for row in _read_rows(folder.episodes, torn_anywhere=True):
        step, state = row.get("global_step"), _state_of(row, folder.episodes)
        if isinstance(task := row.get("task"), str):
            tasks[state] = task
        if not is_number(step):
            raise UserError(f"{folder.episodes.name}: global_step is {str(step)[:80]!r}")
        by_step[float(step)][state] = _score_of(row, run.measure, folder.episodes)
    final = by_step.get(run.eval_steps[-1], {})
    if not final or not _complete(final, run.states):
        return
    states = sorted(final)
    run.states, run.tasks = as_ranges(states), _tasks(tasks)
    run.episodes = [
        as_text(found, run.measure) if sorted(found := by_step.get(step, {})) == states and _known(found) else ""
        for step in run.eval_steps
    ]
    run.splits = _read_splits(folder.splits, states, run.measure)


def _take_evaluation(run: Run, path: Path, name: str, end: Mapping[str, Any]) -> None:
    """Let an evaluation of its last checkpoint, on other states or tasks, stand for a run's own, if it has any.

    Args:
        run: the run.
        path: the folder that `evaluate_vla.py` wrote.
        name: what that folder is called.
        end: the run's last row of metrics.
    """
    scores: dict[int, float | None] = {}
    tasks: dict[int, str] = {}
    rows = _read_rows(path / "episodes.jsonl") if (path / "episodes.jsonl").is_file() else []
    for row in rows:
        state = _state_of(row, path / "episodes.jsonl")
        if state in scores:
            raise UserError(f"{name}/episodes.jsonl: initial state {state} twice; compare splits from <run>/splits")
        scores[state] = _score_of(row, run.measure, path / "episodes.jsonl")
        if isinstance(task := row.get("task"), str):
            tasks[state] = task
    if not scores or not _known(scores):
        raise UserError(f"{name}/episodes.jsonl: {'a score is missing' if scores else 'not there'}")
    run.states, run.tasks = as_ranges(sorted(scores)), _tasks(tasks)
    steps, seconds = end.get("global_step"), end.get("time/elapsed_s")
    if not run.eval_steps and is_number(steps):  # trainer.enable_eval=false
        run.eval_steps, run.eval_seconds = [float(steps)], [float(seconds) if is_number(seconds) else math.nan]
    run.eval_steps, run.eval_seconds = run.eval_steps[-1:], run.eval_seconds[-1:]
    run.eval_scores, run.episodes = [sum(scores.values()) / len(scores)], [as_text(scores, run.measure)]
    run.splits = {}
    run.environment = f"{run.environment}{AS_EVALUATED}{name}/"


def _evaluated(path: Path) -> dict[str, Any]:
    """What `evaluate_vla.py` says that it evaluated into a folder, with dotted keys; earlier versions said nothing."""
    summary = path / "summary.json"
    try:
        facts = _read_object(summary).get("evaluated") if summary.is_file() else None
    except UserError as error:
        raise UserError(f"{path.name}/{error}") from None
    return {key: value for key, value in flatten_dict(facts).items() if value != {}} if isinstance(facts, dict) else {}


def _tasks(of_state: Mapping[int, str]) -> str:
    """The tasks in the order in which ids take them; empty where there is one, or they are in no such order."""
    count = len(set(of_state.values()))
    names = [of_state.get(place) for place in range(count)]
    in_order = all(of_state[state] == names[state % count] for state in of_state)
    plain_names = all(name and not name.split()[1:] for name in names)
    return " ".join(map(str, names)) if count > 1 and in_order and plain_names else ""


def _complete(episodes: Mapping[int, float | None], states: str) -> bool:
    """Whether there is a score for as many states as were to be evaluated; `states` is a range from 0."""
    return len(episodes) == int(states.split("-")[-1]) + 1 and _known(episodes)


def _known(episodes: Mapping[int, float | None]) -> bool:
    return None not in episodes.values()


def _state_of(row: Mapping[str, Any], path: Path) -> int:
    state = row.get("initial_state")
    if type(state) is not int or not 0 <= state < 2**63:
        raise UserError(f"{path.name}: initial_state is {str(state)[:80]!r}, no id of an initial state")
    return state


def _score_of(row: Mapping[str, Any], measure: str, path: Path) -> float | None:
    """An episode's score; None where it is not known."""
    value = row.get(MEASURES[measure].field)
    if value is not None and not is_number(value):
        raise UserError(f"{path.name}: {MEASURES[measure].field} is {str(value)[:80]!r}")
    return value if value is None else float(value)


def _read_splits(path: Path, states: Sequence[int], measure: str) -> dict[str, str]:
    """The episodes of every split that was evaluated from exactly these states."""
    scores: dict[str, dict[int, float | None]] = defaultdict(dict)
    for row in _read_rows(path, torn_anywhere=True) if path.is_file() else ():
        if isinstance(split := row.get("split"), str) and split:
            scores[split][_state_of(row, path)] = _score_of(row, measure, path)
    return {
        split: as_text(found, measure) for split, found in scores.items() if sorted(found) == states and _known(found)
    }


def _read_choosing(path: Path, run: Run) -> tuple[str, str]:
    """States and episodes of the evaluation that a rate may be chosen on, in the split that the run trains in."""
    own, scores = run.env_config.get("split", "train"), {}
    for row in _read_rows(path, torn_anywhere=True) if path.is_file() else ():
        if row.get("split", own) == own:
            scores[_state_of(row, path)] = _score_of(row, run.measure, path)
    if not scores or not _known(scores):
        return "", ""
    return as_ranges(sorted(scores)), as_text(scores, run.measure)


def read_wandb(path: str) -> list[Run]:
    """Read the runs of a W&B sweep, `entity/project/sweep_id`, or of a project, `entity/project`.

    Raises:
        UserError: W&B has no such sweep or project, cannot be reached, or has no runs there.
    """
    import wandb

    try:
        api = wandb.Api()
        runs = list(api.sweep(path).runs if path.count("/") == 2 else api.runs(path))
        found = [_read_wandb_run(run) for run in runs if getattr(run, "job_type", "") != COMPARING]
    except Exception as error:  # not all that the client raises is a wandb.Error
        raise UserError(f"W&B: cannot read {path}: {one_line(error)}") from error
    if not found:
        raise UserError(f"W&B: no runs in {path}")
    return keep_what_tells(found)


def _read_wandb_run(run: Any) -> Run:
    gone = _given_up(run.scan_history(keys=[LOGGED, "global_step"]))

    def rows_with(*keys: str) -> list[dict[str, Any]]:  # that hold all of them: a row is of an evaluation, or a rollout
        return [row for row in run.scan_history(keys=[LOGGED, "global_step", *keys]) if row[LOGGED] not in gone]

    for metric in (measure.metric for measure in MEASURES.values()):
        if evaluations := rows_with("time/elapsed_s", f"eval/{metric}"):
            break
    rollouts = [*rows_with(f"rollout/{metric}", "rollout/episodes"), *rows_with("rollout/decisions")]
    stopped = dict(getattr(run, "summary", {})).get("stopped_by")  # by W&B itself: that is no failure there
    status = "complete" if run.state == "finished" else f"W&B state {run.state}"
    status = f"stopped by {_text(stopped)}" if run.state == "finished" and stopped else status
    config = dict(run.config)
    name = f"{config['trainer.exp_name']}-{run.id}" if "trainer.exp_name" in config else run.name  # as its folder
    try:
        found = _make_run(name, status, config, [*evaluations, *rollouts])
        if found.complete and found.eval_steps:
            _add_wandb_episodes(found, run)
    except UserError as error:
        return _unreadable(name, error)
    found.url, found.code = _text(getattr(run, "url", "")), _text(getattr(run, "commit", ""))[:9]
    found.started = _text(getattr(run, "created_at", ""))[:16].replace("T", " ")
    found.machine = _text(getattr(run, "summary", {}).get("machine"))
    return _judged(found)


def _given_up(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Numbers of the rows that a run logged before it went back to an earlier checkpoint, and of what came after that.

    Its folder drops them; W&B keeps what it has. Where a row is of an earlier env step than one before it, the run has
    gone back to where that one is no part of.
    """
    kept: list[tuple[float, int]] = []
    gone: set[int] = set()
    for row in sorted(rows, key=lambda row: row[LOGGED]):
        if not is_number(row["global_step"]):
            continue
        while kept and kept[-1][0] > row["global_step"]:
            gone.add(kept.pop()[1])
        kept.append((row["global_step"], row[LOGGED]))
    return gone


def _add_wandb_episodes(found: Run, run: Any) -> None:
    """The single episodes of a run on W&B, where it left them there."""
    with TemporaryDirectory() as path:
        folder = RunFolder(path)
        for file in run.files(names=[folder.episodes.name]):
            file.download(root=path).close()
        if folder.episodes.is_file():
            _add_episodes(found, folder)


def _make_run(name: str, status: str, config: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Run:
    """A run without its single episodes.

    Raises:
        UserError: a configuration that is none of `ppo_vla.py`.
    """
    try:
        config = flatten_dict(config)
    except RecursionError:
        raise UserError("config.json: nested too deeply") from None
    scope, _ = split_switches(_scope(config), _switches(config))
    name_of_scope = scope if isinstance(scope, str) else "+".join(scope)
    count = _value(config, "trainer.num_eval_episodes", _WHOLE, lambda v: type(v) is int and 0 < v < 2**63)
    rows = [row for row in rows if is_number(row.get("global_step"))]
    told = {name for row in rows for name, value in row.items() if is_number(value)}
    unevaluated = "rollout/success_rate" in told and "eval/return" not in told  # trainer.enable_eval=false
    measure = "success" if "eval/success_rate" in told or unevaluated else "return"
    metric = MEASURES[measure].metric
    by_step = {row["global_step"]: row for row in rows if is_number(row.get(f"eval/{metric}"))}
    evaluations = [by_step[step] for step in sorted(by_step)]  # W&B keeps what a resumed run logs twice
    seconds = [row.get("time/elapsed_s") for row in evaluations]
    return Run(
        run=name,
        status=status,
        scope=name_of_scope,
        learning_rate=float(_value(config, "algorithm.cfg.learning_rate", "a number", is_number)),
        seed=_value(config, "trainer.seed", _WHOLE, lambda v: type(v) is int),
        environment=_value(config, "trainer.env", _TEXT, lambda v: isinstance(v, str) and v),
        env_config={
            k.removeprefix("trainer.env_config."): v for k, v in config.items() if k.startswith("trainer.env_config.")
        },
        states=f"0-{count - 1}" if count > 1 else "0",
        measure=measure,
        training_score=_training_score(rows, metric),
        eval_steps=[float(row["global_step"]) for row in evaluations],
        eval_seconds=[float(second) if is_number(second) else math.nan for second in seconds],
        eval_scores=[float(row[f"eval/{metric}"]) for row in evaluations],
        episodes=[""] * len(evaluations),
        iteration_steps=_iteration_steps(rows),
        anneal_lr=anneal if isinstance(anneal := config.get("algorithm.cfg.anneal_lr"), bool) else None,
        settings=settings_of(config, name_of_scope),
    )


def _value(config: Mapping[str, Any], key: str, kind: str, right: Any) -> Any:
    """A value of a configuration; UserError where it is missing, or not `right`."""
    if key not in config:
        raise UserError(f"not a run of ppo_vla.py: its config has no {key}")
    if not right(config[key]):
        raise UserError(f"config.json: {key} is {str(config[key])[:80]!r}, not {kind}")
    return config[key]


def _scope(config: Mapping[str, Any]) -> str | list[str]:
    def right(scope: Any) -> bool:
        return isinstance(scope, str) or (isinstance(scope, list) and all(isinstance(name, str) for name in scope))

    return _value(config, "policy.freeze", "a scope or a list of names", right)


def _switches(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(f"policy.vla_config.model_config.{name}", False) for name in FREEZE_SWITCHES}


def _training_score(rows: Iterable[Mapping[str, Any]], metric: str) -> float:
    """Mean score of the training episodes in the last tenth of the env steps; NaN where there are none."""
    rollouts = {row["global_step"]: row for row in rows if is_number(row.get(f"rollout/{metric}"))}
    last = max(rollouts, default=0)
    late = [row for step, row in rollouts.items() if step > 0.9 * last]
    weights = [row.get("rollout/episodes", 1) for row in late]
    if not all(is_number(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        return math.nan
    return float(np.average([row[f"rollout/{metric}"] for row in late], weights=weights))


def _iteration_steps(rows: Iterable[Mapping[str, Any]]) -> float:
    """Env steps of the longest iteration, where they are not the decisions that it took; else NaN."""
    steps = sorted({row["global_step"] for row in rows if "rollout/decisions" in row})
    return float(max(b - a for a, b in pairwise([0, *steps]))) if steps else math.nan
