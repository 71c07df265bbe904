"""Kept outputs of frozen stages within a budget of bytes."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from worlds import gradients_of, rollout_batch, small_model

from agents.cost import reuse_report
from agents.feature_budget import FeatureBudget, StageCost, best_kept, needed
from agents.policy import VLAPolicy
from envs.tabletop import TabletopEnv
from research.training.freezing import freeze

PIXELS, PATCHES, KV = ("observation", "rgb"), "patches", "kv"
# A chain: a large output behind a cheap stage, a small one before it. And a stage apart.
VISION = StageCost((PIXELS,), (PATCHES,), bytes=100, flops=1000)
PREFIX = StageCost((PATCHES,), (KV,), bytes=1000, flops=4000)
DEPTH = StageCost((("observation", "depth"),), ("depth",), bytes=50, flops=200)


@pytest.mark.parametrize(
    ("room", "kept", "running"),
    [
        (0, set(), [0, 1, 2]),
        (49, set(), [0, 1, 2]),
        (50, {2}, [0, 1]),  # 4 FLOPs a byte, where 10 do not fit
        (149, {0}, [1, 2]),
        (150, {0, 2}, [1]),
        (999, {0, 2}, [1]),
        (1000, {1}, [2]),  # 4.4 more FLOPs for each of 900 more bytes: patches are superfluous then
        (1050, {1, 2}, []),
    ],
)
def test_what_saves_most_per_byte_is_kept(room, kept, running):
    costs = [VISION, PREFIX, DEPTH]
    read = {KV, "depth"}
    assert best_kept(costs, read, room) == kept
    assert needed(costs, kept, read) == running


def test_a_stage_that_spares_nothing_is_not_kept():
    normalised = StageCost((PIXELS,), ("normalised",), bytes=10, flops=0)
    assert best_kept([normalised], {"normalised"}, 1e9) == set()


stage_costs = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 7)), min_size=1, max_size=5)


@given(stage_costs, st.integers(0, 200))
def test_the_room_is_never_passed_and_more_of_it_never_costs_more(drawn, room):
    """Stages that read the outputs of any earlier ones; the last is read, and by chance others."""
    costs, read = [], {len(drawn) - 1}
    for i, (size, flops, before) in enumerate(drawn):
        reads = tuple(j for j in range(i) if before >> j & 1)
        costs.append(StageCost(reads, (i,), size, flops))
        read |= {i} if before & 1 else set()
    kept = best_kept(costs, read, room)
    assert sum(costs[i].bytes for i in kept) <= room
    running = needed(costs, kept, read)
    wanted = read.union(*(costs[i].reads for i in running))
    assert wanted <= kept | {*running}  # everything that is read is kept or computed
    subsets = chain.from_iterable(combinations(range(len(costs)), n) for n in range(len(costs) + 1))
    least = min(sum(costs[i].flops for i in needed(costs, set(s), read)) for s in subsets)
    everything = needed(costs, best_kept(costs, read, 1e9), read)
    assert sum(costs[i].flops for i in everything) == least


def observations() -> TensorDict:
    return TabletopEnv(2, modalities=["rgb", "proprio", "language"]).reset()["observation"]


def policy_with(room: float | None) -> VLAPolicy:
    torch.manual_seed(0)
    model = small_model()
    freeze(model, ["vision_encoder", "language_encoder"])
    few = observations()
    return VLAPolicy(model, budget=None if room is None else FeatureBudget(room, few))


TOKENS = 64 * 8 * 4  # bytes of the vision encoder's


def test_without_room_frozen_stages_run_in_the_update_and_give_the_same_gradients():
    policies = {room: policy_with(room) for room in (None, TOKENS, TOKENS - 1)}
    assert [len(p.update.stages) - len(p.rest.stages) for p in policies.values()] == [0, 1, 2]
    all_keys = {key for policy in policies.values() for key in policy.kept_keys}
    keys = {room: policy.kept_keys for room, policy in policies.items()}
    policies[None].kept_keys = list(all_keys)
    batch = rollout_batch(policies[None])
    rest = [key for key in batch.keys(True, True) if key not in all_keys]
    gradients = {room: gradients_of(p, batch.select(*keys[room], *rest)) for room, p in policies.items()}
    for room in (TOKENS, TOKENS - 1):
        for ours, kept in zip(gradients[room], gradients[None], strict=True):
            torch.testing.assert_close(ours, kept, rtol=1e-5, atol=1e-6)
    assert ("observation", "rgb") in keys[TOKENS - 1] and ("observation", "rgb") not in keys[TOKENS]
    # The instruction is looked up, as at collection: no features of it are kept where there is a limit.
    assert "language_features" not in keys[TOKENS] and ("observation", "language") in keys[TOKENS]


def test_the_report_says_what_had_no_room_and_never_calls_more_memory_a_saving():
    few = observations()
    everything, tight = (reuse_report(policy_with(room), few) for room in (None, TOKENS - 1))
    assert everything.frozen_stages == ["vision_encoder", "language_encoder"]
    assert tight.frozen_stages == ["language_encoder"]
    why = f"its {TOKENS:,} bytes per transition have no room in policy.feature_memory"
    assert tight.blocked_stages == [("vision_encoder", why)]
    assert tight.trained_flops > 10 * everything.trained_flops
    assert tight.bytes_after == tight.bytes_before - 64 * 7  # a rollout keeps text in bytes
    everything.bytes_after = everything.bytes_before + 1
    assert "more memory, for less work" in everything.lines()[0] and "instead of" not in everything.lines()[0]
