"""One run = one folder + one W&B run + `metrics.jsonl`, a local mirror that loses nothing when a process is killed.

Metrics, the same names in every script, all against `global_step`:

| name                                    | unit      | meaning                                                      |
|-----------------------------------------|-----------|--------------------------------------------------------------|
| `global_step`                           | env steps | control steps taken so far, over all environments            |
| `time/elapsed_s`                        | s         | wall clock since the run began, pauses left out               |
| `rollout/success_rate`                  | 0..1      | success at any step, over the episodes that began in one     |
|                                         |           | rollout, once all of them have ended (research.training)     |
| `rollout/success_rate/<task>`           | 0..1      | the same of one task, where there are several                |
| `rollout/success_at_end`                | 0..1      | success at the last step, where episodes go on after success |
| `rollout/return`                        | reward    | mean undiscounted return of those episodes                   |
| `rollout/episode_length`                | env steps | their mean length                                            |
| `rollout/episodes`                      | –         | how many these are                                           |
| `rollout/decisions`                     | –         | that were learned from, where they are not the control steps |
| `rollout/staleness_mean`                | updates   | how far the weights that collected lag behind, mean          |
| `rollout/staleness_max`                 | updates   | the same, at most                                            |
| `rollout/discarded`                     | –         | transitions thrown away meanwhile, as they lag too far       |
| `rollout/behaviour_kl`                  | nats      | KL from what collected to what is updated                    |
| `rollout/importance_weight`             | –         | mean ratio of the two's probabilities                        |
| `rollout/worker_<i>/env_steps_per_second` | 1/s     | of one worker of Ray, while it collected its last rollout    |
| `rollout/workers_replaced`              | –         | workers of Ray that were lost, so far                        |
| `train/loss_objective`                  | –         | clipped PPO objective, mean over the update's minibatches    |
| `train/loss_critic`                     | –         | value loss, same mean                                        |
| `train/kl_reference`                    | nats      | GRPO: KL to the policy of the start, by sampled decisions    |
| `train/groups`                          | –         | GRPO: groups of episodes that were learned from              |
| `rollout/groups_left_out`               | –         | GRPO: others, whose episodes all had the same return         |
| `train/entropy`                         | nats      | entropy of the policy                                        |
| `train/approx_kl`                       | nats      | KL from the collecting to the updated policy: r - 1 - log r  |
| `train/clip_fraction`                   | 0..1      | samples whose probability ratio was clipped                  |
| `train/gradient_steps`, `train/epochs`  | –         | steps of the optimizer, and passes over the rollout          |
| `train/explained_variance`              | <= 1      | 1 - Var(target - value) / Var(target), before the update     |
| `train/grad_norm`                       | L2 norm   | gradient of all that trains, before clipping                 |
| `train/grad_norm/<part>`                | L2 norm   | gradient of one named part of the model, before clipping     |
| `train/learning_rate/<part>`            | –         | its learning rate                                            |
| `audit/drift/<part>`                    | –         | how far its weights are from those at the start; 0 if frozen |
| `eval/success_rate`                     | 0..1      | success at any step, over the fixed evaluation states        |
| `eval/success_rate/<task>`              | 0..1      | the same of one task, where there are several                |
| `eval/success_at_end`                   | 0..1      | success at the last step, where that is another number       |
| `eval/success_low`, `eval/success_high` | 0..1      | its 95 % interval                                            |
| `eval/return`                           | reward    | mean undiscounted return of the evaluation                   |
| `eval/episode_length`                   | env steps | their mean length                                            |
| `best/success_rate`, `best/return`      |           | the best of `eval/*` so far; W&B only                        |
| `eval/episodes`                         |           | the episodes as a table, where some were filmed; W&B only    |
| `eval/video`                            |           | films of some of them; W&B only                              |
| `time/env_steps_per_second`             | 1/s       | env steps per second of the whole iteration                  |
| `time/collect_s`, `time/update_s`       | s         | duration of the rollout and of the update                    |
| `time/mfu`                              | 0..1      | the model's FLOP/s over the device's, from measured peak     |
| `time/threads`                          | –         | threads that torch computes with                             |
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from research.errors import UserError
from research.runs.code_version import git_commit, repository, source_files
from research.runs.folder import RunFolder, as_json, read_json, read_rows, replace_rows, write_json
from research.runs.tensorboard import EventFiles
from research.runs.video import write_video
from research.runs.wandb_checkpoints import CheckpointUploads
from research.runs.wandb_session import start_wandb, timeout, waiting_for_wandb

if TYPE_CHECKING:
    import numpy as np
    import wandb

# Of these the best value so far is on W&B as well, as best/<name>: what a table of runs is sorted by.
BEST = ("eval/success_rate", "eval/return")
EPISODE_COLUMNS = ("initial_state", "task", "instruction", "success", "episode_return", "length", "cut_off")


def metric_names(here: bool = True) -> list[str]:
    """The names in the table above, in which `<task>` and the like stand for any text.

    Args:
        here: leave out those that are on W&B only, and not in `metrics.jsonl`.
    """
    rows = [line.split("|") for line in (__doc__ or "").splitlines() if line.startswith("| `")]
    return [
        name for _, names, _, meaning, _ in rows for name in re.findall("`(.*?)`", names)
        if not (here and "W&B only" in meaning)
    ]  # fmt: skip


class Tracker:
    """Writes one run's config, metrics, media and summary to its folder and to W&B.

    A context manager: leaving it finishes the W&B run with exit code 0, or 1 (130 for Ctrl-C) on an exception. One
    line on stdout at the start says where W&B data goes; W&B itself prints nothing.

    Args:
        folder: the run folder, which must exist.
        config: the resolved configuration, nested, for `config.json`.
        flat_config: the same with dotted keys, for W&B: a sweep sets dotted names, and one form is enough.
        project: W&B project. A sweep's runs go to the sweep's project instead.
        group: W&B group, what is compared within it: environment, algorithm and freeze scope.
        mode: see `resolve_wandb_mode`; online without a network becomes offline.
        reason: why this mode, for the line at the start.
        tags: W&B tags; the git commit is added.
        name: what W&B calls the run; None: as its folder. WANDB_NAME wins.
        entity: the W&B user or team that the project is of; None: the account's own.
        notes: what W&B shows beside the run.
        tensorboard: write TensorBoard's event files, too.
        resume_id: W&B id of the run to continue; None starts a new one. Inside a sweep the agent's id is taken.
        resume_step: `global_step` of the checkpoint that the run continues from: later rows of `metrics.jsonl` are
            dropped, as the run will write them again; -1 drops all. W&B cannot drop what it has.
        once_accepted: called when nothing that is asked for can be refused any more, before files are changed.
    Attributes:
        mode: the mode the run is in, after any fallback.
        run: the W&B run; None when disabled or finished.
        stopped: W&B asked the run to stop: early termination of its sweep, or the stop button of the UI.
        sync_command: what uploads data that is only on this machine; None where there is none.
    Raises:
        UserError: the folder cannot be written, it has metrics already and no `resume_step` is given, or W&B refuses
            a name (project, tags, id).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        flat_config: Mapping[str, Any],
        *,
        project: str,
        group: str,
        mode: str,
        reason: str = "",
        tags: Sequence[str] = (),
        name: str | None = None,
        entity: str | None = None,
        notes: str | None = None,
        tensorboard: bool = False,
        resume_id: str | None = None,
        resume_step: int | None = None,
        once_accepted: Callable[[], None] = lambda: None,
    ):
        self.folder = RunFolder(folder)
        self.mode = mode
        self.run: wandb.Run | None = None
        self.sync_command: str | None = None
        self.stopped = False
        self._uploads: CheckpointUploads | None = None
        _refuse_other_rows(self.folder.metrics, resume_step)
        self._summary = read_json(self.folder.summary) if self.folder.summary.exists() else {}
        self._best: dict[str, float] = {}
        self._events = EventFiles(self.folder, resume_step) if tensorboard else None

        if mode != "disabled":
            commit, top = git_commit(), repository()
            names = {
                "run_id": resume_id or os.environ.get("WANDB_RUN_ID") or self.folder.id,
                "resume": "allow" if resume_id else None,
                "project": project,
                "run_group": group,
                "run_job_type": "train",
                "run_tags": [*tags, *([commit] if commit else [])],
                "run_name": os.environ.get("WANDB_NAME") or name or self.folder.path.name,
                # W&B looks where the run folder is, which need not be where the code is.
                **({"git_root": str(top)} if top else {}),
                **({"entity": entity} if entity else {}),
                **({"run_notes": notes} if notes else {}),
            }
            # W&B copies its settings deeply, but not functions.
            self.run, self.mode, reason = start_wandb(
                names, flat_config, self.folder, mode, reason, lambda: self._stop()
            )
            self._define_metrics()
            if self.mode == "offline":
                self.sync_command = self._sync("offline-run-*")
        try:
            once_accepted()
            kept = _keep_rows_until(self.folder.metrics, resume_step)
            self._metrics = self.folder.metrics.open("a", encoding="utf-8")
            write_json(self.folder.config, config)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error}") from error
        self._start = time.monotonic() - (kept[-1]["time/elapsed_s"] if kept else 0.0)
        for row in kept:
            self._note_best(row)
        print(self._wandb_line(reason), flush=True)

    def _define_metrics(self) -> None:
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        # Rows of their own: by define_metric(summary="max") the value itself would become an object, {"max": ...}, and
        # sweeps and panels that name it would not find it.
        for name in BEST:
            self.run.define_metric(f"best/{name.removeprefix('eval/')}", step_metric="global_step", hidden=True)

    def _note_best(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The best values so far of what a row has of them."""
        for name in BEST:
            value = row.get(name)
            if value is not None and not math.isnan(value) and value > self._best.get(name, -math.inf):
                self._best[name] = value
        return {
            f"best/{name.removeprefix('eval/')}": self._best[name]
            for name in BEST
            if name in row and name in self._best
        }

    def _stop(self) -> None:
        """What W&B calls, in a thread of its own, to stop the run: a Ctrl-C that can be told from the user's."""
        self.stopped = True
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def _sync(self, pattern: str) -> str:
        # A pattern: a resumed run has one directory per start, and `wandb sync` joins them by the run's id.
        return f"wandb sync {shlex.quote(str(self.folder.wandb))}/{pattern}"

    def _wandb_line(self, reason: str) -> str:
        line = f"W&B: {self.mode}" + (f" ({reason})" if reason else "")
        if self.sync_command:
            return f"{line}; upload later with: {self.sync_command}"
        return f"{line}; {self.run.url}" if self.run and self.run.url else line

    @property
    def url(self) -> str | None:
        """The run's page on W&B; None where it is offline, disabled or finished."""
        return self.run.url if self.run and self.mode == "online" else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row to `metrics.jsonl`, flushed, and to W&B.

        Args:
            metrics: name to number or one-element tensor. NaN and infinities are null in the file.
            step: `global_step`, in env steps.
        """
        row = {"global_step": int(step), "time/elapsed_s": round(time.monotonic() - self._start, 3)}
        row |= {name: float(value) for name, value in metrics.items()}
        self._metrics.write(as_json(row) + "\n")
        self._metrics.flush()
        best = self._note_best(row)
        if self._events:
            self._events.log(row, step)
        if self.run:
            self.run.log(row | best)

    def log_video(self, key: str, path: str | Path, step: int) -> None:
        """Show the video file `path` (mp4, webm or gif) in W&B under `key`; the file stays where it is."""
        if self.run:
            import wandb

            self.run.log({key: wandb.Video(str(path)), "global_step": int(step)})

    def log_image(self, key: str, path: str | Path, step: int) -> None:
        """Show the image file `path` in W&B under `key`; the file stays where it is."""
        if self.run:
            import wandb

            self.run.log({key: wandb.Image(str(path)), "global_step": int(step)})

    def log_episodes(self, rows: Sequence[Mapping[str, Any]], shots: Sequence[np.ndarray], step: int) -> None:
        """Show an evaluation's episodes in W&B as the table `eval/episodes`, and keep W&B's `episodes.jsonl` as here.

        Args:
            rows: of `episodes.jsonl`.
            shots: the films of the first of them, uint8 `[T_i, H, W, 3]`.
            step: `global_step`.
        """
        if not self.run:
            return
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            films = []
            for place, frames in enumerate(shots):
                path = Path(folder, f"{place}.mp4")
                write_video(frames, path, fps=10)
                films.append(wandb.Video(str(path), format="mp4"))
            cells = [[*(row.get(name) for name in EPISODE_COLUMNS), film] for row, film in zip_longest(rows, films)]
            table = wandb.Table([*EPISODE_COLUMNS, "video"], cells)
            self.run.log({"eval/episodes": table, "global_step": int(step)})
        # What comparisons pair runs by: all evaluations in one file, and not a table each.
        self.run.save(str(self.folder.episodes), base_path=str(self.folder.path), policy="end")

    def save_code(self, modules: Sequence[str | None]) -> None:
        """Keep the files of a user's modules with the W&B run, as its code; this project's own are in its commit."""
        files = source_files([name for name in modules if name])
        if not self.run or not files:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, file in files.items():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            top = next(iter(files)).split("/")[0].removesuffix(".py")
            self.run.log_code(folder, name=f"source-{self.run.project}-{top}")

    def upload_checkpoints(self, start: str | None) -> None:
        """Keep the newest and the best checkpoint on W&B from now on, where the run is online.

        Args:
            start: what the run started from, `policy.vla_config.model_path`: its input on W&B.
        """
        if self.run and self.mode in ("online", "shared"):
            self._uploads = CheckpointUploads(self.run, start)

    def checkpoint_written(self, path: Path) -> None:
        """Tell of a checkpoint that is on the disk; returns at once."""
        if self._uploads:
            self._uploads.offer(path)

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the user, by mail or Slack as set there."""
        if self.run:
            self.run.alert(title=title, text=text, level="ERROR")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the run's results: `summary.json`, replaced as a whole, and W&B's summary.

        A newer evaluation takes the place of all that is known of an earlier one.
        """
        evaluations = {name.partition("/")[0] for name in values} & {"eval", "before"}
        kept = {name: value for name, value in self._summary.items() if name.partition("/")[0] not in evaluations}
        self._summary = kept | dict(values)
        write_json(self.folder.summary, self._summary)
        if self.run:
            self.run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and the W&B run; a second call does nothing.

        Waits for uploads, at most 60 s (`WANDB_FINISH_TIMEOUT`), then says how to upload the rest.
        """
        with suppress(OSError):  # a full disk; whoever logged the row was told
            self._metrics.close()
            if self._events:
                self._events.close()
        run, self.run = self.run, None
        if run:
            uploads, self._uploads = self._uploads, None
            limit = timeout("finish_timeout")
            try:
                with waiting_for_wandb("the upload", limit, self.mode):
                    if uploads and not uploads.finish(limit):
                        print(f"W&B: not all checkpoints were uploaded; they are in {self.folder.checkpoints}")
                    run.finish(exit_code=exit_code)
            except TimeoutError:
                self.sync_command = self._sync("run-*")
                print(f"W&B: the upload is not complete; complete it with: {self.sync_command}", flush=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        self.finish(code)


class SilentTracker:
    """What tracks nothing, for the processes of a run that leave it to another."""

    run = None
    stopped = False

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...

    def __enter__(self) -> SilentTracker:
        return self

    def __exit__(self, *_) -> None: ...


def _keep_rows_until(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Drop the rows of a metrics file with a later `global_step`; return those that are kept."""
    if not path.exists():
        return []
    kept = [row for row in read_rows(path) if row["global_step"] <= step]
    replace_rows(path, kept)
    return kept


def _refuse_other_rows(path: Path, step: int | None) -> None:
    if step is None and path.exists() and read_rows(path):
        raise UserError(f"{path} has the metrics of a run already: resume that run, or take another folder")


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the rows of a run's `metrics.jsonl`, oldest first; null is NaN, a torn last line is left out.

    Raises:
        UserError: no such file, or a line before the last one is not JSON.
    """
    path = RunFolder(folder).metrics
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {path.name}")
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in read_rows(path)]
