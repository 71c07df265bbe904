"""research/imitation/pointing.py: a model that learns to point, and one that cannot."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from research.errors import UserError
from research.imitation.pointing import PlaceReader, check_can_point, learn_to_point


class Scenes:
    """Eight at a time, whose two places are to be read off the proprioception; each reset shows others."""

    def reset(self) -> TensorDict:
        self.places = torch.rand(8, 4) * 2 - 1
        return TensorDict({"observation": {"proprio": self.places[:, [2, 0, 3, 1]]}}, [8])

    def named_places(self) -> torch.Tensor:
        return self.places.view(8, 2, 2)


class Pointer(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.Linear(4, 6)

    def stages(self):
        return [lambda features: features.set("seen", features["observation", "proprio"])]

    def point(self, features, count):
        return self.points(features["seen"]).view(-1, 3, 2)[:, :count]


def test_a_model_learns_to_point():
    model, scenes = Pointer(), Scenes()
    learn_to_point(model, scenes, steps=400, learning_rate=0.02)
    seen = scenes.reset()["observation", "proprio"]
    assert (model.points(seen)[:, :4] - scenes.places).abs().max() < 0.05


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.02), ("one_cycle", 0.0)])
def test_the_learning_rate_of_pointing_follows_the_schedule(schedule, last):
    """By how far Adam's steps move a weight: never more than about its rate."""
    weights, model = [], Pointer()

    class Watched(Scenes):
        def reset(self):
            weights.append(model.points.bias.detach().clone())
            return super().reset()

    learn_to_point(model, Watched(), 40, 0.02, schedule)
    moved = [(b - a).abs().max().item() for a, b in zip(weights, [*weights[1:], model.points.bias], strict=True)]
    assert moved[10] > 0.002 and max(moved) < 0.03
    assert moved[-1] > 0.002 if last else moved[-1] < 1e-5


class Tokens(nn.Module):
    """Writes three tokens of what it sees, and cannot point."""

    def __init__(self, dims: int = 3):
        super().__init__()
        self.embed, self.dims = nn.Linear(4, 24), dims

    def stages(self):
        tokens = lambda features: self.embed(features["observation", "proprio"])  # noqa: E731
        return [lambda f: f.set("tokens", tokens(f).unflatten(1, (3, 8)) if self.dims == 3 else tokens(f))]


def test_the_tokens_of_a_model_that_cannot_point_are_read():
    """What the tokens have learned stays, and the reader is thrown away."""
    model, scenes = Tokens(), Scenes()
    before = model.embed.weight.clone()
    learn_to_point(model, scenes, steps=600, learning_rate=0.02)
    assert (model.embed.weight - before).norm() > 1 and [n for n, _ in model.named_children()] == ["embed"]
    reader = PlaceReader("tokens", 8, 2)
    assert reader(TensorDict({"tokens": torch.randn(5, 3, 8)}, [5]), 2).shape == (5, 2, 2)


@pytest.mark.parametrize(
    ("model", "scenes", "said"),
    [
        (nn.Linear(1, 1), Scenes(), "pointing_steps: the model has no stages"),
        (Pointer(), None, "or the environment no named_places"),
        (Tokens(dims=2), Scenes(), r"pointing_steps: the model has no point\(\), and no stage writes tokens"),
    ],
)
def test_who_cannot_point_or_names_nothing_is_refused(model, scenes, said):
    with pytest.raises(UserError, match=said):
        learn_to_point(model, scenes, 1, 1e-3)


def test_a_model_of_which_nothing_points_that_trains_is_refused_before_any_step():
    model = Pointer()
    check_can_point(model, Scenes())
    for p in model.parameters():
        p.requires_grad_(False)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="pointing_steps: all that points is frozen"):
        check_can_point(model, Scenes())
    assert torch.equal(torch.get_rng_state(), state)
