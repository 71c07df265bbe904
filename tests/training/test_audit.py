"""The freeze audit: what it catches, what it lets pass, resuming, drift, and its cost."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from research.config import LoRAConfig
from research.schema import FrozenWeightsChanged, UserError
from research.training.audit import FreezeAudit
from research.training.freezing import freeze
from research.training.lora import adapter_changes


class Model(nn.Module):
    """A vision part with batch norm, one that trains with batch norm, a mean that nothing trains, and a head."""

    def __init__(self):
        super().__init__()
        self.vision_encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
        self.vision_encoder.register_buffer("cache", torch.zeros(2), persistent=False)
        self.fusion = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
        self.action_head = nn.Linear(4, 2)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.action_head(self.fusion(self.vision_encoder(x)))


FROZEN = {  # of the scope "vision"
    "vision_encoder.0.weight", "vision_encoder.0.bias", "vision_encoder.1.weight", "vision_encoder.1.bias",
    *(f"vision_encoder.{i}.{b}" for i in (1, 2) for b in ("running_mean", "running_var", "num_batches_tracked")),
}  # fmt: skip


def audited(scope="vision") -> tuple[Model, FreezeAudit]:
    torch.manual_seed(0)
    model = Model()
    freeze(model, scope)
    return model, FreezeAudit(model)


def flip_one_bit(tensor: torch.Tensor) -> None:
    flat = tensor.data.view(-1)[-1:].view(torch.uint8)
    flat[0] ^= 1  # the lowest bit of the last number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_in_any_frozen_tensor_is_caught_and_named(dtype):
    model = Model().to(dtype)
    freeze(model, "vision")
    audit = FreezeAudit(model)
    tensors = dict(model.state_dict(keep_vars=True))
    for name in FROZEN:
        audit.check("at the start")
        flip_one_bit(tensors[name])
        with pytest.raises(FrozenWeightsChanged, match=rf"1 of 10 .* at env step 64: {name};"):
            audit.check("at env step 64")
        assert audit.summary()["audit/frozen_ok"] is False
        flip_one_bit(tensors[name])
    audit.check("in the end")
    assert audit.summary()["audit/frozen_ok"] is True


def test_training_passes_and_leaves_the_frozen_as_they_were():
    model, audit = audited()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):  # trainable parts in train mode: their batch statistics change too
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        model.vision_encoder.cache += 1
    assert model.fusion[1].num_batches_tracked == 2
    audit.check("after training")
    assert audit.summary()["audit/frozen_tensors"] == len(FROZEN)


def test_batch_norm_in_train_mode_is_caught():
    model, audit = audited()
    model.train()
    model(torch.randn(8, 4))
    with pytest.raises(FrozenWeightsChanged, match=r"6 of 10 .*running_mean, .* and 3 more; look for"):
        audit.check("after a forward pass")


def test_a_replaced_parameter_is_caught():
    model, audit = audited()
    model.vision_encoder[0] = nn.Linear(4, 4)
    with pytest.raises(FrozenWeightsChanged, match=r"vision_encoder\.0\.weight"):
        audit.check("now")
    model.vision_encoder[0] = nn.Identity()
    with pytest.raises(FrozenWeightsChanged, match=r"vision_encoder\.0\.weight"):
        audit.check("now")


def test_nothing_frozen_is_fine():
    _, audit = audited("none")
    audit.check("now")
    assert audit.summary()["audit/frozen_tensors"] == 0


def test_the_hash_tells_starts_apart():
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = Model()
        freeze(model, "vision")
        hashes.append(FreezeAudit(model).summary()["audit/hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def checkpoint(**state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_is_audited_against_the_first_start():
    model, audit = audited()
    with torch.no_grad():
        model.fusion[0].weight.mul_(2.0)
    saved = checkpoint(model=model.state_dict(), audit=audit.state_dict())
    torch.manual_seed(5)  # another start, as of a run whose pretrained file changed
    resumed = Model()
    freeze(resumed, "vision")
    again = FreezeAudit(resumed)
    again.load_state_dict(saved["audit"])
    with pytest.raises(FrozenWeightsChanged):
        again.check("at the resumption")
    resumed.load_state_dict(saved["model"])
    again.check("at the resumption")
    assert again.drift() == audit.drift() and again.drift()["audit/drift/fusion"] > 0
    assert again.summary() == audit.summary()
    _, other = audited(["vision", "fusion"])
    with pytest.raises(UserError, match=r"policy\.freeze.*froze 10 tensors, this one 16 .*fusion\.0\.weight"):
        other.load_state_dict(saved["audit"])


def test_drift_is_the_relative_distance_from_the_start():
    model, audit = audited()
    assert audit.drift() == {f"audit/drift/{p}": 0.0 for p in ("log_std", "vision_encoder", "fusion", "action_head")}
    with torch.no_grad():
        model.action_head.weight.fill_(3.0)
        model.action_head.bias.fill_(0.0)
        audit = FreezeAudit(model)  # ||w0|| = sqrt(8 * 9)
        model.action_head.weight[0, 0] += 1.2
        model.action_head.bias[0] += 1.6  # ||w - w0|| = 2
        model.log_std.fill_(4.0)  # from zero: absolute
    drift = audit.drift()
    assert drift["audit/drift/action_head"] == pytest.approx(2 / 72**0.5, rel=1e-5)
    assert drift["audit/drift/log_std"] == pytest.approx(32**0.5, rel=1e-6)
    assert drift["audit/drift/vision_encoder"] == drift["audit/drift/fusion"] == 0.0


def test_drift_of_an_adapter_is_that_of_its_layer():
    torch.manual_seed(0)
    model = Model()
    norm = sum(p.square().sum().item() for p in model.fusion.parameters()) ** 0.5
    freeze(model, "lora", lora=LoRAConfig(rank=2, targets=["fusion"]))
    audit = FreezeAudit(model)
    assert audit.drift()["audit/drift/fusion"] == 0.0
    nn.init.normal_(model.fusion[0].lora_B["default"].weight)
    change = dict(adapter_changes(model))["fusion.0"].norm().item()
    assert audit.drift()["audit/drift/fusion"] == pytest.approx(change / norm, rel=1e-5)
    audit.check("after training the adapter")
    model.fusion[1].running_mean += 1  # frozen with the layers around it
    with pytest.raises(FrozenWeightsChanged, match=r"fusion\.1\.running_mean"):
        audit.check("now")


def test_tied_tensors_are_hashed_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False), "c": nn.Linear(3, 1)})
    model["b"].weight = model["a"].weight
    freeze(model, ["b"])
    assert FreezeAudit(model).summary()["audit/frozen_tensors"] == 1
