"""Whether a run folder was written here: its configuration names code, and code from elsewhere asks first.

A run signs its `config.json` with a key that only this user's account has (an HMAC, RFC 2104). A folder that was
downloaded, or edited, has no such signature.
"""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from research.runs.folder import RunFolder, replace_file


def sign(folder: RunFolder) -> None:
    """Mark a folder's configuration as written here; without a place for a key, it stays unmarked."""
    if key := _key():
        replace_file(folder.signature, _signature(folder, key) + "\n")


def is_ours(folder: RunFolder) -> bool:
    """Whether this account has signed the folder's configuration as it is now."""
    key = _key()
    try:
        return key is not None and hmac.compare_digest(folder.signature.read_text().strip(), _signature(folder, key))
    except (OSError, ValueError, TypeError):
        return False


def _signature(folder: RunFolder, key: bytes) -> str:
    return hmac.new(key, folder.config.read_bytes(), "sha256").hexdigest()


def _key() -> bytes | None:
    """This account's key, made at its first use; None where the account has no folder to keep it in."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(home) / "vla-rl" / "key"
    with suppress(OSError, RuntimeError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"key.{os.getpid()}")
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with suppress(FileExistsError):
                os.link(draft, path)  # two first runs at a time: one key
            draft.unlink()
        return path.read_bytes()
    return None
