"""A training run under way: its folder, W&B, progress bar, evaluations and checkpoints, and how it ends."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from types import TracebackType

from assembling import Assembly, describe, measure_utilisation
from configuration import changes_of_resuming, run_of_checkpoint
from tensordict import TensorDictBase
from tqdm import tqdm

from research.config import ExperimentConfig
from research.options import flatten, to_dict
from research.runs.checkpoint import load_checkpoint, restore_rng, save_checkpoint
from research.runs.folder import RunFolder, append_rows
from research.runs.reporting import last_checkpoint, postfix, summarise
from research.runs.tracking import Tracker, resolve_wandb_mode
from research.runs.video import video_grid, write_video
from research.schema import FrozenWeightsChanged, NonFiniteError, check_finite
from research.training.algorithm import Progress
from research.training.evaluation import Evaluation, evaluate
from research.training.interruption import Interruption
from research.training.ratio import describe_ratio, largest_log_ratio

log = logging.getLogger(__name__)

FILMED = 12  # evaluation episodes in a video


def load_resumed(config: ExperimentConfig) -> dict | None:
    """The checkpoint of `trainer.resume`, or None; says what the run does otherwise than before.

    Raises:
        UserError: there is none, or something that a run cannot change was changed.
    """
    if not config.trainer.resume:
        return None
    run_of_checkpoint(config.trainer.resume)
    state = load_checkpoint(config.trainer.resume)
    progress = Progress(config.trainer.iterations)
    progress.load_state_dict(state.get("progress", state))
    for line in changes_of_resuming(state["config"], config, progress.iteration):
        print(line)
    return state


def open_run(config: ExperimentConfig, parts: Assembly, resumed: dict | None) -> TrainingRun:
    """Make the run's folder, or go on in the one of a checkpoint, and start tracking.

    Args:
        config: the experiment.
        parts: what it trains with; they take the checkpoint's state.
        resumed: the checkpoint of `trainer.resume`, or None. Where the agent of a sweep starts a run again after an
            interruption, its folder's own is taken.
    """
    trainer = config.trainer
    mode, reason = resolve_wandb_mode(trainer.use_wandb)
    folder = RunFolder.containing(trainer.resume) if resumed else RunFolder.create(trainer.run_dir, trainer.exp_name)
    restarted = not resumed and folder.metrics.exists()
    if restarted and folder.last_checkpoint.exists():
        resumed, restarted = load_checkpoint(folder.path), False
    elif restarted:
        folder.episodes.unlink(missing_ok=True)
    progress = Progress(trainer.iterations)
    if resumed:
        restore(resumed, parts, progress)
    tracker = Tracker(
        folder,
        to_dict(config),
        flatten(config)
        | {"scope": config.policy.scope, "learning_rate": config.algorithm.cfg.learning_rate},  # panels take no dots
        project=trainer.wandb_project_name,
        group=trainer.wandb_group or f"{trainer.env}-{config.algorithm.name}-{config.policy.scope}",
        mode=mode,
        reason=reason,
        tags=[f"freeze:{config.policy.scope}"[:64], *trainer.wandb_tags],
        resume_id=folder.id if resumed else None,
        resume_step=progress.env_steps if resumed else -1 if restarted else None,
    )
    return TrainingRun(config, parts, folder, tracker, progress, resumed is not None)


def restore(state: dict, parts: Assembly, progress: Progress) -> None:
    """Put a run's parts where a checkpoint was taken."""
    parts.policy.model.load_state_dict(state["model_state_dict"])
    parts.audit.load_state_dict(state["audit"])
    parts.algorithm.load_state_dict(state["optimizer"])
    progress.load_state_dict(state.get("progress", state))  # earlier runs kept its entries at the top
    episodes = {"episodes": state["statistics"]} if "statistics" in state else {}
    if not parts.rollouts.load_state_dict(episodes | state["rollouts"], progress.env_steps):
        print("episodes cannot be restored and start anew: the run goes on, but not bit for bit")
    restore_rng(state)


class TrainingRun:
    """One run; a context manager that ends it.

    | it ended because                                        | exit code | what it says                               |
    |---------------------------------------------------------|-----------|--------------------------------------------|
    | all iterations are done                                 | 0         | results                                    |
    | Ctrl-C, SIGTERM: after the iteration, with a checkpoint | 130, 143  | results; preempted runs of a sweep requeue |
    | W&B asked it to stop (early termination of a sweep)     | 0         | results                                    |
    | a second Ctrl-C: at once                                | 130       | the last checkpoint                        |
    | a NaN, or a frozen weight that changed                  | 1         | what and where, the last checkpoint        |
    | anything else is raised                                 | (raised)  | the traceback                              |

    Attributes:
        progress: how far it has come.
        code: the exit code, once it has ended.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parts: Assembly,
        folder: RunFolder,
        tracker: Tracker,
        progress: Progress,
        resumed: bool,
    ):
        self.config, self.trainer, self.parts = config, config.trainer, parts
        self.folder, self.tracker, self.progress, self.resumed = folder, tracker, progress, resumed
        self.code, self.result = 0, None
        self._ratio_is_known = False
        self._at_exit = ExitStack()

    def __enter__(self) -> TrainingRun:
        self._at_exit.enter_context(self.tracker)
        self._interruption = self._at_exit.enter_context(Interruption())
        self._at_exit.callback(self.parts.rollouts.shutdown)  # workers that outlive an error would hold up the exit
        return self

    @property
    def interrupted(self) -> bool:
        """Whether someone asked it to stop."""
        return self._interruption.code != 0

    def begin(self) -> None:
        """Say what it is, check the frozen weights, and evaluate the policy that it starts from."""
        print(describe(self.parts, self.folder), flush=True)
        self._utilisation = measure_utilisation(self.config, self.parts)
        self.parts.audit.check("at the start" if not self.resumed else "where the run was resumed")
        if self.trainer.enable_eval and not self.resumed:
            self.evaluate(film=FILMED)
            self.progress.before = self.result.metrics()
            print(f"before: {self.result.summary()}", flush=True)
        self._bar = self._at_exit.enter_context(
            tqdm(
                total=self.trainer.iterations * self.trainer.buffer_size, initial=self.progress.env_steps, unit="step",
                unit_scale=True, disable=not self.trainer.progress_bar, dynamic_ncols=True,
            )
        )  # fmt: skip

    def check_ratio(self, batch: TensorDictBase) -> None:
        """Warn, once, of a policy that scores its own first decisions otherwise than it drew them."""
        if self._ratio_is_known:
            return
        self._ratio_is_known = True
        cfg, autocast = self.config.algorithm.cfg, self.trainer.autocast
        ratio = largest_log_ratio(self.parts.policy, batch, cfg.micro_batch_size or cfg.batch_size)
        if warning := describe_ratio(ratio, autocast):
            log.warning(warning)

    def log(self, metrics: dict[str, float], transitions: int, collect_s: float, update_s: float) -> None:
        """Record an iteration that has just ended: its metrics, its times, and the share of the device's speed."""
        seconds = collect_s + update_s
        metrics = metrics | {"time/collect_s": collect_s, "time/update_s": update_s}
        metrics["time/env_steps_per_second"] = transitions / seconds
        metrics["time/threads"] = float(self.trainer.threads)
        if self.progress.iteration > self.config.algorithm.cfg.value_warmup_iterations:
            metrics["time/mfu"] = self._utilisation.of(transitions, metrics["train/epochs"], seconds)
        self.tracker.log(metrics, self.progress.env_steps)
        self._bar.set_postfix(postfix(metrics, self.result))
        self._bar.update(transitions)

    def evaluate(self, film: int = 0) -> Evaluation:
        """Evaluate the policy as it is; the best one so far is kept as a checkpoint."""
        parts, trainer, step = self.parts, self.trainer, self.progress.env_steps
        result = evaluate(
            parts.eval_env, parts.policy.act, range(trainer.num_eval_episodes), film, trainer.max_eval_steps
        )
        self.tracker.log(result.metrics() | parts.audit.drift(), step)
        append_rows(self.folder.episodes, result.rows(global_step=step, seed=trainer.seed))
        if result.frames:
            path = self.folder.video(step)
            write_video(video_grid(result.frames, columns=4, success=result.filmed_success), path, fps=10)
            self.tracker.log_video("eval/video", path, step)
        self.result = result
        if result.score > self.progress.best:
            self.progress.best = result.score
            self.save(best=True)
        return result

    def save(self, best: bool = False) -> None:
        """Write a checkpoint that `trainer.resume` goes on from, once it is sure that frozen weights are as before.

        Raises:
            NonFiniteError: a weight is not a number; the checkpoint before stays as it is.
        """
        parts = self.parts
        when = f"at env step {self.progress.env_steps}"
        check_finite(((f"weight {n}", p) for n, p in parts.policy.model.named_parameters() if p.requires_grad), when)
        parts.audit.check(when)
        save_checkpoint(
            self.folder.best_checkpoint if best else self.folder.last_checkpoint,
            model_state_dict=parts.policy.model.state_dict(),
            optimizer=parts.algorithm.state_dict(),
            progress=self.progress.state_dict(),
            rollouts=parts.rollouts.state_dict(),
            audit=parts.audit.state_dict(),
            config=to_dict(self.config),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End the run; see the table in the class's docstring. What it does not know is raised on."""
        expected = isinstance(error, NonFiniteError | FrozenWeightsChanged | KeyboardInterrupt)
        if error is not None and not expected:
            return self._at_exit.__exit__(kind, error, traceback) or False
        with self._at_exit:
            self.code = self._interruption.code
            if expected:
                self.code = 130 if isinstance(error, KeyboardInterrupt) else 1
                why = "stopped at once" if isinstance(error, KeyboardInterrupt) else f"error: {error}; stopped"
                where = f"at env step {self.progress.env_steps}"
                print(f"{why} {where}, {last_checkpoint(self.folder)}", file=sys.stderr)
            facts = {"exit_code": self.code, **self.parts.audit.summary()}
            progress = self.progress
            summarise(self.tracker, self.folder, progress.env_steps, progress.before, self.result, facts)
            if self.tracker.stopped and self.code > 128:
                self.code = 0  # what its sweep asked for is no failure; an agent gives up after a few of those
            elif self.code == 143 and self.tracker.run:
                self.tracker.run.mark_preempting()  # the sweep queues this run again
            self.tracker.finish(self.code)
        self.parts.eval_env.close()
        return True


class Stopwatch:
    """Times the two halves of an iteration."""

    def __init__(self):
        self._start = self._collected = time.perf_counter()

    def collected(self) -> None:
        """The rollout is there."""
        self._collected = time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        """How long collecting and updating took, until now."""
        return self._collected - self._start, time.perf_counter() - self._collected
