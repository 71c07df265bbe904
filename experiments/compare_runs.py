"""Compare runs: which freeze scope, or which value of any option, is best, and what the seeds can tell.

    python experiments/compare_runs.py runs                                 # all run folders below runs/
    python experiments/compare_runs.py "runs/vision-*" runs/none-*          # folders and globs
    python experiments/compare_runs.py --wandb=entity/project/sweep_id      # a W&B sweep, or entity/project
    python experiments/compare_runs.py --table=comparison/runs.csv          # again, from the table alone

Runs are compared by freeze scope, each at its own best learning rate, or by other options, or combinations of some:
    python experiments/compare_runs.py runs --by=algorithm.name
    python experiments/compare_runs.py runs --by=policy.vla_config.model_path        # start checkpoints
    python experiments/compare_runs.py runs --by policy.vla_config.model_class policy.freeze
    python experiments/compare_runs.py runs --by algorithm algorithm.cfg.advantage   # algorithms, recipes and all
Runs that differ in anything else are refused; of such a folder or sweep, one part after the other can be compared:
    python experiments/compare_runs.py runs --where policy.vla_config.model_path=a.pt trainer.num_envs=64
Where each was given the iterations that fit one time, schedule included, they are compared at equal wall time, or, if
other work stretched the times, each at its own end:
    python experiments/compare_runs.py runs --equal=seconds
    python experiments/compare_runs.py runs --equal=ends

Splits are compared too, where each run was evaluated in them:
    python experiments/evaluate_vla.py --checkpoint=runs/<run> --split=all --output=runs/<run>/splits

A learning rate is best chosen by deterministic success on states that are not reported, on seeds of its own:
    python experiments/evaluate_vla.py --checkpoint=runs/<run> --first_state=256 --output=runs/<run>/choosing
    python experiments/compare_runs.py runs --choosing_seeds 1 2 3
Where --evaluation=choosing reports that very evaluation, to see which rates to take, each rate chosen is the best in
it, and its success flatters. Whatever else is reported, <run>/choosing chooses.

Instead of by their own last evaluation, runs are compared by another one of what they came to: more states, sampled
actions, or tasks that they did not train, which shows what was forgotten:
    python experiments/evaluate_vla.py --checkpoint=runs/<run> --trainer.env_config.task=drawer-close-v3 \\
        --output=runs/<run>/other_task
    python experiments/compare_runs.py runs --evaluation=other_task

Scores are success, or return where the environment has no success. Writes into --output: report.md, report.html (one
file: figures, sortable tables, videos), curves.png, success.png or return.png, heatmap.png, and runs.csv, from which
--table recomputes every number. Runs of different environments, evaluated from different initial states, otherwise, or
before they were resumed, are refused; runs that crashed, or whose files cannot be read, are listed and left out of all
means.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import packages  # noqa: F401

from research.commands import as_called, called
from research.errors import UserError, one_line
from research.study.comparison import compare
from research.study.report import write_report
from research.study.run_sources import read_folders, read_wandb
from research.study.run_table import read_table
from research.study.tables import ranking


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called(), description=as_called(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="run folders, folders that hold some, globs")
    parser.add_argument("--wandb", metavar="PATH", help="entity/project/sweep_id or entity/project, instead of folders")
    parser.add_argument("--table", metavar="CSV", help="a runs.csv that this script wrote, instead of folders")
    parser.add_argument(
        "--evaluation", metavar="NAME", help="compare by what evaluate_vla.py wrote to <run>/NAME, see above"
    )
    parser.add_argument("--output", default="comparison", help="folder to write, default comparison")
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="OPTION", help="dotted options that are compared, default policy.freeze"
    )
    parser.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="OPTION=VALUE",
        help="compare only runs whose dotted options have these values; of one option, any of them",
    )  # fmt: skip
    parser.add_argument(
        "--equal", choices=["steps", "seconds", "ends"], default="steps",
        help="compare at equal env steps (default), at equal wall time, or each run at its own end",
    )  # fmt: skip
    parser.add_argument(
        "--choose_on", choices=["training", "states", "other_states", "evaluation"],
        help="what chooses a learning rate: training success or return, every other evaluation state, the episodes of "
        "<run>/choosing, see above, or the very evaluation that is reported; default: the episodes of <run>/choosing "
        "where all runs that choose have them (reported ones with --evaluation=choosing), else training",
    )  # fmt: skip
    parser.add_argument(
        "--choosing_seeds", type=int, nargs="+", default=[], metavar="SEED",
        help="seeds that only choose the learning rate; the report is from the others",
    )  # fmt: skip
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    try:
        if sum(map(bool, (options.runs, options.wandb, options.table))) != 1:
            raise UserError("name run folders, or --wandb, or --table: exactly one of the three")
        if options.evaluation is not None and not options.runs:
            raise UserError("--evaluation is read from run folders: name them")
        if options.wandb:
            runs = read_wandb(options.wandb)
        else:
            runs = read_table(options.table) if options.table else read_folders(options.runs, options.evaluation)
        comparison = compare(runs, options.choose_on, options.choosing_seeds, options.by, options.equal, options.where)
        command = as_called(f"python experiments/compare_runs.py {shlex.join(argv)}")
        write_report(comparison, Path(options.output), command)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print("\n".join(ranking(comparison)))
    print(f"report: {options.output}/report.html and report.md; the numbers again: --table={options.output}/runs.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
