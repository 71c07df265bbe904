"""A run's folder made or found again, its parts put where a checkpoint was taken, and its tracking started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from assembling import Assembly
from building import keeps_frozen_weights
from resuming import drop_rows_after, evaluation_at, restore
from training_run import TrainingRun

from envs import foreign_code
from research.config import ExperimentConfig, TrainerConfig
from research.errors import UserError
from research.options import flatten, to_dict
from research.runs.checkpoint import CheckpointWriter, load_checkpoint, snapshot, write_checkpoint
from research.runs.folder import FROZEN, RunFolder, step_of
from research.runs.origin import sign
from research.runs.tracking import SilentTracker, Tracker
from research.runs.wandb_session import resolve_wandb_mode
from research.training.algorithm import Progress
from research.training.evaluation import Evaluation
from research.training.freezing import part_of

HOW_EVALUATED = ("num_eval_episodes", "eval_mode", "max_eval_steps")


def open_run(config: ExperimentConfig, parts: Assembly, resumed: dict | None) -> TrainingRun:
    """Make the run's folder, or go on in the one of a checkpoint, and start tracking.

    Args:
        config: the experiment.
        parts: what it trains with; they take the checkpoint's state.
        resumed: the checkpoint of `trainer.resume`, or None. Where the agent of a sweep starts a run again after an
            interruption, its folder's own is taken.
    """
    trainer, world = config.trainer, parts.world
    mode, reason = resolve_wandb_mode(trainer.use_wandb)
    folder = None
    if world.leads:
        folder = (
            RunFolder.containing(trainer.resume) if resumed else RunFolder.create(trainer.run_dir, trainer.exp_name)
        )
    folder, restarted = world.leaders((folder, folder is not None and not resumed and folder.metrics.exists()))
    if restarted and folder.last_checkpoint:
        resumed, restarted = load_checkpoint(folder.path), False
    elif restarted and world.leads:
        folder.episodes.unlink(missing_ok=True)
    progress = Progress(trainer.iterations, max_env_steps=trainer.max_env_steps)
    writer, evaluated, has_best = CheckpointWriter(folder, trainer.keep_checkpoints), [], True
    if resumed:
        restore(resumed, parts, progress)  # what is written from here on goes on from there
        if world.leads:
            evaluated = _evaluated(folder, progress, resumed["config"]["trainer"], trainer)
            has_best = any(step_of(path) <= progress.env_steps for path in folder.checkpoints_called("best"))
        evaluated, has_best = world.leaders((evaluated, has_best))
    run = TrainingRun(config, parts, folder, SilentTracker(), writer, progress, resumed is not None)
    if not has_best:  # it went with what came later: the next evaluation may be the best one, whatever was before
        progress.best = -math.inf
    if evaluated:
        run.result = Evaluation.from_rows(evaluated, getattr(parts.eval_env, "distinct_states", True))
        run.evaluated_at = progress.env_steps
        progress.best = max(progress.best, run.result.score)  # the checkpoint was written before that evaluation
    if not world.leads:
        return run

    def go_back() -> None:
        if resumed:
            if gone := writer.remove_after(progress.env_steps):
                print(f"going on from env step {progress.env_steps:,}; what came after it is gone: {', '.join(gone)}")
            drop_rows_after(folder, progress.env_steps, with_evaluation=not evaluated)
            if evaluated and not has_best:
                writer.keep_as_best(resumed["source"])

    run.tracker = Tracker(
        folder,
        to_dict(config),
        flatten(config)
        | {"scope": config.policy.scope, "learning_rate": config.algorithm.cfg.learning_rate},  # panels take no dots
        project=trainer.wandb_project_name,
        group=trainer.wandb_group or f"{trainer.env}-{config.algorithm.name}-{config.policy.scope}"[:128],
        mode=mode,
        reason=reason,
        tags=[f"freeze:{config.policy.scope}"[:64], *trainer.wandb_tags],
        name=trainer.wandb_name or default_name(config),
        entity=trainer.wandb_entity,
        notes=trainer.wandb_notes,
        tensorboard=trainer.tensorboard,
        resume_id=folder.id if resumed else None,
        resume_step=progress.env_steps if resumed else -1 if restarted else None,
        once_accepted=go_back,
    )
    run.tracker.save_code([config.policy.vla_config.model_class.rpartition(".")[0], foreign_code(trainer.env)])
    if trainer.wandb_checkpoints:
        run.tracker.upload_checkpoints(config.policy.vla_config.model_path)
    writer.on_written = run.tracker.checkpoint_written
    try:
        sign(folder)
        provided = getattr(parts.policy.model, "provided_weights", {})  # the constructor has them, from a file
        frozen = {n: value for n, value in parts.audit.frozen_state().items() if part_of(n) not in provided}
        if keeps_frozen_weights(config) and frozen:
            write_checkpoint(folder.checkpoints / FROZEN, snapshot(to_dict(config), model_state_dict=frozen))
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    return run


def _evaluated(
    folder: RunFolder, progress: Progress, stored: Mapping[str, Any], trainer: TrainerConfig
) -> list[dict[str, Any]]:
    """Rows of the evaluation of what a run goes on from, if it was made; none where a run that is over has another one.

    Args:
        stored: the trainer's options when the checkpoint was written.
        trainer: those of now.
    """
    rows = evaluation_at(folder, progress.env_steps, stored["num_eval_episodes"])
    alike = all(stored.get(name, getattr(trainer, name)) == getattr(trainer, name) for name in HOW_EVALUATED)
    if rows and progress.finished and not alike:
        print("what it ended with is evaluated anew, as it is asked for otherwise: the former evaluation goes")
        return []
    return rows


def default_name(config: ExperimentConfig) -> str:
    """What W&B calls a run: the experiment, and what runs of a study differ in."""
    rate, seed = config.algorithm.cfg.learning_rate, config.trainer.seed
    return f"{config.trainer.exp_name} {config.policy.scope} lr={rate:g} seed={seed}"[:128]
