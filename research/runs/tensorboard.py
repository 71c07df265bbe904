"""A run's metrics as TensorBoard event files in its folder, beside W&B or without it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from research.errors import UserError
from research.runs.folder import RunFolder


class EventFiles:
    """What `tensorboard --logdir=runs` shows of a run.

    Args:
        folder: the run folder; the files are in `tensorboard/` there.
        resume_step: env step that a resumed run goes on from; TensorBoard hides what was written after it.
    Raises:
        UserError: the package tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: RunFolder, resume_step: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"trainer.tensorboard: tensorboard is not installed ({error}); run: pip install -e .[tensorboard]"
            ) from None
        purge = None if resume_step is None else resume_step + 1
        try:
            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=purge, flush_secs=10)
        except OSError as error:
            raise UserError(f"trainer.tensorboard: cannot write to {folder.tensorboard}: {error.strerror}") from error

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Write the numbers of a row at an env step; what is no number, or infinite, is left out."""
        for name, value in row.items():
            if name != "global_step" and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits; nothing is logged afterwards."""
        self._writer.close()
