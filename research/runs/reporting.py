"""What a run says to the person who started it: in the progress bar, and at the end."""

from __future__ import annotations

import logging
from os import PathLike

import imageio.v3 as iio

from research.runs.curve import plot_learning_curve
from research.runs.folder import RunFolder
from research.runs.tracking import Tracker
from research.runs.video import frame_strip
from research.training.evaluation import Evaluation

log = logging.getLogger(__name__)


class Doubts:
    """Warnings of a run, each kind of which is said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, kind: str, doubt: str | None) -> None:
        """Log a warning of this kind, unless there is none, or one was."""
        if doubt is not None and kind not in self._said:
            self._said.add(kind)
            log.warning(doubt)


def postfix(metrics: dict[str, float], result: Evaluation | None) -> dict[str, str]:
    """What the progress bar shows: of the last rollout, and of the last evaluation."""
    shown = {"success": metrics.get("rollout/success_rate"), "return": metrics.get("rollout/return")}
    if shown["success"] is not None:
        del shown["return"]
    if result is not None:
        shown["eval"] = result.score
    return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}


def last_checkpoint(folder: str | PathLike[str]) -> str:
    """Where a run that ends early can be continued from."""
    path = RunFolder(folder).last_checkpoint
    return f"the last checkpoint is {path}" if path else "no checkpoint was written yet"


def summarise(
    tracker: Tracker,
    folder: str | PathLike[str],
    step: int,
    before: dict | None,
    result: Evaluation | None,
    facts: dict,
    evaluated_at: int | None = None,
) -> None:
    """Print and record what the run achieved and where everything lies.

    Args:
        tracker: of the run, not finished yet.
        folder: the run folder, where curve and film strip are written.
        step: `global_step` at the end, in env steps.
        before: `eval/*` metrics before training; None where there was no evaluation, as for `result`.
        result: the last evaluation.
        facts: what else belongs into `summary.json`, `exit_code` among it.
        evaluated_at: the env step that `result` is of; None: the end.
    """
    summary = {"global_step": step, **facts}
    if before is not None:
        summary |= {f"before/{name.removeprefix('eval/')}": value for name, value in before.items()}
    if result is not None:
        at = step if evaluated_at is None else evaluated_at
        summary |= {"eval/global_step": at, **result.metrics()}
        which = "" if at == step else f"ended after {step:,} env steps; the last evaluation was "
        print(f"{which}after {at:,} env steps: {result.summary()}")
    if curve := plot_learning_curve(folder):
        tracker.log_image("learning_curve", curve, step)
    if result is not None and result.frames:
        frames, caption = result.frames[result.shown], result.captions[result.shown]
        iio.imwrite(RunFolder(folder).strip, frame_strip(frames, count=6, caption=caption))
    tracker.summary(summary)
    print(f"curve, video, checkpoints, metrics: {folder}/")
    if tracker.sync_command:
        print(f"upload to W&B with: {tracker.sync_command}")
