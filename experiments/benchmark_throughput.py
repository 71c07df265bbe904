"""How fast PPO on a VLA is here: our loop, Stable-Baselines3, TorchRL's own recipe and the floor, in one table.

    python experiments/benchmark_throughput.py                              # the 0.15 M-parameter model on tabletop
    python experiments/benchmark_throughput.py --model=resnet18 --rows="sb3/*,ours/backbone/*"
    python experiments/benchmark_throughput.py --model=resnet18 --rows="torchrl/*" --append     # into the same table
    python experiments/benchmark_throughput.py --scaling                    # against envs, model size and processes
    python experiments/benchmark_throughput.py --device=cuda                # 1,024 envs, 224 pixels, 381 M parameters

A row is loop/freeze/precision/buffer, as in ours/backbone/bf16/standard. Loops are `sb3`, `torchrl`, `ours`, and the
`floor` of each row of ours: the least that must be computed, timed alternating with it. `freeze` is none, vision,
backbone (all but the heads), or residual, of ours alone; the precision fp32 or bf16, either also -compiled; the buffer
`trainer.buffer_type`. Peers, which offer nothing else, and the buffer vla run in fp32. Every row has the same
environment, sizes and initial weights, and a process of its own.

Into --output, by default runs/throughput in the working directory, go <model>-<env>-<device>.csv and .png, or
scaling-<env>-<device>.csv and .png, after every row. The tables that RESULTS.md shows are committed in
experiments/results/throughput; --output=experiments/results/throughput puts new ones in their place.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import packages  # noqa: F401

import torch
from scipy.stats import linregress
from throughput.figures import draw_scaling, draw_table, growth
from throughput.models import ENVIRONMENTS, MODELS
from throughput.row import Settings, run

from research.errors import UserError

SIZES = {  # by device: what is not said on the command line
    "cpu": {"model": "small", "num_envs": 64, "steps": 32, "batch_size": 512, "image_size": 64},
    "cuda": {"model": "gpt", "num_envs": 1024, "steps": 8, "batch_size": 256, "image_size": 224},
}
FREEZE, PRECISIONS = ("none", "vision", "backbone"), ("fp32", "fp32-compiled", "bf16", "bf16-compiled")
COLUMNS = {  # in the order of the CSV -> heading and format in the printed table, where it is there
    "row": ("row", "{}"),
    "env_steps_per_second": ("steps/s", "{:,.0f}"),
    "ratio_to_sb3": ("/ SB3", "{:.2f}"),  # with the same parts frozen
    "ratio_to_sb3_full": ("/ SB3 full", "{:.2f}"),  # with nothing frozen
    "ratio_to_torchrl": ("/ TorchRL", "{:.2f}"),
    "ratio_to_torchrl_full": None,
    "iteration_over_floor": ("time / floor", "{:.2f}"),  # median of the ratios of neighbouring iterations
    "iteration_s": None,
    "iteration_s_min": None,
    "iteration_s_max": None,
    "collect_s": ("collect s", "{:.3f}"),  # buffer vla: waiting for workers, and the correction for stale weights
    "update_s": ("update s", "{:.3f}"),
    "floor_s": None,
    "model_flops_per_second": ("FLOP/s", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),  # of the fastest large matrix product in that precision, in any row's process
    "peak_flops_per_second": None,
    "flops_per_collected_step": None,  # of all environments
    "flops_per_minibatch": None,  # of the whole update, by minibatches
    "flops_per_env_step": None,  # collection and update
    "peak_memory_mib": ("MiB", "{:,.0f}"),  # resident in the row's processes, or allocated on the GPU
    "bytes_per_transition": ("bytes/step", "{:,.0f}"),
}
WITHOUT_BF16 = ("DEFAULT", "NO AVX", "AVX2")
SAME_IN_A_TABLE = ("num_envs", "steps", "epochs", "batch_size", "image_size", "threads")
SCALING_COLUMNS = ("curve", "x", "seconds_per_env_step", "slope", "slope_stderr")


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        return scale(options) if options.scaling else compare(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_options(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has larger default sizes")
    add("--model", choices=[*MODELS], help="default small; on cuda gpt: ResNet-50 and GPT-2 medium")
    add("--model_config", type=json.loads, default={}, metavar="JSON", help="further arguments of the model")
    add("--env", choices=ENVIRONMENTS, default="tabletop", help="standin costs nothing")
    add("--rows", default="*", metavar="GLOBS", help="comma-separated globs over row names, default all")
    add("--append", action="store_true", help="keep the rows that the table already has")
    add("--scaling", action="store_true", help="time per env step against envs, model size and processes")
    add("--num_envs", type=int, help="default 64, on cuda 1024")
    add("--steps", type=int, help="per rollout and environment, default 32, on cuda 8")
    add("--batch_size", type=int, help="transitions per minibatch, default 512, on cuda 256")
    add("--image_size", type=int, help="pixels per side, default 64, on cuda 224")
    add("--epochs", type=int, default=4, help="passes over a rollout, default 4")
    add("--iterations", type=int, default=5, help="timed iterations, the median counts, default 5")
    add("--warmup", type=int, default=1, help="iterations before, default 1, and 2 more where something compiles")
    add("--num_collectors", type=int, default=1, help="processes of rows with buffer vla, default 1")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch threads, default %(default)s")
    add("--profile", action="store_true", help="also write where each row's time goes: profile-<row>.txt")
    add(
        "--output", type=Path, default=Path("runs") / "throughput",
        help="folder, default %(default)s; the committed tables are in experiments/results/throughput",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name, value in SIZES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, value in vars(options).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    if options.num_envs % options.num_collectors:
        raise UserError(f"--num_collectors: {options.num_collectors} does not divide --num_envs={options.num_envs}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU here; leave it out for the table of the CPU")
    return options


def settings_of(options: argparse.Namespace, row: str) -> Settings:
    common = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    file = options.output.absolute() / f"profile-{row.replace('/', '-')}.txt"
    return Settings(*row.split("/"), **(common | {"profile": str(file) if options.profile else None}))


def compare(options: argparse.Namespace) -> int:
    names = [f"{loop}/{scope}/fp32/standard" for loop in ("sb3", "torchrl") for scope in FREEZE]
    names += [f"ours/{scope}/{precision}/standard" for scope in (*FREEZE, "residual") for precision in PRECISIONS]
    names += [f"ours/{scope}/fp32/vla" for scope in FREEZE]
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in options.rows.split(","))]
    if not chosen:
        raise UserError(f"--rows: {options.rows!r} matches none of {', '.join(names)}")
    if any(name.startswith("sb3/") for name in chosen) and importlib.util.find_spec("stable_baselines3") is None:
        chosen = [name for name in chosen if not name.startswith("sb3/")]
        print("skipped: rows of Stable-Baselines3, which is not installed: pip install -e .[bench]")
    if options.rows == "*" and options.device == "cpu" and torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16:
        chosen = [name for name in chosen if "/bf16" not in name]
        print("skipped: rows in bf16, which this processor only imitates, many times slower: --rows='*/bf16*' has them")
    path = options.output / f"{options.model}-{options.env}-{options.device}.csv"
    rows = read_table(path) if options.append and path.exists() else []
    for name in SAME_IN_A_TABLE:
        if rows and rows[0][name] != str(getattr(options, name)):
            raise UserError(f"--append: the table has {name} = {rows[0][name]}, this run {getattr(options, name)}")
    print(f"{len(chosen)} rows, {options.threads} torch threads, table: {path}", flush=True)
    failures = 0
    for i, name in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {name}: ", end="", flush=True)
        measured = run(settings_of(options, name))
        if measured is None:
            failures += 1
            continue
        kept = [row for row in rows if row["row"] not in {new["row"] for new in measured}]
        rows = sorted(kept + measured, key=lambda row: names.index(row["row"].replace("floor", "ours")))
        compare_with_peers(rows)
        save_table(rows, path)
        now = measured[0]
        print(f"{now['env_steps_per_second']:,.0f} env steps/s, iterations of {now['iteration_s']:.2f} s", flush=True)
    if rows:
        draw_table(rows).savefig(path.with_suffix(".png"), dpi=150)
        print("\n".join(["", *format_table(rows), "", f"{path} and {path.with_suffix('.png').name}"]))
    return 1 if failures else 0


def compare_with_peers(rows: list[dict]) -> None:
    """Fill in the ratios to the peers, of rows that have them in their table, and to the table's fastest product."""
    for bf16 in (False, True):
        alike = [row for row in rows if row.get("mfu") and row["precision"].startswith("bf16") == bf16]
        for row in alike:
            row["peak_flops_per_second"] = max(other["peak_flops_per_second"] for other in alike)
            row["mfu"] = row["model_flops_per_second"] / row["peak_flops_per_second"]
    speed = {row["row"]: row["env_steps_per_second"] for row in rows}
    seconds = {row["row"]: row["iteration_s"] for row in rows}
    for row in rows:
        for peer in ("sb3", "torchrl"):
            for column, scope in ((f"ratio_to_{peer}", row["freeze"]), (f"ratio_to_{peer}_full", "none")):
                other = speed.get(f"{peer}/{scope}/fp32/standard")
                row[column] = row["env_steps_per_second"] / other if other else None
        floor = f"floor/{row['freeze']}/{row['precision']}/standard"
        if row["loop"] == "ours" and row["buffer"] == "vla" and floor in seconds:  # not timed by turns with it
            row |= {"floor_s": seconds[floor], "iteration_over_floor": row["iteration_s"] / seconds[floor]}


def save_table(rows: list[dict], path: Path, first: Sequence[str] = ()) -> None:
    columns = dict.fromkeys([*first, *COLUMNS, *Settings.__dataclass_fields__, *(key for row in rows for key in row)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns], restval="")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def read_table(path: Path) -> list[dict]:
    """Rows that `save_table` wrote; numbers are numbers again, and what is absent is None."""

    def value(name: str, text: str):
        if name in COLUMNS and name != "row":
            return float(text) if text else None
        return text

    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def format_table(rows: list[dict]) -> list[str]:
    shown = {name: look for name, look in COLUMNS.items() if look}
    cells = [[heading for heading, _ in shown.values()]]
    for row in rows:
        values = [(row.get(name), look) for name, (_, look) in shown.items()]
        cells.append(["" if value is None else look.format(value) for value, look in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return ["  ".join(line).rstrip() for line in lines]


def scale(options: argparse.Namespace) -> int:
    if options.model_config or options.append:
        raise UserError("--scaling chooses models by itself and starts a new table: leave out --model_config, --append")
    path = options.output / f"scaling-{options.env}-{options.device}.csv"
    rows, planned = [], scaling_points(options)
    print(f"{len(planned)} points, {options.threads} torch threads, table: {path}", flush=True)
    for i, (curve, key, settings) in enumerate(planned, 1):
        print(f"[{i}/{len(planned)}] {curve}: {settings.model} {settings.row}: ", end="", flush=True)
        measured = run(settings)
        if measured is None:
            continue
        row = measured[0]
        row |= {"curve": curve, "x": row[key], "seconds_per_env_step": 1 / row["env_steps_per_second"]}
        rows.append(row)
        fit_growth([row for row in rows if row["curve"] == curve])
        save_table(rows, path, SCALING_COLUMNS)
        print(f"{key} {row['x']:g}: {1e3 * row['seconds_per_env_step']:.3f} ms per env step", flush=True)
    if rows:
        draw_scaling(rows).savefig(path.with_suffix(".png"), dpi=150)
        for curve in dict.fromkeys(row["curve"] for row in rows):
            print(f"time per env step against {curve}: {growth(next(row for row in rows if row['curve'] == curve))}")
        print(f"{path} and {path.with_suffix('.png').name}")
    return 0 if len(rows) == len(planned) else 1


def scaling_points(options: argparse.Namespace) -> list[tuple[str, str, Settings]]:
    """(curve, the column it is against, what to measure)."""
    base = replace(settings_of(options, "ours/backbone/fp32/standard"), floor=False)
    largest = {"cpu": 1024, "cuda": 4096}[options.device]
    counts = [n for n in (1, 4, 16, 64, 256, 1024, 4096) if n <= largest]
    points = [("envs", "num_envs", replace(base, num_envs=n)) for n in counts]
    models = [("small", {"token_size": size, "hidden_size": 4 * size}) for size in (16, 32, 64, 128)]
    models += [(name, {}) for name in MODELS if name != "small" and (name != "gpt" or options.device == "cuda")]
    full = replace(base, freeze="none", steps=min(base.steps, 8))
    points += [("model size", "flops_per_env_step", replace(full, model=m, model_config=c)) for m, c in models]
    points += [("processes", "num_collectors", replace(base, buffer="vla", num_collectors=n)) for n in (1, 2)]
    return points


def fit_growth(rows: list[dict]) -> None:
    """Write the slope of log time over log x, and its standard error, into the rows of one curve."""
    if len({row["x"] for row in rows}) > 1:
        logs = [[math.log(row[key]) for row in rows] for key in ("x", "seconds_per_env_step")]
        fit = linregress(*logs)
        for row in rows:
            row |= {"slope": fit.slope, "slope_stderr": fit.stderr if len(rows) > 2 else None}


if __name__ == "__main__":
    sys.exit(main())
