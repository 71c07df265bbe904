"""Bytes that live at once, by hand and as torch's own profiler counts them."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from agents.live_bytes import LiveBytes, bytes_of

KB = 256  # float32


def test_storages_count_from_when_they_are_made_until_they_are_freed():
    there = torch.ones(KB)
    with LiveBytes([there]) as live:
        there.mul_(2)  # was there before
        one = there + 1
        view = one.view(16, 16).t()  # no memory of its own
        two = one + view.flatten()  # which copies: three at once
        del one, view
        three = two + 1  # two at once
    assert live.peak() == 3 * 1024
    assert live.peak(without=live.of([two])) == 2 * 1024
    assert len(live.of([there, two, three])) == 2


def test_without_a_storage_the_peak_may_be_elsewhere():
    with LiveBytes() as live:
        large = torch.ones(10 * KB)
        del large
        kept = torch.ones(KB)
        other = torch.ones(2 * KB)
    assert live.peak() == 10 * 1024
    assert bytes_of([kept, other, other[:3]]) == 3 * 1024


def test_gradients_and_saved_activations_are_seen_as_the_profiler_sees_them():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(4)))
    x = torch.randn(128, 64)
    there = [*net.parameters(), x]
    with LiveBytes(there) as live:
        net(x).square().mean().backward()
    net.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        net(x).square().mean().backward()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():  # one thread: in order
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert abs(live.peak() / most - 1) < 0.02
    gradients = [p.grad for p in net.parameters()]
    assert len(live.of(gradients)) == 0  # of the second pass, which it did not watch
