"""A training run under way: its folder, W&B, progress bar, evaluations and checkpoints, and how it ends."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from assembling import Assembly, describe, measure_utilisation
from ends import ALERTED, STOPPED_BY, said
from tensordict import TensorDictBase

from research.config import ExperimentConfig
from research.errors import FrozenWeightsChanged, NonFiniteError, UserError
from research.options import to_dict
from research.progress_bar import ProgressBar
from research.runs.checkpoint import CheckpointWriter, generators, snapshot
from research.runs.folder import RunFolder, append_rows
from research.runs.machine import machine
from research.runs.reporting import Doubts, last_checkpoint, postfix, summarise
from research.runs.tracking import Tracker
from research.runs.video import video_grid, write_video
from research.schema import check_finite
from research.training.algorithm import Progress
from research.training.episodes import EpisodeStatistics
from research.training.evaluation import Evaluation, evaluate
from research.training.interruption import Interruption
from research.training.parallel import PeerEnded
from research.training.ratio import describe_jump, doubts
from research.training.rollout import Rollouts

log = logging.getLogger(__name__)

FILMED = 12  # evaluation episodes in a video


class TrainingRun:
    """One run; a context manager that ends it.

    | it ended because                                         | exit code | what it says                              |
    |----------------------------------------------------------|-----------|-------------------------------------------|
    | all iterations are done                                  | 0         | results                                   |
    | Ctrl-C, SIGTERM, SIGUSR1, SIGHUP: after the iteration    | 128 + n   | results; a sweep requeues preempted runs  |
    | W&B asked it to stop (early termination of a sweep)      | 0         | results                                   |
    | a second Ctrl-C: at once                                 | 130       | the last checkpoint                       |
    | a NaN, a frozen weight that changed, a broken simulator, | 1         | what and where, the last checkpoint       |
    | a full disk                                              |           |                                           |
    | anything else is raised                                  | (raised)  | the same, and the traceback               |

    Each of them leaves a summary, and `stopped_by` in it says which. Of several processes all end when one does; rank 0
    alone writes, and its exit code is everyone's.

    Attributes:
        progress: how far it has come.
        result: the last evaluation.
        evaluated_at: the env step that it is of.
        code: the exit code, once it has ended.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parts: Assembly,
        folder: RunFolder,
        tracker: Tracker,
        writer: CheckpointWriter,
        progress: Progress,
        resumed: bool,
    ):
        self.config, self.trainer, self.parts = config, config.trainer, parts
        self.folder, self.tracker, self.writer, self.world = folder, tracker, writer, parts.world
        self.progress, self.resumed = progress, resumed
        self.code, self.result, self.evaluated_at = 0, None, -1
        self._ratio_is_known, self._doubts = False, Doubts()
        self._held: dict | None = None
        self._holding_s = self._held_at = self._iteration_s = 0.0
        self._at_exit = ExitStack()

    def __enter__(self) -> TrainingRun:
        self._at_exit.enter_context(self.tracker)
        self._interruption = self._at_exit.enter_context(Interruption(late=self._write_held))
        self._at_exit.callback(self.parts.rollouts.shutdown)  # workers that outlive an error would hold up the exit
        return self

    def interrupted(self) -> bool:
        """Whether someone asked it, or another process of it, to stop; all of them have to look."""
        self._interruption.code = self.world.largest(self._interruption.code)
        return self._interruption.code != 0

    def begin(self) -> None:
        """Say what it is, check the frozen weights, and evaluate the policy that it starts from."""
        print(describe(self.parts, self.folder), flush=True)
        self._utilisation = measure_utilisation(self.config, self.parts)
        self.parts.audit.check("at the start" if not self.resumed else "where the run was resumed")
        if self.trainer.enable_eval and self.progress.before is None and self.progress.iteration == 0:
            self.evaluate(film=FILMED)
            print(f"before: {self.result.summary()}", flush=True)
        total, done, rollouts = self.trainer.env_steps_planned, self.progress.env_steps, self.parts.rollouts
        self._bar = self._at_exit.enter_context(
            self._progress_of("training", total, "step", initial=done, unit_scale=True)
        )
        if isinstance(rollouts, Rollouts):
            self._bar.follow(lambda: rollouts.policy.env_steps * self.world.size)

    def _progress_of(self, what: str, total: int, unit: str, **options: Any) -> ProgressBar:
        """A bar; its words say where compiling is part of what it waits for."""
        first = self.trainer.compile == "on" and self._iteration_s == 0
        return ProgressBar(
            desc=f"compiling, {what}" if first else what, total=total, unit=unit, dynamic_ncols=True,
            disable=not (self.trainer.progress_bar and self.world.leads), **options,
        )  # fmt: skip

    def hold(self) -> None:
        """Keep a copy of where the run is: what a signal, or a failure, within the next iteration leaves behind.

        It may take a four-hundredth of the time, and where iterations are long, so that much would be lost, a fiftieth.
        Of several processes it has the environments of rank 0 alone, and the others' begin anew; where they divide the
        weights, nothing is held.
        """
        start = time.perf_counter()
        if not self.world.leads or self.trainer.sharding != "none":
            return
        if start - self._held_at < (50 if self._iteration_s > 10 else 400) * self._holding_s:
            return
        self._take()
        self._holding_s = self._held_at - start

    def _take(self, ranks: list | None = None) -> dict:
        self._held, self._held_at = self._snapshot(ranks), time.perf_counter()
        return self._held

    def _snapshot(self, ranks: list | None) -> dict:
        parts = self.parts
        return snapshot(
            to_dict(self.config),
            model_state_dict=parts.algorithm.whole(parts.audit.trained_state()),
            optimizer=parts.algorithm.state_dict(),
            progress=self.progress.state_dict(),
            rollouts=parts.rollouts.state_dict(),
            audit=parts.audit.state_dict(),
            **({} if ranks is None else {"ranks": ranks}),
        )

    def _write_held(self) -> None:
        """Write what was held last, unless a checkpoint is as new."""
        if self.world.leads and self._held is not None and self._held["progress"]["global_step"] > self.writer.latest:
            try:
                self.writer.submit(self._held)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def check_ratio(self, batch: TensorDictBase, metrics: Mapping[str, float]) -> None:
        """Warn, once, of a policy whose first decisions are not what it scores.

        Args:
            batch: as the update takes it.
            metrics: of how it was made; where log-probabilities were computed anew, the distance to those that acted.
        """
        if self._ratio_is_known or not self.world.leads:
            return
        self._ratio_is_known = True
        cfg, kl = self.config.algorithm.cfg, metrics.get("rollout/behaviour_kl", 0.0)
        rows = cfg.micro_batch_size or cfg.batch_size
        for doubt in doubts(self.parts.policy, batch, rows, self.trainer.autocast, kl):
            log.warning(doubt)

    def log(self, metrics: dict[str, float], decisions: int, collect_s: float, update_s: float) -> None:
        """Record an iteration that has just ended; `decisions` are those that this process learned from."""
        seconds, env_steps, learned = collect_s + update_s, self.progress.last_steps, self.world.total(decisions)
        self._iteration_s = seconds
        metrics = metrics | {"time/collect_s": collect_s, "time/update_s": update_s}
        metrics["time/env_steps_per_second"] = env_steps / seconds
        if env_steps != learned:
            metrics["rollout/decisions"] = float(learned)
        metrics["time/threads"] = float(self.trainer.threads)
        if self.progress.iteration > self.config.algorithm.cfg.value_warmup_iterations:
            metrics["time/mfu"] = self._utilisation.of(decisions, metrics["train/epochs"], seconds)
        self.tracker.log(metrics, self.progress.env_steps)
        self._doubts.say("jump", describe_jump(metrics.get("train/approx_kl", 0.0), self.progress.env_steps))
        if isinstance(episodes := self.parts.rollouts.episodes, EpisodeStatistics):  # groups are of whole episodes
            self._doubts.say("endless", episodes.describe_endless(self.trainer.max_eval_steps))
        self._bar.set_postfix(postfix(metrics, self.result))
        self._bar.update(env_steps)
        self._bar.set_description_str("training")

    def evaluate(self, film: int = 0) -> None:
        """Evaluate the policy as it is, unless that was done; the best one so far is kept as a checkpoint."""
        parts, trainer, progress, step = self.parts, self.trainer, self.progress, self.progress.env_steps
        if self.evaluated_at == step:
            return
        states = self.world.shares(range(trainer.num_eval_episodes))
        with self._progress_of("evaluating", len(states), "episode", leave=False) as bar:
            result = evaluate(
                parts.eval_env, parts.policy.act, states, film if self.world.leads else 0, trainer.max_eval_steps,
                lambda done: bar.update(done - bar.n), trainer.eval_mode,
            )  # fmt: skip
        result.episodes = [episode for part in self.world.gather(result.episodes) for episode in part]
        if self.world.leads:
            self._record(result, step, film > 0)
        self.result, self.evaluated_at = result, step
        if progress.iteration == 0:
            progress.before = result.metrics()
        if result.score > progress.best:
            progress.best = result.score
            self.save(best=True)

    def _record(self, result: Evaluation, step: int, episodes: bool) -> None:
        """Write an evaluation into the run's folder, and to W&B; there as a table of its `episodes`, too, if asked."""
        # In this order: where there are metrics, there are all episodes (`resuming.evaluation_at`).
        append_rows(self.folder.episodes, result.rows(global_step=step, seed=self.trainer.seed))
        self.tracker.log(result.metrics() | self.parts.audit.drift(), step)
        if episodes:
            self.tracker.log_episodes(result.rows(), result.frames, step)
        if result.frames:
            path = self.folder.video(step)
            grid = video_grid(result.frames, columns=4, success=result.filmed_success, captions=result.captions)
            write_video(grid, path, fps=10)
            self.tracker.log_video("eval/video", path, step)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint that `trainer.resume` goes on from, once it is sure that frozen weights are as before.

        The run goes on while it is written.

        Raises:
            NonFiniteError: a weight is not a number; the checkpoint before stays as it is.
        """
        parts = self.parts
        when = f"at env step {self.progress.env_steps}"
        check_finite(((f"weight {n}", p) for n, p in parts.policy.model.named_parameters() if p.requires_grad), when)
        parts.audit.check(when)
        ranks = None
        if self.world.size > 1:
            ranks = self.world.gather({"rollouts": parts.rollouts.state_dict(), "rng": generators()})
        if self.world.leads or self.trainer.sharding != "none":  # then all have to put together what is divided
            state = self._take(ranks)
        if self.world.leads:
            self.writer.submit(state, best)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End the run; see the table in the class's docstring. What it does not know is raised on."""
        known = error is None or isinstance(error, tuple(STOPPED_BY))
        with self._at_exit:
            error = self._finish_writing(error)
            self.code = self._interruption.code
            reason = "signal" if self.code else None
            if error is not None:
                self.code = 130 if isinstance(error, KeyboardInterrupt) else 1
                reason = next((name for kind, name in STOPPED_BY.items() if isinstance(error, kind)), "error")
                why = "stopped at once" if isinstance(error, KeyboardInterrupt) else f"error: {said(error)}; stopped"
                who = "" if self.world.size == 1 else f"process {self.world.rank}: "
                where = f"at env step {self.progress.env_steps}"
                if self.world.leads or not isinstance(error, PeerEnded):  # those say it once
                    print(f"{who}{why} {where}, {last_checkpoint(self.folder)}", file=sys.stderr)
                if reason in ALERTED:
                    self.tracker.alert(f"stopped: {reason}", f"{said(error)} ({where})")
            facts = {"exit_code": self.code, "stopped_by": reason, **self.parts.audit.summary()}
            try:
                progress = self.progress
                if self.world.leads:
                    facts |= {"machine": machine(self.parts.device), "wandb_url": self.tracker.url}
                    of_run, at = (progress.before, self.result, facts), self.evaluated_at
                    summarise(self.tracker, self.folder, progress.env_steps, *of_run, at)
            except (OSError, UserError) as second:
                print(f"error: no summary: {said(second)}", file=sys.stderr)
                self.code = self.code or 1
            if self.tracker.stopped and self.code > 128:
                self.code = 0  # what its sweep asked for is no failure; an agent gives up after a few of those
            elif self.code > 130 and self.tracker.run:
                self.tracker.run.mark_preempting()  # the sweep queues this run again
            self.tracker.finish(self.code)
            if error is None:
                self._leave_together()
        self.parts.eval_env.close()
        return known

    def _leave_together(self) -> None:
        """Wait for rank 0, and take its exit code."""
        try:
            self.code = self.world.leaders(self.code)
            self.world.leave()
        except PeerEnded as error:
            print(f"error: {said(error)}", file=sys.stderr)
            self.code = 1

    def _finish_writing(self, error: BaseException | None) -> BaseException | None:
        """Bring all checkpoints to the disk, and what was held where the run broke; returns what ended the run."""
        try:
            if error is not None and not isinstance(error, NonFiniteError | FrozenWeightsChanged | KeyboardInterrupt):
                self._write_held()
            self.writer.wait()
        except UserError as second:
            return error or second
        return error
