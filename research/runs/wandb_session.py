"""W&B's session in this process: how a run talks to W&B, how long it waits for it, and what is said meanwhile."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from research.errors import UserError, one_line
from research.runs.folder import RunFolder

if TYPE_CHECKING:
    import wandb

WANDB_MODES = ("online", "offline", "shared", "disabled")

# Seconds that W&B may hold a run up where the network is gone; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override.
WANDB_TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 60.0}
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

    settings = set_up_wandb()
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


def set_up_wandb() -> wandb.Settings:
    """Start the W&B session of this process, mute, and return its settings.

    A session reads the environment once. One that was read from another environment (in a notebook, before
    `WANDB_BASE_URL` was set) is ended and started anew, unless a run is open in it.
    """
    # W&B's own error reports hold the exit up for 20 s behind a firewall that drops packets.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # wandb takes a second to import, which a run with W&B disabled need not wait for.
    import wandb

    mute = wandb.Settings(silent=True, quiet=True, console="off")
    try:
        session = wandb.setup(mute)
        if session.did_environment_change() and wandb.run is None:
            wandb.teardown()
            session = wandb.setup(mute)
        return session.settings
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"a W&B setting in the environment or its settings file is wrong: {without_advice(error)}"
        ) from error


def start_wandb(
    names: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: RunFolder,
    mode: str,
    reason: str,
    stop: Callable[[], None],
) -> tuple[wandb.Run, str, str]:
    """Start a W&B run, offline where online fails.

    Args:
        names: the run's identity, as W&B's settings.
        config: with dotted keys.
        folder: of the run, where W&B puts its files.
        mode, reason: see `resolve_wandb_mode`.
        stop: called in a thread of W&B's own where it asks the run to stop.
    Returns:
        the run; the mode that it is in; why.
    Raises:
        UserError: W&B refuses a name.
    """
    server = set_up_wandb().base_url
    import wandb

    limits = {name: timeout(name) for name in WANDB_TIMEOUTS}
    try:
        settings = wandb.Settings(
            **names,
            **limits,
            mode=mode,
            root_dir=str(folder.path.resolve()),
            console="wrap",  # what is printed is on the run's page
            reinit="finish_previous",  # by default W&B hands back a run that is still open, and mixes the two
            finish_timeout_raises=True,
            stop_fn=stop,
        )
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B refuses a name of this run: {without_advice(error)}") from error
    try:  # inside a sweep, W&B takes project and id from its agent and not from these settings
        with waiting_for_wandb(f"{server} to answer", limits["init_timeout"], mode):
            return wandb.init(config=dict(config), settings=settings), mode, reason
    except (wandb.Error, TimeoutError) as error:
        if mode == "offline":
            raise
        wandb.teardown()  # the old session still holds the run's id
        set_up_wandb()
        settings.mode = "offline"
        reason = f"{mode} failed: {without_advice(error)}"
        return wandb.init(config=dict(config), settings=settings), "offline", reason


def timeout(name: str) -> float:
    """Seconds that W&B may take for something; its own variable in the environment wins."""
    try:
        return float(os.environ.get(f"WANDB_{name.upper()}", WANDB_TIMEOUTS[name]))
    except ValueError:
        raise UserError(
            f"WANDB_{name.upper()}: {os.environ[f'WANDB_{name.upper()}']!r} is no number of seconds"
        ) from None


@contextmanager
def waiting_for_wandb(what: str, seconds: float, mode: str) -> Iterator[None]:
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


def without_advice(error: Exception) -> str:
    """An error of W&B on one line, less the advice in it that is not ours to give."""
    return re.split(r"Consider increasing|For further information", one_line(error))[0].strip()
