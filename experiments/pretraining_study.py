"""What pretraining is worth: a vision encoder with ImageNet's weights or fresh ones, that stays as it is or is trained.

    python experiments/pretraining_study.py                 # goes on where it stopped
    python experiments/pretraining_study.py --arms random+frozen --seeds 0 --ppo_env_steps 0
    python experiments/pretraining_study.py --show --table=experiments/results/pretraining/runs.csv  # as measured

A run is `bc_vla.py` on the demonstrations of its seed, which are the same in every arm, and then `ppo_vla.py` from that
clone. Both are evaluated on the same held-out states, by mode and by samples. A row per run and evaluation is added to
--table as soon as it is there; what has its rows, and its weights below --folder, is not run again. What the first row
of a stage was made with is kept beside the table, in settings.json: other settings are refused, as their rows would be
compared with these.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import packages  # noqa: F401

import numpy as np

from research.errors import UserError
from research.progress_bar import ProgressBar
from research.runs.folder import RunFolder, read_rows
from research.runs.tracking import read_metrics
from research.study.statistics import difference_interval, mean_interval

HERE = Path(__file__).parent
ARMS = tuple("+".join(arm) for arm in product(("imagenet", "random"), ("frozen", "trained")))
MODES = ("mode", "sample")
CLONING = "--episodes=40 --steps=700 --batch_size=64 --max_eval_steps=200"
COLUMNS = ("stage", "arm", "seed", "mode", "success", "seconds", "env_steps", "outcomes")


class Row(NamedTuple):
    """One evaluation of one run.

    Attributes:
        stage: "clone" or "ppo".
        outcomes: 1 or 0 for each initial state from 0 on.
    """

    stage: str
    arm: str
    seed: int
    mode: str
    success: float
    seconds: float
    env_steps: int
    outcomes: str


def main(argv: list[str] | None = None) -> int:
    options = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        if not options.show:
            run_what_is_missing(options)
        print(tables(read_table(options.table)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all of %(choices)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    add("--cloning", default=CLONING, metavar="FLAGS", help="default %(default)s")
    add("--ppo", default="", metavar="FLAGS", help="as in --ppo='--trainer.num_envs=8'")
    add("--ppo_env_steps", type=int, default=200_000, help="budget of PPO, 0 for none, default %(default)s")
    add("--episodes", type=int, default=150, help="held-out states, default %(default)s")
    add("--table", type=Path, default=Path("runs/pretraining/runs.csv"), help="rows, default %(default)s")
    add("--folder", type=Path, default=Path("runs/pretraining"), help="weights and runs, default %(default)s")
    add("--show", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def run_what_is_missing(options: argparse.Namespace) -> None:
    """Every seed of every arm, the arms by turns, so that a study that is stopped early is a balanced one."""
    check_settings(options)
    for seed, arm in ProgressBar(list(product(options.seeds, options.arms)), unit="run"):
        weights = options.folder.absolute() / f"{arm.replace('+', '_')}_{seed}.safetensors"
        if not (is_there(options.table, "clone", arm, seed) and weights.exists()):
            imitate(options, arm, seed, weights)
        if options.ppo_env_steps and not is_there(options.table, "ppo", arm, seed):
            reinforce(options, arm, seed, weights)


def check_settings(options: argparse.Namespace) -> None:
    """Write down what the rows of each stage are made with.

    Raises:
        UserError: there are rows that were made otherwise.
    """
    now = {"clone": {"flags": options.cloning, "config": configuration("metaworld_bc"), "episodes": options.episodes}}
    if options.ppo_env_steps:
        now["ppo"] = {"flags": options.ppo, "config": configuration("metaworld"), "env_steps": options.ppo_env_steps}
    file = options.table.with_name("settings.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    for stage, settings in now.items():
        for name, value in settings.items():
            if stage in before and before[stage].get(name) != value:
                raise UserError(
                    f"{options.table}: {name} of its {stage} rows was {json.dumps(before[stage].get(name))} and is now "
                    f"{json.dumps(value)}; set it as it was, or give --table a folder of its own"
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(before | now, indent=2) + "\n")


def configuration(name: str) -> dict:
    return json.loads((HERE / "configs" / f"{name}.json").read_text())


def frozen_parts(arm: str) -> str:
    return json.dumps(["language_encoder", *(["vision_encoder"] if arm.endswith("frozen") else [])])


def vision_weights(arm: str) -> dict[str, None]:
    return {"vision_weights": None} if arm.startswith("random") else {}


def imitate(options: argparse.Namespace, arm: str, seed: int, weights: Path) -> None:
    run(
        "bc_vla.py", "--config", HERE / "configs" / "metaworld_bc.json", f"--freeze={frozen_parts(arm)}",
        f"--model_config={json.dumps(vision_weights(arm))}", f"--seed={seed}", f"--output={weights}",
        f"--eval_episodes={options.episodes}", *shlex.split(options.cloning),
    )  # fmt: skip
    facts = json.loads(weights.with_suffix(".json").read_text())
    episodes = read_rows(weights.with_suffix(".jsonl"))
    append(options.table, [summed_up("clone", arm, seed, m, facts["seconds"], 0, episodes) for m in MODES])


def reinforce(options: argparse.Namespace, arm: str, seed: int, weights: Path) -> None:
    name = f"{weights.stem}_ppo"
    if begun := run_of(options.folder, name):
        run("ppo_vla.py", f"--trainer.resume={begun}")
    else:
        run(
            "ppo_vla.py", "--config", HERE / "configs" / "metaworld.json", f"--policy.freeze={frozen_parts(arm)}",
            f"--policy.vla_config.model_path={weights}", f"--trainer.seed={seed}", f"--trainer.exp_name={name}",
            f"--policy.vla_config.model_config={json.dumps(vision_weights(arm))}",
            f"--trainer.run_dir={options.folder}", f"--trainer.max_env_steps={options.ppo_env_steps}",
            f"--trainer.num_eval_episodes={options.episodes}", *shlex.split(options.ppo),
        )  # fmt: skip
    folder = RunFolder(run_of(options.folder, name))
    output = options.folder / f"{name}_sample"
    run(
        "evaluate_vla.py", f"--checkpoint={folder}", f"--output={output}", "--trainer.eval_mode=sample",
        f"--trainer.num_eval_episodes={options.episodes}", "--film=0",
    )  # fmt: skip
    last = read_metrics(folder)[-1]
    of_run = [row for row in read_rows(folder.episodes) if row["global_step"] == last["global_step"]]
    episodes = [row | {"mode": "mode"} for row in of_run]
    episodes += [row | {"mode": "sample"} for row in read_rows(RunFolder(output).episodes)]
    seconds, env_steps = last["time/elapsed_s"], last["global_step"]
    append(options.table, [summed_up("ppo", arm, seed, mode, seconds, env_steps, episodes) for mode in MODES])


def run_of(folder: Path, name: str) -> Path | None:
    """The folder of a run that has a checkpoint to go on from; one that was killed before its first is left alone."""
    begun = [one for one in folder.glob(f"{name}-*") if any((one / "checkpoints").glob("step_*"))]
    return begun[0] if begun else None


def run(script: str, *words: object) -> None:
    command = [sys.executable, str(HERE / script), *map(str, words)]
    if (code := subprocess.run(command).returncode) != 0:
        raise UserError(f"{script} ended with exit code {code}: {' '.join(command)}")


def summed_up(
    stage: str, arm: str, seed: int, mode: str, seconds: float, env_steps: int, episodes: Sequence[dict]
) -> Row:
    """The evaluation of a run by one mode, its episodes in the order of their initial states."""
    chosen = sorted((e for e in episodes if e["mode"] == mode), key=lambda e: e["initial_state"])
    outcomes = [int(e["success"]) for e in chosen]
    if [e["initial_state"] for e in chosen] != list(range(len(chosen))) or not chosen:
        raise UserError(f"{stage} of {arm}, seed {seed}: not one episode of each initial state from 0 on")
    return Row(
        stage, arm, seed, mode, round(float(np.mean(outcomes)), 4), round(seconds), env_steps,
        "".join(map(str, outcomes)),
    )  # fmt: skip


def append(table: Path, rows: Sequence[Row]) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def read_table(table: Path) -> list[Row]:
    """Rows of the table.

    Raises:
        UserError: there is none yet.
    """
    if not table.exists():
        raise UserError(f"{table}: no table yet; run without --show")
    with table.open(newline="") as file:
        return [
            Row(r["stage"], r["arm"], int(r["seed"]), r["mode"], float(r["success"]), float(r["seconds"]),
                int(r["env_steps"]), r["outcomes"])
            for r in csv.DictReader(file)
        ]  # fmt: skip


def is_there(table: Path, stage: str, arm: str, seed: int) -> bool:
    rows = read_table(table) if table.exists() else []
    return len([row for row in rows if (row.stage, row.arm, row.seed) == (stage, arm, seed)]) == len(MODES)


def scores(rows: Sequence[Row], stage: str, arm: str, mode: str) -> np.ndarray:
    """Outcomes `[seeds, states]`."""
    chosen = [row for row in rows if (row.stage, row.arm, row.mode) == (stage, arm, mode)]
    return np.array([[int(outcome) for outcome in row.outcomes] for row in chosen], dtype=float)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: success of every arm, and what ImageNet's weights add, as far as there are runs."""
    lines = ["| stage | evaluated by | vision encoder | ImageNet | random | ImageNet less random | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for stage, mode, vision in product(("clone", "ppo"), MODES, ("frozen", "trained")):
        both = [scores(rows, stage, f"{weights}+{vision}", mode) for weights in ("imagenet", "random")]
        if not all(map(len, both)):
            continue
        cells = [interval(mean_interval(one)) for one in both]
        cells.append(interval(difference_interval(*both)))
        seeds = " and ".join(dict.fromkeys(str(len(one)) for one in both))
        lines.append(f"| {stage} | {mode} | {vision} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def interval(estimate) -> str:
    spread = f" [{estimate.low:.3f}, {estimate.high:.3f}]" if estimate.has_interval else ""
    return f"{estimate.value:.3f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
