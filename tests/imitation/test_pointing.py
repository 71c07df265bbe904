"""research/imitation/pointing.py: a model that learns to point, and one that cannot."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from research.imitation.pointing import learn_to_point
from research.schema import UserError


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


@pytest.mark.parametrize(("model", "scenes"), [(nn.Linear(1, 1), Scenes()), (Pointer(), None)])
def test_who_cannot_point_or_names_nothing_is_refused(model, scenes):
    with pytest.raises(UserError, match="pointing_steps: the model has no point"):
        learn_to_point(model, scenes, 1, 1e-3)
