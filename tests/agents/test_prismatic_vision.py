"""The two towers of OpenVLA: timm's outputs (record_prismatic_vision.py), the pictures they see, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from agents.prismatic_vision import DINOV2, SIGLIP, PrismaticVision, tower_config
from research.errors import UserError

SIZES = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}


def make() -> PrismaticVision:
    return PrismaticVision([tower_config(name, SIZES) for name in (DINOV2, SIGLIP)], 32).eval()


@torch.no_grad()
def test_it_has_the_names_and_the_outputs_of_timm():
    recorded = load_file(Path(__file__).with_name("prismatic_vision.safetensors"))
    pictures, patches = recorded.pop("pictures"), recorded.pop("patches")
    towers = make()
    towers.load_state_dict(recorded)  # strict
    assert towers.width == 32 and patches.shape == (2, 16, 32) and patches.std() > 1
    torch.testing.assert_close(towers(pictures), patches, rtol=0, atol=1e-5)
    two = towers(pictures, pictures.flip(0))
    torch.testing.assert_close(two, torch.cat([patches, patches.flip(0)], dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_pictures_are_resized_as_pillow_resizes_them():
    torch.manual_seed(0)
    towers = make()
    small = torch.randint(0, 256, (2, 6, 10, 3), dtype=torch.uint8)
    picture = torch.nn.functional.interpolate(small.movedim(-1, 1).float(), (90, 60), mode="bilinear")
    picture = picture.movedim(1, -1).round().to(torch.uint8)
    resized = [Image.fromarray(one.numpy()).resize((32, 32), Image.Resampling.BICUBIC) for one in picture]
    seen = []
    towers.featurizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] * 255))
    towers(picture)
    expected = torch.from_numpy(np.stack(resized)).movedim(-1, 1).float()
    assert (seen[0] - expected).abs().max() <= 1.01 and (seen[0] - expected).abs().mean() < 0.2


@pytest.mark.parametrize(
    ("name", "changes", "image_size", "message"),
    [
        (DINOV2, {"embed_dims": 16}, 32, "'embed_dims' is no size of a tower; did you mean 'embed_dim'"),
        ("vit_tiny", {}, 32, "'vit_tiny' is not known; there are vit_large"),
        (DINOV2, {**SIZES, "num_heads": 3}, 32, "heads that divide the width"),
        (DINOV2, SIZES, 33, "33 pixels are no whole patches of 8 and 8"),
        (DINOV2, {**SIZES, "patch_size": 4}, 32, "32 pixels are no whole patches of 4 and 8, as many in both"),
    ],
)
def test_towers_that_do_not_fit_are_refused(name, changes, image_size, message):
    with pytest.raises(UserError, match=message):
        PrismaticVision([tower_config(name, changes), tower_config(SIGLIP, SIZES)], image_size)
