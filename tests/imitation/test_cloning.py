"""research/imitation/cloning.py: losses by hand, what trains, and frozen stages that run once."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from worlds import count_calls, small_model

from agents.policy import VLAPolicy
from research.errors import NonFiniteError, UserError
from research.imitation.cloning import check_loss, clone, imitation_loss, planned_steps, with_frozen_features
from research.imitation.config import CloningConfig
from research.training.freezing import freeze


class Planner(nn.Module):
    """Plans two steps of one number: `hidden` and twice that; its value is `hidden`."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def action_distribution(self, hidden):
        mean = torch.stack([hidden, 2 * hidden], dim=1) * self.scale
        return torch.distributions.Independent(torch.distributions.Normal(mean, 1.0), 2)

    def value(self, hidden):
        return hidden * self.scale


def samples(count: int = 8) -> TensorDict:
    observation = {
        "rgb": torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8),
        "proprio": torch.rand(count, 3),
        "language": torch.zeros(count, 64, dtype=torch.int64),
    }
    data = {"observation": observation, "action": torch.rand(count, 1, 3) - 0.5, "return": torch.rand(count, 1)}
    return TensorDict(data, [count])


def test_losses():
    seen = TensorDict({"hidden": torch.tensor([[1.0], [3.0]])}, [2])
    actions = torch.tensor([[[1.0], [1.9]], [[4.0], [6.0]]])
    squared = imitation_loss(Planner(), seen, actions, "head")
    assert squared.item() == pytest.approx((0.1**2 + 1) / 4)
    smooth = imitation_loss(Planner(), seen, actions, "smooth_l1")
    assert smooth.item() == pytest.approx((0.1**2 / 0.4 + (1 - 0.1)) / 4)
    assert planned_steps(Planner(), (2, 1)) == 2 and planned_steps(Planner(), (1,)) == 1


def test_heads_bring_their_own_losses_and_horizons():
    gaussian, tokens = small_model(options={"horizon": 4}), small_model("tokens", {"horizon": 2})
    assert planned_steps(gaussian, (3,)) == 4 and planned_steps(tokens, (3,)) == 2
    hidden, actions = torch.randn(5, 32), torch.rand(5, 4, 3)
    for model, steps in ((gaussian, 4), (tokens, 2)):
        expected = model.action_head.imitation_loss(hidden, actions[:, :steps]).mean()
        seen = TensorDict({"hidden": hidden}, [5])
        assert torch.equal(imitation_loss(model, seen, actions[:, :steps], "head"), expected)
    with pytest.raises(UserError, match="loss: smooth_l1 has no gradient through a TokenHead; set it to head"):
        imitation_loss(tokens, seen, actions[:, :2], "smooth_l1")


def test_cloning_learns_actions_and_values():
    model, data = small_model(), samples()
    policy = VLAPolicy(model)
    seen = []
    clone(
        model, policy.rest, data, CloningConfig(steps=60, batch_size=8), lambda step, loss: seen.append(loss) or False
    )
    assert len(seen) == 60 and seen[-1] < 0.2 * seen[0]
    assert (model.get_value(data["observation"]) - data["return"]).abs().mean() < 0.2
    assert torch.equal(model.action_head.std(), small_model().action_head.std())  # its noise is left at its start


def test_steps_epochs_and_who_stops():
    def steps(stop=lambda step: False, **options) -> int:
        model, seen = small_model(), []
        config = CloningConfig(batch_size=3, **options)
        clone(model, VLAPolicy(model).rest, samples(), config, lambda step, loss: seen.append(step) or stop(step))
        return seen[-1]

    assert steps(epochs=2) == 4 and steps(steps=3) == 3 and steps(stop=lambda step: step == 2, epochs=2) == 2


def test_one_cycle_rises_to_the_learning_rate_and_falls(monkeypatch):
    rates, norms = [], []
    model = small_model()
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = CloningConfig(steps=40, batch_size=8, learning_rate=0.02, schedule="one_cycle", max_grad_norm=0.01)
    clone(model, VLAPolicy(model).rest, samples(), config)
    assert rates.index(max(rates)) == 3 and max(rates) == pytest.approx(0.02) and rates[-1] < 1e-6
    assert max(norms) <= 0.0101


def test_proprioception_is_disturbed_anew_and_the_data_is_not():
    seen, data = [], samples()
    model = small_model()
    policy = VLAPolicy(model)
    kept = data.clone()

    def rest(batch):
        seen.append(batch["observation", "proprio"].clone())
        return policy.rest(batch)

    clone(model, rest, data, CloningConfig(steps=50, batch_size=8, proprio_noise=0.1))
    order = [(one[:, None] - data["observation", "proprio"]).norm(dim=-1).argmin(1) for one in seen]
    apart = torch.stack([one - data["observation", "proprio"][at] for one, at in zip(seen, order, strict=True)])
    assert 0.07 < apart.std() < 0.12 and (data == kept).all()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_one_cycle_has_any_number_of_steps(steps):
    model = small_model()
    config = CloningConfig(steps=steps, batch_size=8, learning_rate=0.02, schedule="one_cycle")
    clone(model, VLAPolicy(model).rest, samples(), config)


def test_noise_on_what_nothing_that_trains_reads_is_refused():
    model, data = small_model(), samples()
    freeze(model, "backbone")
    policy = VLAPolicy(model)
    with pytest.raises(UserError, match=r"proprio_noise: is 0.1, but no part that trains reads the proprioception"):
        clone(model, policy.rest, with_frozen_features(policy, data), CloningConfig(batch_size=8, proprio_noise=0.1))


def test_a_loss_that_the_model_lacks_is_refused_before_there_are_demonstrations():
    policy, observations = VLAPolicy(small_model("tokens")), samples(2)["observation"]
    state = torch.get_rng_state()
    check_loss(policy, observations, (1, 3), "head")
    with pytest.raises(UserError, match="loss: smooth_l1 has no gradient through"):
        check_loss(policy, observations, (1, 3), "smooth_l1")
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_stages_run_once_and_change_nothing():
    results = []
    for reuse in ("off", "auto"):
        torch.manual_seed(0)
        model, data = small_model(), samples()
        freeze(model, ["vision_encoder", "language_encoder"])
        before = {name: p.clone() for name, p in model.named_parameters()}
        policy = VLAPolicy(model, feature_reuse=reuse)
        calls = count_calls(model.vision_encoder)
        data = with_frozen_features(policy, data, batch=3)
        clone(model, policy.rest, data, CloningConfig(steps=6, batch_size=8))
        results.append({name: p.detach() for name, p in model.named_parameters()})
        assert len(calls) == {"off": 6, "auto": 3}[reuse]
        changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {"fusion", "action_head", "value_head"}
    assert ("observation", "rgb") not in data.keys(True) and len(data) == 8
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-5) for name in results[0])


def test_a_loss_that_is_no_number_ends_it():
    data = samples()
    data["return"][:] = float("inf")
    model = small_model()
    with pytest.raises(NonFiniteError, match="the loss is inf .* at gradient step 1 of imitation"):
        clone(model, VLAPolicy(model).rest, data, CloningConfig(batch_size=8))
