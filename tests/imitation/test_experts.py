"""research/imitation/experts.py: the tabletop's expert, and which initial states it may start from."""

from __future__ import annotations

import pytest
import torch

from envs.tabletop import TabletopEnv
from research.errors import UserError
from research.imitation.experts import check_states, collect_rollout


def reach(**options) -> TabletopEnv:
    return TabletopEnv(4, "reach", image_size=16, max_steps=6, modalities=["proprio"], seed=3, **options)


def test_what_is_imitated_is_what_the_expert_would_do_where_noise_has_brought_it():
    torch.manual_seed(0)
    data = collect_rollout(reach(), samples=18, noise=0.5, horizon=2)
    assert data.batch_size == (18,) and data["action"].shape == (18, 2, 3) and data["return"].shape == (18, 1)
    torch.manual_seed(0)
    env, step = reach(), None
    step = env.reset()
    for rows in data["action"].split(4):
        expert = env.expert_action()
        assert torch.equal(rows[:, 0], expert[: len(rows)])
        noisy = expert + 0.5 * torch.randn_like(expert)
        torch.rand_like(expert[:, -1])
        noisy[:, -1] = expert[:, -1]
        _, step = env.step_and_maybe_reset(step.set("action", noisy))


def test_the_gripper_slips_as_often_as_asked_for():
    calm, slipping = (
        collect_rollout(TabletopEnv(16, "pick_place", modalities=["proprio"]), 64, gripper_noise=p) for p in (0.0, 1.0)
    )
    assert (calm["observation", "proprio"][:, 2] > 0).all()  # never shut on nothing
    assert (slipping["observation", "proprio"][16:32, 2] < 0.08).all()  # shut from the first step on


@pytest.mark.parametrize("used", [range(150), range(100, 120), range(119, 500)])
def test_demonstrations_meet_no_states_that_measure_success(used):
    with pytest.raises(UserError, match=r"^first_state: demonstrations .* ids 100 to 119 and meet those of eval_epis"):
        check_states(range(100, 120), {"eval_episodes": used}, held_out=10_000)


def test_nor_those_that_are_drawn_in_training():
    check_states(range(9980, 10_000), {"eval_episodes": range(100), "watch_episodes": range(0)}, held_out=10_000)
    with pytest.raises(UserError, match="from the ids 9981 to 10000, but training draws those from 10000 on"):
        check_states(range(9981, 10_001), {}, held_out=10_000)
