"""The evaluations of some runs as one table, a row for each: what is committed and shown of a study of few runs.

    python experiments/evaluation_table.py runs/metaworld-* --output=experiments/results/metaworld/runs.csv

A row has the run's seed, control steps and minutes so far, success with its interval over the held-out states, success
of each task where there are several, and success while sampling: of the training episodes over the last --window
control steps. Where several runs have one seed, the run's name is its first column. Written as CSV, and printed as
Markdown; the evaluation at the start, before any training, comes first.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import packages  # noqa: F401

from research.errors import UserError
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

SUCCESS, SAMPLED = "eval/success_rate", "rollout/success_rate"
# Columns; those of tasks, where a run has several, lie between.
BEFORE_TASKS, BEHIND_TASKS = ("seed", "env_steps", "minutes"), ("success", "low", "high", "sampling")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, help="CSV file; none = printed only")
    parser.add_argument("--window", type=int, default=60_000, help="control steps, default %(default)s")
    options = parser.parse_args(argv)
    try:
        rows = table_of(options.runs, options.window)
        if options.output:
            write(rows, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_markdown(rows))
    return 0


def table_of(runs: Sequence[Path], window: int) -> list[dict]:
    """The rows of all runs, by seed, run and control steps, with the same columns each: "" where a run has no value.

    Raises:
        UserError: what is no run folder, or no run that evaluated success.
    """
    of_runs = {run: rows_of(run, window) for run in dict.fromkeys(runs)}
    names = ", ".join(str(run) for run, rows in of_runs.items() if not rows)
    if not any(of_runs.values()):
        evaluated = any("eval/return" in row for run in of_runs for row in read_metrics(RunFolder(run)))
        what = "no success in their evaluations, only return: compare_runs.py shows that" if evaluated else ""
        raise UserError(f"{names}: {what or 'no evaluation in any of them'}")
    if names:
        print(f"note: not in the table, as without success in an evaluation: {names}", file=sys.stderr)
    found = [(run, row) for run, rows in of_runs.items() for row in rows]
    found.sort(key=lambda each: (each[1]["seed"], str(each[0]), each[1]["env_steps"]))
    tasks = [name for _, row in found for name in row if name not in (*BEFORE_TASKS, *BEHIND_TASKS)]
    columns = (*BEFORE_TASKS, *dict.fromkeys(tasks), *BEHIND_TASKS)
    several = len({row["seed"] for _, row in found}) < len({run for run, _ in found})
    return [
        ({"run": run.resolve().name} if several else {}) | {name: row.get(name, "") for name in columns}
        for run, row in found
    ]


def rows_of(run: Path, window: int) -> list[dict]:
    """A row for each evaluation of a run.

    Raises:
        UserError: it is no run folder.
    """
    folder = RunFolder(run)
    if not folder.is_run:
        raise UserError(f"{run} is no run folder: it lacks config.json or checkpoints")
    metrics = read_metrics(folder)
    seed, rows = json.loads(folder.config.read_text())["trainer"]["seed"], []
    for now in metrics:
        if SUCCESS not in now:
            continue
        at, tasks = (
            now["global_step"],
            {k.removeprefix(f"{SUCCESS}/"): now[k] for k in now if k.startswith(f"{SUCCESS}/")},
        )
        late = [m for m in metrics if SAMPLED in m and at - window < m["global_step"] <= at]
        episodes = [m.get("rollout/episodes", 1) for m in late]
        sampled = sum(m[SAMPLED] * n for m, n in zip(late, episodes, strict=True)) / sum(episodes) if late else None
        rows.append(
            {
                "seed": seed, "env_steps": at, "minutes": round(now["time/elapsed_s"] / 60, 1), **tasks,
                "success": round(now[SUCCESS], 3), "low": round(now["eval/success_low"], 3),
                "high": round(now["eval/success_high"], 3),
                "sampling": "" if sampled is None else round(sampled, 3),
            }
        )  # fmt: skip
    return rows


def write(rows: Sequence[dict], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--output: cannot write to {path}: {error.strerror}") from error


def as_markdown(rows: Sequence[dict]) -> str:
    tasks = [name for name in rows[0] if name not in ("run", *BEFORE_TASKS, *BEHIND_TASKS)]
    runs = ["run"] if "run" in rows[0] else []
    header = [*runs, "seed", "control steps", *tasks, "all, 95 % interval", "while sampling", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [
            *(row[name] for name in runs), row["seed"], f"{row['env_steps']:,}",
            *(f"{row[task]:.2f}" if row[task] != "" else "" for task in tasks),
            f"{row['success']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['sampling']:.3f}" if row["sampling"] != "" else "", row["minutes"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
