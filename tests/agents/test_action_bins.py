"""Bins of actions: as OpenVLA's public code defines them, in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from agents.action_bins import ActionBins

TOKENS = 32000
EDGES = np.linspace(-1, 1, 256)


def test_numbers_become_the_tokens_that_openvla_was_trained_with():
    numbers = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 1000), EDGES, [-1.0, 0.0, 1.0, 5.0, -5.0]])
    expected = TOKENS - np.digitize(np.clip(numbers, -1, 1), EDGES)
    ids = ActionBins(TOKENS).ids(torch.tensor(numbers).view(13, -1)).flatten()
    assert ids.tolist() == expected.tolist() and {ids.min().item(), ids.max().item()} == {TOKENS - 256, TOKENS - 1}


def test_tokens_become_the_middles_of_255_intervals():
    ids = torch.arange(TOKENS - 256, TOKENS)
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    expected = centres[np.clip(TOKENS - ids.numpy() - 1, 0, 254)]
    numbers = ActionBins(TOKENS).numbers(ids)
    torch.testing.assert_close(numbers, torch.tensor(expected).float(), rtol=0, atol=1e-7)
    assert numbers[0] == numbers[1] and ActionBins(TOKENS).first_id == TOKENS - 256
    back = ActionBins(TOKENS).ids(numbers)
    assert torch.equal(back[1:], ids[1:]) and back[0] == ids[1]  # the first two tokens say the same
