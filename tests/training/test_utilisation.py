"""Utilisation is the model's arithmetic over what the device could have done."""

from __future__ import annotations

import pytest
import torch

from research.training.utilisation import Utilisation, matmul_flops_per_second


def test_it_is_arithmetic_over_speed_times_seconds():
    # 100 transitions, each 2 FLOPs to collect and 3 per pass; two passes: 800 FLOPs, of 4 s x 1000.
    assert Utilisation(collected=2.0, trained=3.0, peak=1000.0).of(100, passes=2, seconds=4.0) == pytest.approx(0.2)


def test_the_peak_is_measured_once_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    peak = matmul_flops_per_second(torch.float32, torch.device("cpu"))
    assert 1e8 < peak < 1e15 and peak == matmul_flops_per_second(torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
