"""A model served: a robot gets the action that a rollout would have got, and what is no observation is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_families import FAMILIES, fresh, looks, make, world
from test_pi0 import TINY
from torch import nn
from worlds import ThreeMethods, small_model

from agents.pi0 import Pi0VLA
from agents.serving import serve
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import decode_text

ROW = 2


def robot_sees(seen, keys) -> dict:
    """One row of a batch of observations as a robot has it."""
    values = {key: seen[key][ROW].numpy() for key in keys if key != "language"}
    return values | ({"language": decode_text(seen["language"])[ROW]} if "language" in keys else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_as_in_a_rollout(family):
    policy, seen = make(family), looks()
    act, observation = serve(policy.model, seen), robot_sees(seen, policy.model.observation_keys)
    step = world(1).reset().set("observation", seen[ROW : ROW + 1])
    torch.manual_seed(7)
    with torch.no_grad():
        rolled = policy.act(step)["action"][0].numpy()
    torch.manual_seed(7)
    drawn = act(observation, deterministic=False)
    assert drawn.dtype == np.float32 and drawn.shape == (2, 3) and np.array_equal(drawn, rolled)
    own = lambda: policy.model(step["observation"], deterministic=True)[0].detach().numpy()  # noqa: E731
    modes = []
    for ask in (lambda: act(observation), lambda: act(observation), own):
        torch.manual_seed(7)  # a flow draws what it denoises
        modes.append(ask())
    assert np.array_equal(modes[0], modes[1]) and np.array_equal(modes[0], modes[2])
    assert not np.array_equal(modes[0], drawn)


def test_without_an_example_an_instruction_may_be_of_any_length():
    seen = robot_sees(looks(), ("rgb", "proprio", "language"))

    def acted(act, instruction: str) -> np.ndarray:
        torch.manual_seed(7)
        return act(seen | {"language": instruction})

    act, padded, told = serve(fresh("pi0")), serve(fresh("pi0"), looks()), seen["language"]
    np.testing.assert_allclose(acted(act, told), acted(padded, told), rtol=0, atol=1e-5)
    assert np.abs(acted(act, "turn around and go " * 3) - acted(act, told)).max() > 1e-6
    assert acted(act, "").shape == (2, 3)


def test_an_instruction_is_read_as_with_the_room_of_training():
    """SmallVLA sees that a text ends, by the padding behind it."""
    torch.manual_seed(0)
    model, observation = small_model(), robot_sees(looks(), ("rgb", "proprio", "language"))
    np.testing.assert_allclose(serve(model)(observation), serve(model, looks())(observation), rtol=0, atol=1e-6)


def test_a_family_with_statistics_is_served_in_the_worlds_units(tmp_path):
    """With the environment's map or without it: what the world gets is what the statistics say."""
    numbers = {"mean": [0.0, 0.1, 0.0], "std": [0.05, 0.2, 1.0]}
    (tmp_path / "stats.json").write_text(json.dumps({"action": numbers, "observation.state": numbers}))
    torch.manual_seed(0)
    model = Pi0VLA(3, proprio_dim=3, config=TINY, statistics=str(tmp_path)).eval()
    one, seen, actions = np.ones(3), robot_sees(looks(), ("rgb", "proprio", "language")), []
    scaling = ActionMap(-9 * one, 9 * one, np.array([0.5, 2.0, 1.0]), 0.1 * one, (3,), np.dtype(np.float32))
    for action_map in (None, scaling):
        torch.manual_seed(1)
        actions.append(serve(model, action_map=action_map)(seen))
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-6)
    assert np.abs(actions[0]).max() > 0.01


def test_a_model_that_cannot_act_on_the_example_is_refused_in_one_line():
    class Fails(ThreeMethods):
        def forward(self, observations):
            raise IndexError("no such token\nfor real")

    with pytest.raises(UserError, match="the model cannot act on observations of .*rgb: .*no such token") as refused:
        serve(Fails(small_model()), looks())
    assert "\n" not in str(refused.value)


def test_a_model_of_three_methods_is_served_too():
    model, seen = small_model(), looks()
    observation = robot_sees(seen, ("rgb", "proprio", "language"))
    served, own = serve(ThreeMethods(model), seen), serve(model, seen)
    torch.manual_seed(1)
    action = served(observation, deterministic=False)
    torch.manual_seed(1)
    np.testing.assert_allclose(action, own(observation, deterministic=False), rtol=0, atol=1e-6)


class Sees(nn.Module):
    """Reads pictures and words, and a depth where there is one; of joints it knows nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, observations, deterministic=False):
        seen = observations["rgb"].float().mean(dim=(1, 2)) / 255 + observations["language"].float().mean(1, True)
        depth = observations["depth"].mean(dim=(1, 2))[:, None] if "depth" in observations.keys() else 0
        return self.scale * (seen + depth)

    def get_value(self, observations):
        return self(observations)[:, :1]

    def evaluate_actions(self, observations, actions):
        return -(actions - self(observations)).square().sum(-1), torch.zeros(len(actions))


def test_of_a_model_of_three_methods_is_asked_what_it_reads():
    seen, model = looks().set("depth", torch.ones(len(looks()), 4, 4)), Sees()
    state = torch.get_rng_state()
    act = serve(model, seen)
    assert torch.equal(torch.get_rng_state(), state)
    observation = robot_sees(seen, ("rgb", "language", "depth"))
    np.testing.assert_array_equal(act(observation), act(observation | robot_sees(seen, ("proprio",))))
    for key in ("rgb", "language", "depth"):
        with pytest.raises(UserError, match=f"'{key}' is missing; the model reads depth, language, rgb$"):
            act({name: value for name, value in observation.items() if name != key})
    with pytest.raises(UserError, match="'rgb_wrist' is nothing that the model reads"):
        act(observation | {"rgb_wrist": observation["rgb"]})


def test_float64_and_arrays_that_are_not_contiguous_are_taken():
    act, seen = serve(fresh("small"), looks()), robot_sees(looks(), ("rgb", "proprio", "language"))
    other = {"rgb": np.asfortranarray(seen["rgb"]), "proprio": seen["proprio"].astype(np.float64)}
    assert np.array_equal(act(seen | other), act(seen))


PICTURE, JOINTS = np.zeros((32, 32, 3), np.uint8), np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("changes", "example", "message"),
    [
        ({"proprio": None}, True, "'proprio' is missing; the model reads rgb, proprio, language"),
        ({"depth": np.zeros((32, 32))}, True, "'depth' is nothing that the model reads; it reads rgb, proprio"),
        ({"rgb": PICTURE / 255}, True, r"'rgb' should be uint8 \[H, W, 3\], 0 to 255, got float64 \[32, 32, 3\]"),
        ({"rgb": PICTURE[None]}, False, r"'rgb' should be uint8 \[H, W, 3\], .* got uint8 \[1, 32, 32, 3\]"),
        ({"rgb": PICTURE.transpose(2, 0, 1)}, False, r"'rgb' should be uint8 \[H, W, 3\], .* got \[3, 32, 32\]"),
        ({"rgb": PICTURE[:16]}, True, r"'rgb' was \[32, 32, 3\] in training, got \[16, 32, 3\]"),
        ({"rgb": torch.zeros(32, 32, 3)}, True, "'rgb' should be a numpy array uint8 .*, got Tensor"),
        ({"proprio": JOINTS.astype(int)}, True, r"'proprio' should be float \[P\], got int64 \[3\]"),
        ({"proprio": JOINTS[:2]}, True, r"'proprio' was \[3\] in training, got \[2\]"),
        ({"proprio": JOINTS + np.nan}, True, "'proprio' has numbers that are not finite"),
        ({"language": ["go"]}, True, "'language' should be a string, got list"),
        ({"language": "go " * 200}, True, "has 600 bytes, more than the .* reserved for it"),
    ],
)
def test_what_is_no_observation_is_refused_in_one_line(changes, example, message):
    act = serve(fresh("small"), looks() if example else None)
    observation = {"rgb": PICTURE, "proprio": JOINTS, "language": "go"} | changes
    with pytest.raises(UserError, match=message) as caught:
        act({key: value for key, value in observation.items() if value is not None})
    assert "\n" not in str(caught.value)
