"""What tests of local sweeps share: a script that leaves what a run leaves, and sweeps in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from worlds import ROOT

# What ppo_vla.py does to a run folder, in a moment. Success is 1 / (1 + |rate - 1|), so the best rate is 1.
SCRIPT = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
flags = dict(word[2:].split("=", 1) for word in words)
rate, iterations = float(flags["algorithm.cfg.learning_rate"]), int(flags.get("trainer.iterations", 3))
if Path("refuse").exists() and rate == 7:
    sys.exit("error: rate 7 is refused") or 2
name = flags.get("trainer.exp_name", "pick_place_ppo") + "-" + os.environ["WANDB_RUN_ID"]
folder = Path(flags.get("trainer.resume") or Path(flags["trainer.run_dir"], name))
checkpoint, metrics = folder / "checkpoints" / "last.pt", folder / "metrics.jsonl"
checkpoint.parent.mkdir(parents=True, exist_ok=True)
resumed = "trainer.resume" in flags
if metrics.exists() and not resumed:
    sys.exit(f"{folder} is in the way")
done = int(checkpoint.read_text()) if resumed else 0
rows = metrics.read_text().splitlines()[:done] if resumed else []
metrics.write_text("".join(row + "\\n" for row in rows))
if "WITNESS" in os.environ:  # a file that two processes of one run cannot both lock
    witness = open(os.path.join(os.environ["WITNESS"], os.environ["WANDB_RUN_ID"]), "w")
    try:
        fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path(os.environ["WITNESS"], "twice").touch()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with (folder / "starts.jsonl").open("a") as file:
    threads = os.environ["OMP_NUM_THREADS"]
    file.write(json.dumps({"time": time.time(), "words": words, "threads": threads, "from": done}) + "\\n")
meet, begun = int(os.environ.get("MEET", 1)), lambda: len(list(folder.parent.glob("*/starts.jsonl")))
together, latest = -(-begun() // meet) * meet, time.monotonic() + 60  # goes on once that many runs have begun
while begun() < together and time.monotonic() < latest:
    time.sleep(0.01)
if rate == 13:
    sys.exit("loss is nan")
while done < iterations and not asked:
    time.sleep(float(os.environ.get("PACE", 0)))
    done += 1
    with metrics.open("a") as file:
        file.write(json.dumps({"global_step": done, "eval/success_rate": 1 / (1 + abs(rate - 1)) * done / 100}) + "\\n")
    checkpoint.write_text(str(done))
    if rate == 17 and done == 2 and not Path("mended").exists():
        (folder / "summary.json").write_text(json.dumps({"exit_code": 1, "stopped_by": "simulator"}))
        sys.exit("physics exploded")
code = 143 if asked else 0
(folder / "summary.json").write_text(json.dumps({"exit_code": code, "ended": time.time()}))
sys.exit(code)
""".replace('sys.exit("error: rate 7 is refused") or 2', 'print("error: rate 7 is refused"); sys.exit(2)')


def wait_for(condition, seconds=900, alive: tuple[subprocess.Popen, ...] = ()):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        for process in alive:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def in_background(*argv, pace=0.2, cwd: Path | None = None) -> subprocess.Popen:
    """`sweep_local.py` in a process group of its own, in a folder that may stand for another machine."""
    command = [sys.executable, str(ROOT / "experiments" / "sweep_local.py"), *argv]
    environment = {**os.environ, "PACE": str(pace), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd,
        start_new_session=True,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]
