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
| `rollout/decisions`                     | –         | of the rollout, where each is several control steps          |
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
| `train/grad_norm/<part>`                | L2 norm   | gradient of one named part of the model, before clipping     |
| `train/learning_rate/<part>`            | –         | its learning rate                                            |
| `audit/drift/<part>`                    | –         | how far its weights are from those at the start; 0 if frozen |
| `eval/success_rate`                     | 0..1      | success at any step, over the fixed evaluation states        |
| `eval/success_rate/<task>`              | 0..1      | the same of one task, where there are several                |
| `eval/success_at_end`                   | 0..1      | success at the last step, where that is another number       |
| `eval/success_low`, `eval/success_high` | 0..1      | its 95 % interval                                            |
| `eval/return`                           | reward    | mean undiscounted return of the evaluation                   |
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
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from research.runs.folder import RunFolder, as_json, read_json, read_rows, replace_rows, write_json
from research.schema import UserError, one_line

if TYPE_CHECKING:
    import wandb

WANDB_MODES = ("online", "offline", "shared", "disabled")

# Seconds that W&B may hold a run up where the network is gone; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override.
_WANDB_TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 60.0}
_QUIET_S = 2.0  # of waiting for W&B, before it is said what is being waited for


def resolve_wandb_mode(use_wandb: bool) -> tuple[str, str]:
    """Decide how this run talks to W&B, without a prompt and without the network.

    `WANDB_MODE` wins; then `use_wandb`; then `wandb offline` / `wandb disabled`, where the user has run them; then
    online where credentials are configured (environment, netrc or W&B settings), else offline.

    Returns:
        mode: one of `WANDB_MODES`.
        reason: why, in a few words.
    Raises:
        UserError: an unknown `WANDB_MODE`, or credentials and W&B settings that W&B itself refuses.
    """
    asked = os.environ.get("WANDB_MODE")
    if asked is not None and asked not in WANDB_MODES:
        raise UserError(f"WANDB_MODE is {asked!r}; set it to one of {', '.join(WANDB_MODES)}, or unset it")
    if asked in ("offline", "disabled"):
        return asked, f"WANDB_MODE={asked}"
    if not asked and not use_wandb:
        return "disabled", "trainer.use_wandb is false"

    settings = _set_up_wandb()
    import wandb

    if settings.mode in ("offline", "disabled"):
        return settings.mode, f"`wandb {settings.mode}` was run here; `wandb online` undoes it"
    try:
        has_credentials = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(
            f"W&B refuses its credentials: {error}; correct or unset them, or set WANDB_MODE=offline"
        ) from error
    if not has_credentials:
        return "offline", "no API key is configured; `wandb login` adds one"
    return asked or "online", f"WANDB_MODE={asked}" if asked else "an API key is configured"


def _set_up_wandb() -> wandb.Settings:
    """Start the W&B session of this process, mute, and return its settings."""
    # W&B's own error reports hold the exit up for 20 s behind a firewall that drops packets.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # wandb takes a second to import, which a run with W&B disabled need not wait for.
    import wandb

    try:
        return wandb.setup(wandb.Settings(silent=True, quiet=True, console="off")).settings
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"a W&B setting in the environment or its settings file is wrong: {_without_advice(error)}"
        ) from error


def git_commit() -> str | None:
    """The short commit of this code, with `-dirty` where tracked files were changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


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
        resume_id: W&B id of the run to continue; None starts a new one. Inside a sweep the agent's id is taken.
        resume_step: `global_step` of the checkpoint that the run continues from: later rows of `metrics.jsonl` are
            dropped, as the run will write them again; -1 drops all. W&B cannot drop what it has.
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
        resume_id: str | None = None,
        resume_step: int | None = None,
    ):
        self.folder = RunFolder(folder)
        self.mode = mode
        self.run: wandb.Run | None = None
        self.sync_command: str | None = None
        self.stopped = False
        try:
            elapsed = _keep_rows_until(self.folder.metrics, resume_step)
            self._metrics = self.folder.metrics.open("a", encoding="utf-8")
            write_json(self.folder.config, config)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error}") from error
        self._summary = read_json(self.folder.summary) if self.folder.summary.exists() else {}
        self._start = time.monotonic() - elapsed

        if mode != "disabled":
            commit = git_commit()
            names = {
                "run_id": resume_id or _run_id(self.folder),
                "resume": "allow" if resume_id else None,
                "project": project,
                "run_group": group,
                "run_job_type": "train",
                "run_tags": [*tags, *([commit] if commit else [])],
                "run_name": self.folder.path.name,
            }
            reason = self._start_wandb(names, flat_config, reason)
        print(self._wandb_line(reason), flush=True)

    def _start_wandb(self, names: dict[str, Any], flat_config: Mapping[str, Any], reason: str) -> str:
        """Start the W&B run, offline where online fails; return the reason for the mode it ended up in."""
        server = _set_up_wandb().base_url
        import wandb

        limits = {name: _timeout(name) for name in _WANDB_TIMEOUTS}
        names |= limits
        try:
            settings = wandb.Settings(
                **names,
                mode=self.mode,
                root_dir=str(self.folder.path.resolve()),
                reinit="finish_previous",  # by default W&B hands back a run that is still open, and mixes the two
                finish_timeout_raises=True,
                stop_fn=lambda: self._stop(),  # W&B copies its settings deeply, but not functions
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(f"W&B refuses a name of this run: {_without_advice(error)}") from error
        try:  # inside a sweep, W&B takes project and id from its agent and not from these settings
            with _saying_what_is_waited_for(f"{server} to answer", limits["init_timeout"], self.mode):
                self.run = wandb.init(config=dict(flat_config), settings=settings)
        except (wandb.Error, TimeoutError) as error:
            if self.mode == "offline":
                raise
            wandb.teardown()  # the old session still holds the run's id
            _set_up_wandb()
            reason = f"{self.mode} failed: {_without_advice(error)}"
            self.mode = settings.mode = "offline"
            self.run = wandb.init(config=dict(flat_config), settings=settings)
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        if self.mode == "offline":
            self.sync_command = self._sync("offline-run-*")
        return reason

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
        if self.run:
            self.run.log(row)

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

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the run's results: `summary.json`, replaced as a whole, and W&B's summary."""
        self._summary |= values
        write_json(self.folder.summary, self._summary)
        if self.run:
            self.run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and the W&B run; a second call does nothing.

        Waits for uploads, at most 60 s (`WANDB_FINISH_TIMEOUT`), then says how to upload the rest.
        """
        with suppress(OSError):  # a full disk; whoever logged the row was told
            self._metrics.close()
        run, self.run = self.run, None
        if run:
            try:
                with _saying_what_is_waited_for("the upload", _timeout("finish_timeout"), self.mode):
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

    def finish(self, exit_code: int = 0) -> None: ...

    def __enter__(self) -> SilentTracker:
        return self

    def __exit__(self, *_) -> None: ...


def _timeout(name: str) -> float:
    """Seconds that W&B may take for something; its own variable in the environment wins."""
    try:
        return float(os.environ.get(f"WANDB_{name.upper()}", _WANDB_TIMEOUTS[name]))
    except ValueError:
        raise UserError(
            f"WANDB_{name.upper()}: {os.environ[f'WANDB_{name.upper()}']!r} is no number of seconds"
        ) from None


@contextmanager
def _saying_what_is_waited_for(what: str, seconds: float, mode: str) -> Iterator[None]:
    """Say on the screen what W&B is waiting for, and how long at most, where it takes more than a moment."""
    line = f"W&B: waiting for {what}, at most {seconds:g} s; everything is in the run folder as well"
    timer = threading.Timer(_QUIET_S, lambda: print(line, flush=True))
    timer.daemon = True
    if mode != "offline":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _run_id(folder: RunFolder) -> str:
    """The id that `RunFolder.create` gave this folder."""
    return os.environ.get("WANDB_RUN_ID") or folder.id


def _without_advice(error: Exception) -> str:
    """An error of W&B on one line, less the advice in it that is not ours to give."""
    return re.split(r"Consider increasing|For further information", one_line(error))[0].strip()


def _keep_rows_until(path: Path, step: int | None) -> float:
    """Drop the rows of a metrics file with a later `global_step`; return `time/elapsed_s` of the last one kept."""
    if not path.exists():
        return 0.0
    rows = read_rows(path)
    if rows and step is None:
        raise UserError(f"{path} has the metrics of a run already: resume that run, or take another folder")
    kept = [row for row in rows if row["global_step"] <= step]
    replace_rows(path, kept)
    return kept[-1]["time/elapsed_s"] if kept else 0.0


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the rows of a run's `metrics.jsonl`, oldest first; null is NaN, a torn last line is left out.

    Raises:
        UserError: no such file, or a line before the last one is not JSON.
    """
    path = RunFolder(folder).metrics
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {path.name}")
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in read_rows(path)]
