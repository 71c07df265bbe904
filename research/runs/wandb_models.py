"""Weights that are named by a W&B artifact, `wandb:entity/project/name:alias`, on this machine."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from research.errors import UserError
from research.runs.wandb_checkpoints import SCHEME
from research.runs.wandb_session import set_up_wandb, without_advice

_FORM = re.compile(r"(?P<collection>[^/:]+/[^/:]+/[^/:]+)(:(?P<alias>[^/:]+))?")


def fetch(reference: str) -> tuple[str, Path]:
    """Download an artifact of type model, unless its version is here already.

    Args:
        reference: "wandb:entity/project/name:alias"; an alias is `best`, `latest` (which none means), a version as in
            `v3`, or a user's own.
    Returns:
        the reference with its version in place of the alias, which may move on; the folder of its files, in
        `$XDG_CACHE_HOME/vla-rl/wandb`.
    Raises:
        UserError: it is of another form, W&B has no such thing, or W&B is offline and the version not here.
    """
    match = _FORM.fullmatch(reference.removeprefix(SCHEME))
    if match is None:
        raise _problem(reference, "is not of the form wandb:entity/project/name:alias")
    collection, alias = match["collection"], match["alias"] or "latest"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-rl" / "wandb"
    if re.fullmatch(r"v\d+", alias) and (cache / collection / alias).is_dir():
        return f"{SCHEME}{collection}:{alias}", cache / collection / alias
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise _problem(reference, "is not on this machine, and WANDB_MODE keeps W&B from being asked; unset it once")
    set_up_wandb()
    import wandb

    try:
        artifact = wandb.Api().artifact(f"{collection}:{alias}", type="model")
        folder = cache / collection / artifact.version
        if not folder.is_dir():
            # As a whole or not at all: other processes of the run may be at it, too.
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            artifact.download(root=str(partial), skip_cache=True)
            if not folder.is_dir():
                partial.rename(folder)
            shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # not all that the client raises is a wandb.Error
        raise _problem(reference, f"cannot be had from W&B: {without_advice(error)}") from error
    return f"{SCHEME}{collection}:{artifact.version}", folder


def _problem(reference: str, what: str) -> UserError:
    return UserError(f"policy.vla_config.model_path: {reference} {what}")
