"""SmallVLA: any observations that there are."""

from __future__ import annotations

import pytest
import torch
from worlds import (
    small_model,
)

from agents.checking import check_policy
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from envs.tabletop import TabletopEnv
from research.errors import UserError
from research.training.freezing import freeze


@pytest.mark.parametrize(
    "modalities", [["rgb"], ["proprio"], ["depth", "language"], ["language"], ["rgb", "depth", "proprio", "language"]]
)
def test_any_subset_of_modalities(modalities):
    env = TabletopEnv(3, modalities=modalities)
    model = SmallVLA(3, modalities=modalities)
    policy = VLAPolicy(model)
    check_policy(policy, env.reset()["observation"], (3,))
    names = {name for name, _ in model.named_children()}
    assert ("vision_encoder" in names) == bool({"rgb", "depth"} & set(modalities))
    assert ("language_encoder" in names) == ("language" in modalities)


def test_channels_first_pixels_are_the_same_pixels():
    model, step = small_model(), TabletopEnv(2).reset()["observation"]
    flipped = step.copy().set("rgb", step["rgb"].permute(0, 3, 1, 2))
    torch.testing.assert_close(model.encode(step), model.encode(flipped))


@pytest.mark.parametrize("cameras", [["rgb"], ["rgb_front"], ["rgb", "rgb_wrist"]])
def test_every_colour_image_is_shifted_by_itself(cameras):
    torch.manual_seed(0)
    model = SmallVLA(3, modalities=[*cameras, "depth"], random_shift=4)
    step, seen = TabletopEnv(4).reset()["observation"], []
    for camera in cameras:
        step[camera] = step["rgb"]
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.encode(step)
    *shifted, depth = seen[0]
    assert len(shifted) == len(cameras) and torch.equal(depth, step["depth"])
    assert all(not torch.equal(image, step["rgb"]) for image in shifted)
    assert len(cameras) == 1 or not torch.equal(*shifted)
    with torch.no_grad():
        model.encode(step)
    assert all(torch.equal(image, step["rgb"]) for image in seen[1][:-1])


def test_several_cameras_are_seen_in_their_order():
    """Colour before depth, and cameras of one kind in the order of the configuration."""
    torch.manual_seed(0)
    model = SmallVLA(3, modalities=["rgb_wrist", "depth", "rgb", "proprio"]).eval()
    step = TabletopEnv(2).reset()["observation"].exclude("language")
    step["rgb_wrist"] = step["rgb"].flip(1)
    assert model.images == ["rgb_wrist", "rgb", "depth"] and model.vision_encoder.patches.in_channels == 7
    check_policy(VLAPolicy(model), step, (3,))
    seen = model.encode(step)
    assert not torch.equal(seen, model.encode(step.clone().set("rgb_wrist", step["rgb"])))
    freeze(model, "vision")
    policy = VLAPolicy(model)
    assert policy.frozen_stages == ["vision_encoder"] and ("observation", "rgb_wrist") not in policy.kept_keys
    with pytest.raises(UserError, match="modalities are rgb, depth"):
        SmallVLA(3, modalities=["wrist"])
