"""Shared by the tests of environments: users' packages can be imported, and warnings given once are given anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.failures import warn_once


@pytest.fixture(autouse=True)
def _user_package_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    warn_once.cache_clear()
