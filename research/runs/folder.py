"""The run folder: what the files in it are called, and how they are written so that a crash leaves none of them broken.

| file                   | what it holds                                                                   |
|------------------------|---------------------------------------------------------------------------------|
| `config.json`          | the resolved configuration                                                      |
| `signature`            | says who wrote it, see `research/runs/origin.py`                                |
| `metrics.jsonl`        | one row per rollout and per evaluation, see `research/runs/tracking.py`         |
| `episodes.jsonl`       | one row per evaluation episode                                                  |
| `summary.json`         | the results, the `exit_code`, the `machine`, the page on W&B; a run that was    |
|                        | killed has none                                                                 |
| `checkpoints/step_<n>` | what the run is resumed from: the newest, and a few before it                   |
| `checkpoints/best_<n>` | where the best evaluation was                                                   |
| `videos/`              | `eval_<global_step>.mp4` of evaluations, `strip.png` of the last one            |
| `learning_curve.png`   | success rate or return against env steps                                        |
| `splits/`              | what `evaluate_vla.py --split=all` wrote: episodes, summary, videos             |
| `choosing/`            | what `evaluate_vla.py` wrote on other states, to choose a learning rate on      |
| `wandb/`               | W&B's own files                                                                 |
| `tensorboard/`         | TensorBoard's event files, where they were asked for                            |
"""

from __future__ import annotations

import json
import math
import os
import secrets
import string
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from research.errors import UserError

MANIFEST = "manifest.json"  # what makes a folder in checkpoints/ a checkpoint
FROZEN = "frozen"  # the checkpoint that holds frozen weights which are in no file


@dataclass(frozen=True, order=True)
class RunFolder:
    """One run's folder, which need not exist; given as text, as a `Path` or as another `RunFolder`.

    It goes wherever a path-like object goes (`open`, `Path`, `shutil`), and prints as its path.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, run_dir: str | os.PathLike[str], exp_name: str) -> RunFolder:
        """Make `<run_dir>/<exp_name>-<id>/` with `checkpoints/` and `videos/` in it.

        The id (date, time, four random characters) is also the W&B run id. Where `WANDB_RUN_ID` is set, as `wandb
        agent` does, that is the id; a sweep's run that the agent starts again gets its old folder back, checkpoints
        included.

        Raises:
            UserError: `exp_name` is not a plain name, the folder cannot be written, or, outside a sweep,
                `WANDB_RUN_ID` names a run whose folder is there already.
        """
        if not exp_name or Path(exp_name).name != exp_name:
            raise UserError(
                f"trainer.exp_name is {exp_name!r}; it becomes part of a folder's name, so no '/' and not empty"
            )
        given_id = os.environ.get("WANDB_RUN_ID")
        folder = cls(Path(run_dir) / f"{exp_name}-{given_id or _new_id()}")
        try:
            folder.path.mkdir(parents=True, exist_ok="WANDB_SWEEP_ID" in os.environ)
            for part in (folder.checkpoints, folder.videos):
                part.mkdir(exist_ok=True)
        except FileExistsError as error:
            if given_id and folder.path.is_dir():
                raise UserError(f"{folder} is there already: resume that run, or unset WANDB_RUN_ID") from error
            raise UserError(f"cannot make the run folder {folder}: {error.filename} is in the way") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot make the run folder {folder}: {error}") from error
        return folder

    @classmethod
    def containing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run folder that a path is, or lies in as a checkpoint."""
        path = Path(path)
        is_checkpoint = not path.is_dir() or (path / MANIFEST).is_file()
        return cls(path.parent.parent if is_checkpoint else path)

    @classmethod
    def all_below(cls, path: str | os.PathLike[str]) -> list[RunFolder]:
        """The folder itself if it is one of a run, else those anywhere below it; in either case only with metrics."""
        folder = cls(path)
        config = folder.config
        found = [folder] if config.is_file() else [cls(file.parent) for file in folder.path.rglob(config.name)]
        return [run for run in found if run.metrics.is_file()]

    @property
    def exp_name(self) -> str | None:
        """`trainer.exp_name` of the run; None where there is no configuration, or none that can be read."""
        try:
            return str(read_json(self.config)["trainer"]["exp_name"])
        except (OSError, UserError, ValueError, TypeError, KeyError, RecursionError):
            return None

    @property
    def id(self) -> str:
        """What `create` put after the experiment's name; the run's id in W&B. One that was given may have dashes."""
        name, exp_name = self.path.name, self.exp_name
        if exp_name is not None and name.startswith(f"{exp_name}-"):
            return name.removeprefix(f"{exp_name}-")
        return name.rsplit("-", 1)[-1]

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def signature(self) -> Path:
        return self.path / "signature"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def episodes(self) -> Path:
        return self.path / "episodes.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, global_step: int, best: bool = False) -> Path:
        """The checkpoint of an env step, or that of the best evaluation, which was then."""
        return self.checkpoints / f"{'best' if best else 'step'}_{global_step:09d}"

    def checkpoints_called(self, kind: Literal["step", "best"]) -> list[Path]:
        """The complete checkpoints of a kind, the newest first; whether they are whole is for who reads them."""
        found = [file.parent for file in self.checkpoints.glob(f"{kind}_*/{MANIFEST}")]
        whole = [path for path in found if path.name.partition("_")[2].isdigit()]  # not one that was being written
        return sorted(whole, key=lambda path: int(path.name.partition("_")[2]), reverse=True)

    @property
    def saved_checkpoints(self) -> list[Path]:
        """All checkpoints that a run can be resumed from, the newest first; those of earlier versions are files."""
        folders = [*self.checkpoints_called("step"), *self.checkpoints_called("best")]
        folders.sort(key=lambda path: int(path.name.partition("_")[2]), reverse=True)
        earlier = [self.checkpoints / name for name in ("last.pt", "best.pt")]
        return [*folders, *(path for path in earlier if path.is_file())]

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; None where none was written."""
        return next(iter(self.saved_checkpoints), None)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation; None where none was written."""
        earlier = [path for path in self.saved_checkpoints if path.name == "best.pt"]
        return next(iter([*self.checkpoints_called("best"), *earlier]), None)

    @property
    def videos(self) -> Path:
        return self.path / "videos"

    @property
    def strip(self) -> Path:
        return self.videos / "strip.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def learning_curve(self) -> Path:
        return self.path / "learning_curve.png"

    @property
    def splits(self) -> Path:
        """The episodes of all splits; the folder they lie in is what `evaluate_vla.py` is given as `--output`."""
        return self.path / "splits" / "episodes.jsonl"

    @property
    def choosing(self) -> Path:
        """The episodes on other states than the run reports, for `compare_runs.py --choose_on=other_states`."""
        return self.path / "choosing" / "episodes.jsonl"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def video(self, global_step: int) -> Path:
        """The video of the evaluation at an env step."""
        return self.videos / f"eval_{global_step:09d}.mp4"

    @property
    def is_run(self) -> bool:
        """Whether a training run wrote it: `config.json` and `checkpoints/` are there."""
        return self.config.is_file() and self.checkpoints.is_dir()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, and not to an error or an interruption."""
        return self.summary.exists() and read_json(self.summary).get("exit_code") == 0

    @property
    def stopped_by(self) -> str | None:
        """What ended the run before its end, as `TrainingRun` calls it; None where nothing is known to have."""
        return read_json(self.summary).get("stopped_by") if self.summary.exists() else None


def _new_id() -> str:
    # Not `random`: seeded alike, two runs of the same second would get the same characters.
    characters = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(4))
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{characters}"


# ---- whole files


@contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """A file to write in place of `path`, which is the old file until the new one is complete and on the disk.

    Whoever reads, and whoever starts again after a crash, sees one of the two and never a part. Where the block raises,
    the old file stays; what was written lies beside it as `<name>.partial` until the next attempt.

    Args:
        path: the file to replace; it need not exist, its folder must.
        mode: "w" for text, in UTF-8, or "wb" for bytes.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open(mode, encoding=None if mode == "wb" else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def step_of(path: Path) -> int:
    """The env step in a checkpoint's name, `step_<n>` or `best_<n>`."""
    return int(path.name.partition("_")[2])


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk: without it, a crash of the machine may undo a renaming."""
    with suppress(OSError):  # not every file system can
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` as a whole; see `replacing`."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` as a whole, NaN and infinities as null; see `replacing`."""
    replace_file(path, as_json(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        UserError: no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def as_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text, NaN and infinities at any depth as null: JSON has neither."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- files of rows, one JSON object per line


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to the end of a file, which is made if need be; NaN and infinities are null in it."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(as_json(row) + "\n" for row in rows)


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of these rows and no others, as a whole; see `replacing`."""
    replace_file(path, "".join(as_json(row) + "\n" for row in rows))


def read_rows(path: Path, torn_anywhere: bool = False) -> list[dict[str, Any]]:
    """Read the rows of a file, oldest first, without a last one that a kill tore.

    Args:
        path: the file.
        torn_anywhere: leave out torn rows in the middle, too: a resumed run went on writing after them.
    Raises:
        UserError: a line before the last one is not JSON, where `torn_anywhere` does not allow that.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines) and not torn_anywhere:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    return rows
