"""What a run says to the person who started it: at the start, in the progress bar, at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
from tensordict import TensorDictBase

from research.runs.tracking import Tracker, plot_learning_curve
from research.runs.video import frame_strip
from research.training.evaluation import Evaluation


def describe(policy: Any, observations: TensorDictBase, folder: Path, device: torch.device) -> str:
    """What a run begins with.

    Args:
        policy: the `agents.policy.VLAPolicy`.
        observations: one or more, as the environment offers them, `[B]`.
        folder: the run folder.
        device: where the model is.
    """
    parameters = list(policy.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    lines = [
        f"{type(policy.model).__name__} ({policy.interface} interface): {trained:,} of "
        f"{sum(p.numel() for p in parameters):,} parameters train, on {device}",
        *policy.reuse_report(observations[:1]).lines(),
        f"run folder: {folder}",
    ]
    return "\n".join(lines)


def postfix(metrics: dict[str, float], result: Evaluation | None) -> dict[str, str]:
    """What the progress bar shows: of the last rollout, and of the last evaluation."""
    shown = {"success": metrics.get("rollout/success_rate"), "return": metrics.get("rollout/return")}
    if shown["success"] is not None:
        del shown["return"]
    if result is not None:
        shown["eval"] = result.score
    return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}


def last_checkpoint(folder: Path) -> str:
    """Where a run that ends early can be continued from."""
    path = folder / "checkpoints" / "last.pt"
    return f"the last checkpoint is {path}" if path.exists() else "no checkpoint was written yet"


def summarise(tracker: Tracker, folder: Path, step: int, before: dict | None, result: Evaluation | None, facts: dict):
    """Print and record what the run achieved and where everything lies."""
    summary = {"global_step": step, **facts}
    if before is not None:
        summary |= {f"before/{name.removeprefix('eval/')}": value for name, value in before.items()}
    if result is not None:
        summary |= result.metrics()
        print(f"after {step:,} env steps: {result.summary()}")
    if curve := plot_learning_curve(folder):
        tracker.log_image("learning_curve", curve, step)
    if result is not None and result.frames:
        iio.imwrite(folder / "videos" / "strip.png", frame_strip(result.frames[0], count=6))
    tracker.summary(summary)
    print(f"curve, video, checkpoints, metrics: {folder}/")
    if tracker.sync_command:
        print(f"upload to W&B with: {tracker.sync_command}")
