"""A run's newest and best checkpoint as W&B artifacts, sent by a thread of their own, and what the run started from.

One artifact per run, `checkpoint-<run id>` of type model, with the aliases `latest` and `best`. Its files lie as in a
run folder (`config.json`, `checkpoints/`), so that whatever reads one reads what was downloaded. Versions that have
lost their alias are deleted, as W&B documents it (docs.wandb.ai, "Delete an artifact"); one that a user gave an alias
stays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from research.runs.folder import FROZEN, MANIFEST, RunFolder, step_of
from research.runs.wandb_session import without_advice

if TYPE_CHECKING:
    import wandb

EVERY_S = 600.0  # between uploads of a run: it may write a checkpoint every few seconds
SCHEME = "wandb:"


class CheckpointUploads:
    """Sends checkpoints while the run goes on; what fails is said once, and the run does not notice.

    Where the next one is there before the last was sent, it takes its place: at most two wait, the best and the newest.

    Args:
        run: the W&B run, online.
        start: what the run started from, `policy.vla_config.model_path`: an input of the run on W&B. None: nothing.
        every_s: seconds from one upload to the next.
    """

    def __init__(self, run: wandb.Run, start: str | None = None, every_s: float = EVERY_S):
        self.run, self._every_s = run, every_s
        self._waiting: dict[str, Path] = {}  # alias -> checkpoint
        self._changed = threading.Condition()
        self._closing = self._given_up = self._failed = False
        # A daemon: an upload that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, args=(start,), name="checkpoint uploads", daemon=True)
        self._thread.start()

    def offer(self, path: Path) -> None:
        """Send a checkpoint's folder, `best_<n>` or `step_<n>`, when it is its turn; returns at once."""
        with self._changed:
            self._waiting["best" if path.name.startswith("best_") else "latest"] = path
            self._changed.notify()

    def finish(self, seconds: float) -> bool:
        """Send what waits, for so long at most; returns whether everything was sent.

        What is still being prepared then is dropped: a client that is told of a file after its run has ended may never
        come back, and the process with it.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._given_up = self._thread.is_alive()
        return not self._given_up and not self._failed

    def _work(self, start: str | None) -> None:
        if start:
            self._trying("what the run started from is not on its page", lambda: self._use(start))
        due = time.monotonic() + self._every_s
        while True:
            with self._changed:
                while not self._closing and (not self._waiting or time.monotonic() < due):
                    self._changed.wait(max(0.0, due - time.monotonic()) if self._waiting else None)
                waiting, self._waiting = self._waiting, {}
            if not waiting or self._given_up:
                return
            while waiting:
                with self._changed:  # one that a newer one has replaced meanwhile may be removed already
                    waiting = {alias: self._waiting.pop(alias, path) for alias, path in waiting.items()}
                # W&B moves `latest` to whatever came last, so the best goes before a newest that is as old or older.
                alias = min(waiting, key=lambda alias: (step_of(waiting[alias]), alias))
                path = waiting.pop(alias)
                self._trying(f"{path} is not there", lambda alias=alias, path=path: self._send(alias, path))
            due = time.monotonic() + self._every_s

    def _trying(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the client raises nearly anything; a run is worth more than its copy
            if not self._failed:
                print(f"W&B: {what}: {without_advice(error)}; the run goes on", flush=True)
            self._failed = True

    def _use(self, start: str) -> None:
        import wandb

        if start.startswith(SCHEME):
            self.run.use_artifact(start.removeprefix(SCHEME), type="model")
            return
        path = Path(start).expanduser().resolve()
        artifact = wandb.Artifact(f"start-{wandb.util.make_artifact_name_safe(path.stem)}", type="model")
        artifact.add_reference(path.as_uri())  # its sums and where it is; the file itself stays here
        self.run.use_artifact(artifact)

    def _send(self, alias: str, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"global_step": step_of(path)})
        folder = RunFolder.containing(path)
        artifact.add_file(str(folder.config), folder.config.name, skip_cache=True)
        for part in (path, folder.checkpoints / FROZEN):
            if part.is_dir():
                artifact.add_dir(str(part), f"{folder.checkpoints.name}/{part.name}", skip_cache=True)
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError("it was removed before it was sent")
        if self._given_up:
            return
        self.run.log_artifact(artifact, aliases=[alias]).wait()
        for version in wandb.Api().artifacts("model", artifact.qualified_name.partition(":")[0]):
            if not version.aliases:
                version.delete()
