"""Shared by all tests: one thread, no W&B, and small worlds."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_no_account(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what runs choose their number of threads by
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
