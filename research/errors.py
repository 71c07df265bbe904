"""What a user is told in one line; imports nothing, so that help and refusals need not wait for torch."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong. Scripts print the message as one line and exit with code 2."""


def one_line(error: BaseException) -> str:
    """An exception's text on one line, for a `UserError`."""
    return " ".join(str(error).split())
