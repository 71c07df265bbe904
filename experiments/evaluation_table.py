"""The evaluations of some runs as one table, a row for each: what is committed and shown of a study of few runs.

    python experiments/evaluation_table.py runs/metaworld-* --output=experiments/results/metaworld/runs.csv

A row has the run's seed, control steps and minutes so far, success with its interval over the held-out states, success
of each task where there are several, and success while sampling: of the training episodes over the last --window
control steps. Written as CSV, and printed as Markdown; the evaluation at the start, before any training, comes first.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import packages  # noqa: F401

from research.errors import UserError
from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

SUCCESS, SAMPLED = "eval/success_rate", "rollout/success_rate"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, help="CSV file; none = printed only")
    parser.add_argument("--window", type=int, default=60_000, help="control steps, default %(default)s")
    options = parser.parse_args(argv)
    try:
        rows = [row for run in options.runs for row in rows_of(run, options.window)]
        rows.sort(key=lambda row: (row["seed"], row["env_steps"]))
        if not rows:
            raise UserError(f"{', '.join(map(str, options.runs))}: no evaluation in any of them")
        if options.output:
            write(rows, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_markdown(rows))
    return 0


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
        sampled = [m[SAMPLED] for m in metrics if SAMPLED in m and at - window < m["global_step"] <= at]
        rows.append(
            {
                "seed": seed, "env_steps": at, "minutes": round(now["time/elapsed_s"] / 60, 1), **tasks,
                "success": round(now[SUCCESS], 3), "low": round(now["eval/success_low"], 3),
                "high": round(now["eval/success_high"], 3),
                "sampling": round(statistics.mean(sampled), 3) if sampled else "",
            }
        )  # fmt: skip
    return rows


def write(rows: Sequence[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def as_markdown(rows: Sequence[dict]) -> str:
    tasks = [
        name for name in rows[0] if name not in ("seed", "env_steps", "minutes", "success", "low", "high", "sampling")
    ]
    lines = [f"| {' | '.join(['seed', 'control steps', *tasks, 'all, 95 % interval', 'while sampling', 'minutes'])} |"]
    lines.append("|---" * (len(tasks) + 5) + "|")
    for row in rows:
        cells = [
            row["seed"], f"{row['env_steps']:,}", *(f"{row[task]:.2f}" for task in tasks),
            f"{row['success']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['sampling']:.3f}" if row["sampling"] != "" else "", row["minutes"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
