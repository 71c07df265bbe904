"""research/action_map.py: from a policy's numbers to an environment's actions, in simulators and on robots."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from envs.gym_spaces import read_actions
from research.action_map import ActionMap

SPACES = {
    "bounded": Box(np.array([[-2.0, 0.0]], np.float32), np.array([[2.0, 0.1]], np.float32)),
    "half": Box(np.array([-np.inf, -1.0]), np.array([np.inf, 3.0])),
    "discrete": Discrete(5, start=-2),
    "several": MultiDiscrete([3, 2]),
}


@pytest.mark.parametrize("name", SPACES)
def test_it_survives_json_and_is_the_same_for_tensors(name):
    space = SPACES[name]
    ours = read_actions(space, name)
    theirs = ActionMap.from_dict(json.loads(json.dumps(ours.to_dict(), allow_nan=False)))
    assert (theirs.bounded, theirs.choices, theirs.shape) == (ours.bounded, ours.choices, ours.shape)
    actions = np.random.default_rng(0).normal(0, 2, (50, ours.size)).astype(np.float32)
    expected = ours(actions)
    assert expected.dtype == space.dtype and all(space.contains(action) for action in expected)
    assert np.array_equal(theirs(actions), expected) and theirs(actions).dtype == expected.dtype
    as_tensor = theirs.as_tensor(torch.from_numpy(actions), torch.device("cpu"))
    np.testing.assert_array_equal(as_tensor.numpy(), expected)


def test_bounds_are_at_minus_one_and_one_and_beyond_them_actions_are_clipped():
    bounded, half = (read_actions(SPACES[name], name) for name in ("bounded", "half"))
    assert bounded.bounded and not half.bounded
    np.testing.assert_allclose(bounded(np.array([[-1.0, -1.0], [0.5, 0.0], [7.0, 1.0]])).reshape(3, 2),
                               [[-2.0, 0.0], [1.0, 0.05], [2.0, 0.1]], atol=1e-7)  # fmt: skip
    np.testing.assert_allclose(half(np.array([9.0, 1.0])), [9.0, 3.0])
    np.testing.assert_array_equal(ActionMap.clipping(2)(np.array([-3.0, 0.5])), [-1.0, 0.5])


def test_the_inverse_gives_what_a_policy_would_have_written():
    for name, space in SPACES.items():
        actions = read_actions(space, name)
        written = actions.sample(np.random.default_rng(0), (20,))
        taken = actions(written).reshape(20, actions.size)
        np.testing.assert_allclose(actions.inverse(taken), written, atol=1e-5)
        assert actions.inverse(taken).dtype == np.float32
    with pytest.raises(ValueError, match="an action has 2 numbers, got 3"):
        ActionMap.clipping(2).inverse(np.zeros((4, 3)))


def test_a_number_that_moves_nothing_is_written_as_0():
    actions = read_actions(Box(np.array([-2.0, 0.5], np.float32), np.array([2.0, 0.5], np.float32)), "locked")
    np.testing.assert_allclose(actions.inverse(np.array([[1.0, 0.5]])), [[0.5, 0.0]])
    np.testing.assert_allclose(actions(np.array([[0.5, 0.0]], np.float32)), [[1.0, 0.5]])


def test_an_action_of_another_length_is_not_spread_over_all_components():
    with pytest.raises(ValueError, match="an action has 2 numbers, got 1"):
        read_actions(SPACES["half"], "half")(np.zeros((3, 1)))
