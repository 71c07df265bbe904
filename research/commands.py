"""The commands that pip installs: each runs the script of `experiments/` that it is named after, as python would.

The scripts import their neighbours by plain name, and processes that they start import them again. So the folder goes
to the front of the path, and the script runs as `__main__`.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"  # beside this package: in a checkout, and in a wheel


def ppo() -> None:
    """vla-ppo: fine-tune a VLA with PPO."""
    _run("ppo_vla.py")


def grpo() -> None:
    """vla-grpo: the same with GRPO, RLOO or Dr. GRPO."""
    _run("grpo_vla.py")


def bc() -> None:
    """vla-bc: imitate an expert, or demonstrations."""
    _run("bc_vla.py")


def evaluate() -> None:
    """vla-evaluate: success of a checkpoint, from fixed initial states."""
    _run("evaluate_vla.py")


def export() -> None:
    """vla-export: the weights of a run in one file, or in the family's own folder."""
    _run("export_vla.py")


def sweep() -> None:
    """vla-sweep: the runs of a W&B sweep file, without a W&B server."""
    _run("sweep_local.py")


def compare() -> None:
    """vla-compare: the report of many runs."""
    _run("compare_runs.py")


def called() -> str | None:
    """The name of the command that this process was started by; None where it was a script itself."""
    return _called


def as_called(text: str) -> str:
    """A text that names scripts to run; where an installed command started this process, it names commands instead.

    Whoever stands in a folder of their own, or installed the package alone, has no `experiments/` there.
    """
    if _called is None:
        return text
    text = re.sub(r"(?:python )?experiments/([a-z]+)_(?:vla|local|runs)\.py", r"vla-\1", text)
    return re.sub(r"(torchrun (?:--\S+ \d+ )+)(?=vla-)", r"\1--no-python ", text)


_called: str | None = None


def _run(script: str) -> None:
    global _called
    _called = Path(sys.argv[0]).name
    sys.path.insert(0, str(SCRIPTS))
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
