"""Sees to it that `agents`, `envs` and `research` are this project's: imported before anything of theirs.

A folder of the same name further ahead on the path (the working directory under `python -m`, PYTHONPATH) would be taken
instead, and what a script then says is of no use to anyone. Nor is what TorchRL says where MuJoCo, which it imports,
does not know the MUJOCO_GL that is set. A script whose packages are in an extra of the project says which one, and one
whose reader has left, as `| head` does, goes on without.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# script -> the extra of pyproject.toml, and what of it the script cannot be imported without
EXTRAS = {
    "compare_runs.py": ("study", ("plotly",)),
    "wandb_report.py": ("study", ("plotly",)),
    "sweep_local.py": ("study", ("optuna", "sqlalchemy")),
}
KNOWN_BY = {"agents": "vla.py", "envs": "simulator.py", "research": "schema.py"}


def others_called(name: str) -> list[Path]:
    """Folders that would be imported under the name of a package of this project, and are not it."""
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return [place for place in places if not (place / KNOWN_BY[name]).is_file()]


def check_mujoco_gl() -> None:
    """End the script with one line where MuJoCo cannot be imported with the user's MUJOCO_GL."""
    if not os.environ.get("MUJOCO_GL") or importlib.util.find_spec("mujoco") is None:
        return
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # what OpenGL's bindings raise has no common class
        from research.errors import describe_error

        print(
            f"error: MUJOCO_GL: MuJoCo cannot be imported with {os.environ['MUJOCO_GL']!r} ({describe_error(error)}); "
            "unset it to let this be chosen, or install what it names",
            file=sys.stderr,
        )
        sys.exit(2)


def check_extras(script: str) -> None:
    """End a script with one line where a package of an extra that it needs is not installed."""
    extra, needed = EXTRAS.get(script, ("", ()))
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f"error: {script} needs {', '.join(absent)}, which a plain install leaves out; ", end="", file=sys.stderr)
        print(f"run: pip install -e .[{extra}]", file=sys.stderr)
        sys.exit(2)


class Outlet(io.FileIO):
    """Writes to a file descriptor; once nobody reads it any more, to nowhere."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for processes that are started from here on, too
            os.close(nowhere)
            return len(data)


def outlive_the_reader() -> None:
    """Let a script do its work to the end where the reader of what it prints has left: that is written to files."""
    out = sys.stdout
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    if out is None or out is not sys.__stdout__ or Path(main).resolve().parent != Path(__file__).resolve().parent:
        return
    out.flush()
    raw = Outlet(out.fileno(), "w", closefd=False)
    unbuffered = isinstance(out.buffer, io.RawIOBase)  # python -u
    sys.stdout = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw), out.encoding, out.errors,
        line_buffering=out.line_buffering, write_through=out.write_through,
    )  # fmt: skip


outlive_the_reader()
for name in KNOWN_BY:
    if others := others_called(name):
        print(f"{others[0]} has the name of this project's {name}/ and is hidden by it; rename it to use it")
    if others or importlib.util.find_spec(name) is None:
        sys.path.insert(0, str(ROOT))
        importlib.invalidate_caches()

check_extras(Path(sys.argv[0]).name)
check_mujoco_gl()
