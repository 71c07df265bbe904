"""One process against two of every kind, as whole runs of the main script: what `throughput/model.py` is checked with.

    python experiments/throughput/processes.py                          # a quarter of an hour, on two quiet cores
    python experiments/throughput/processes.py --kinds=torchrun,gym_workers --turns=1

Every process computes on one thread, where nothing else is said. Measured are iterations after the first two, by turns;
a row of the table is the median of its turns. Kinds:

| kind          | what there are one or two of                                                                       |
|---------------|----------------------------------------------------------------------------------------------------|
| torchrun      | processes of `torchrun` on the main job, its batch divided; `half` is one process with half of it, |
|               | `beside` the same while another such run, which it knows nothing of, has the other core            |
| threads       | one process with two threads, and two processes of torchrun                                        |
| sharded       | two processes of torchrun both times, and with `trainer.sharding=full`                             |
| gym_workers   | processes that simulate (`env_config.workers`), 2 ms a step, while the main process waits for them |
| processes     | processes that collect (`trainer.buffer_type=vla`), 2 ms a step; the update runs beside them       |
| ray           | the same by Ray (`trainer.collector=ray`)                                                          |
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

EXPERIMENTS = Path(__file__).resolve().parents[1]
TABLE = EXPERIMENTS / "results" / "throughput" / "processes.csv"
ENVS, STEPS, STEP_S = 32, 32, 0.002  # of the runs with slow simulators, and what a step of these takes of a core


class Kind(NamedTuple):
    """Runs with one and with two of something: how many processes torchrun starts, and flags.

    `half` is one process with half of the work; it also runs twice at a time, see `beside`. `zero` has none of them.
    """

    one: tuple[int, dict[str, object]]
    two: tuple[int, dict[str, object]]
    half: tuple[int, dict[str, object]] | None = None
    zero: tuple[int, dict[str, object]] | None = None


def main_job(share: float = 1.0, **more: object) -> dict[str, object]:
    sizes = {"trainer.num_envs": int(128 * share), "trainer.buffer_size": int(4096 * share)}
    return {**sizes, "algorithm.cfg.batch_size": int(4096 * share), "algorithm.cfg.value_warmup_iterations": 0, **more}


def slow_simulator(**more: object) -> dict[str, object]:
    return {
        "trainer.env": "gym:throughput.burning:Burning", "trainer.num_envs": ENVS, "trainer.buffer_size": ENVS * STEPS,
        "policy.freeze": "vision", "algorithm.cfg.batch_size": 256, "algorithm.cfg.n_epochs": 2, **more,
    }  # fmt: skip


def elsewhere(collector: str, processes: int) -> dict[str, object]:
    return slow_simulator(
        **{"trainer.buffer_type": "vla", "trainer.collector": collector, "trainer.num_collectors": processes}
    )


KINDS = {
    "torchrun": Kind((1, main_job()), (2, main_job()), (1, main_job(0.5))),
    "threads": Kind((1, main_job(**{"trainer.threads": 2})), (2, main_job())),
    "sharded": Kind((2, main_job()), (2, main_job(**{"trainer.sharding": "full"}))),
    "gym_workers": Kind(
        (1, slow_simulator(**{"trainer.env_config": '{"workers": 1}'})),
        (1, slow_simulator(**{"trainer.env_config": '{"workers": 2}'})),
        zero=(1, slow_simulator(**{"trainer.env_config": '{"workers": 0}'})),
    ),
    "processes": Kind((1, elsewhere("processes", 1)), (1, elsewhere("processes", 2))),
    "ray": Kind((1, elsewhere("ray", 1)), (1, elsewhere("ray", 2))),
}
MEASURED = ("time/env_steps_per_second", "time/collect_s", "time/update_s")


def measure(processes: int, flags: dict[str, object], iterations: int) -> dict[str, float]:
    """Medians over the iterations of one run, the first two left out."""
    with tempfile.TemporaryDirectory() as folder:
        config = EXPERIMENTS / "configs" / "pick_place.json"
        always = {
            "trainer.run_dir": folder, "trainer.iterations": iterations, "trainer.enable_eval": "false",
            "trainer.save_freq": 0, "trainer.use_wandb": "false", "trainer.progress_bar": "false", "trainer.threads": 1,
        }  # fmt: skip
        if "trainer.env" in flags:
            config = Path(folder) / "config.json"
            config.write_text(json.dumps({"policy": {"vla_config": {"model_config": {"modalities": ["rgb"]}}}}))
        launcher = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        )
        words = [f"--{name}={value}" for name, value in {**always, **flags}.items()]
        command = [sys.executable, *launcher, str(EXPERIMENTS / "ppo_vla.py"), "--config", str(config), *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "time/update_s" in row][2:]
    return {name: statistics.median(row[name] for row in rows) for name in MEASURED}


def beside(run: tuple[int, dict[str, object]], iterations: int) -> dict[str, float]:
    """The means of two equal runs that have nothing to do with each other, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: measure(*run, iterations), range(2)))
    return {name: statistics.mean(one[name] for one in both) for name in MEASURED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, separated by commas (all)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--iterations", type=int, default=14, help="of a run (14)")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput/processes.csv"), help="(%(default)s)")
    options = parser.parse_args()
    rows = []
    for kind in options.kinds.split(","):
        runs = {name: run for name, run in KINDS[kind]._asdict().items() if run is not None}
        turns = []
        for _ in range(options.turns):
            turns.append({name: measure(*run, options.iterations) for name, run in runs.items()})
            if KINDS[kind].half is not None:
                turns[-1]["beside"] = beside(KINDS[kind].half, options.iterations)
        for name in turns[0]:
            medians = {m.removeprefix("time/"): statistics.median(turn[name][m] for turn in turns) for m in MEASURED}
            rows.append({"kind": kind, "run": name, **{m: f"{value:.5g}" for m, value in medians.items()}})
            print(rows[-1], flush=True)
        rates = [turn["two"]["time/env_steps_per_second"] / turn["one"]["time/env_steps_per_second"] for turn in turns]
        print(
            f"{kind}: two against one {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})", flush=True
        )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
