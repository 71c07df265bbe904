"""Which configuration a script starts from where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "pick_place.json"


def with_default_config(argv: Sequence[str]) -> list[str]:
    """Arguments that start from the main job's configuration unless they name one of their own."""
    names_one = any(word == "--config" or word.startswith("--config=") for word in argv)
    return [*argv] if names_one else [f"--config={DEFAULT_CONFIG}", *argv]
