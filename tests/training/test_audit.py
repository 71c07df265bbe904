"""The freeze audit: what it catches, what it lets pass, resuming, drift, and its cost."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from research.config import LoRAConfig
from research.errors import FrozenWeightsChanged, UserError
from research.training.audit import FreezeAudit, load_trained_state, tensors_by_name
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
    "vision_encoder.cache",
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
    tensors = tensors_by_name(model)
    for name in FROZEN:
        audit.check("at the start")
        flip_one_bit(tensors[name])
        with pytest.raises(FrozenWeightsChanged, match=rf"1 of 11 .* at env step 64: {name};"):
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
    assert model.fusion[1].num_batches_tracked == 2
    audit.check("after training")
    assert audit.summary()["audit/frozen_tensors"] == len(FROZEN)


def test_batch_norm_in_train_mode_is_caught():
    model, audit = audited()
    model.train()
    model(torch.randn(8, 4))
    with pytest.raises(FrozenWeightsChanged, match=r"6 of 11 .*running_mean, .* and 3 more; look for"):
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


class OfData(nn.Module):
    """Holds what `agents.normalisation.Normalisation` does."""

    of_data = True

    def __init__(self, middle: float):
        super().__init__()
        self.register_buffer("middle", torch.tensor([middle]), persistent=False)
        self.register_buffer("scale", torch.ones(1), persistent=False)


@pytest.mark.parametrize("scope", ["none", "backbone"])
def test_statistics_of_the_data_are_the_runs_whatever_is_frozen(scope):
    def built(middle: float) -> Model:
        model = Model()
        model.actions = OfData(middle)
        freeze(model, scope)
        return model

    audit = FreezeAudit(built(0.5))
    saved = checkpoint(model=audit.trained_state(), audit=audit.state_dict())
    message = r"the statistics of the data are not those that the run trained with \(actions.middle\)"
    with pytest.raises(UserError, match=message):
        load_trained_state(built(0.6), saved["model"], saved["audit"])
    same = built(0.5)
    same.load_state_dict(audit.model.state_dict())
    assert load_trained_state(same, saved["model"], saved["audit"]) == []
    without = {name: value for name, value in saved["audit"].items() if name != "statistics"}
    if scope == "none":  # an earlier version
        assert load_trained_state(built(0.6), saved["model"], without) == []


def checkpoint(**state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_is_audited_against_the_first_start():
    model, audit = audited()
    with torch.no_grad():
        model.fusion[0].weight.mul_(2.0)
    saved = checkpoint(model=audit.trained_state(), audit=audit.state_dict())
    assert set(saved["model"]) == set(model.state_dict()) - FROZEN
    hashes = saved["audit"]["hashes"]
    torch.manual_seed(5)  # another start, as of a run whose pretrained file changed
    resumed = Model()
    freeze(resumed, "vision")
    with pytest.raises(UserError, match=r"model_path: \d of 11 frozen tensors are not what the run had frozen"):
        load_trained_state(resumed, saved["model"], {"hashes": hashes})
    resumed.vision_encoder.load_state_dict(model.vision_encoder.state_dict())
    assert load_trained_state(resumed, saved["model"], {"hashes": hashes}) == []
    assert load_trained_state(resumed, {"log_std": torch.zeros(2), "arm": torch.zeros(2)}, {"hashes": hashes})[:2] == [
        "arm", "fusion.0.weight",
    ]  # fmt: skip
    assert load_trained_state(resumed, saved["model"], {"hashes": hashes}) == []
    again = FreezeAudit(resumed)
    again.load_state_dict(saved["audit"])
    again.check("at the resumption")
    assert again.drift() == audit.drift() and again.drift()["audit/drift/fusion"] > 0
    assert again.summary() == audit.summary()
    _, other = audited(["vision", "fusion"])
    with pytest.raises(UserError, match=r"policy\.freeze.*had 11 tensors that stay, this one 17 .*fusion\.0\.weight"):
        other.load_state_dict(saved["audit"])


class Hidden(Model):
    """Keeps what its frozen part uses where no list of parameters and buffers shows it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("goal", torch.ones(2))
        self.vision_encoder.scales = {"near": [torch.ones(4)], "far": torch.ones(4)}
        self.vision_encoder.last = torch.zeros(4)
        self.statistics = nn.Module()
        self.statistics.register_buffer("mean", torch.zeros(4))
        self.target = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        self.vision_encoder.last = x.detach().mean(0)
        with torch.no_grad():  # an averaged copy of what trains, as some critics have
            self.target.weight.lerp_(self.fusion[0].weight, 0.1)
        return super().forward(x)


def hidden(scope, **options) -> tuple[Hidden, FreezeAudit]:
    torch.manual_seed(0)
    model = Hidden().eval()
    frozen = freeze(model, scope)
    frozen = [name for name in frozen if not name.startswith("target")] if scope == "vision" else frozen
    return model, FreezeAudit(model, frozen, exercise=lambda: model(torch.randn(3, 4)), **options)


def test_tensors_that_are_not_registered_are_audited_but_for_what_running_changes():
    for write in (lambda scales: scales["near"][0].add_(1), lambda scales: scales.update(far=torch.zeros(4))):
        model, audit = hidden("vision")
        model(torch.randn(8, 4))
        audit.check("after running it")
        write(model.vision_encoder.scales)
        with pytest.raises(FrozenWeightsChanged, match=r"1 of \d+ .*vision_encoder\.scales"):
            audit.check("now")


def test_what_has_no_parameters_is_audited_where_it_is_reused_or_all_but_the_heads_is_frozen():
    model, audit = hidden("vision")
    model.statistics.mean += 1  # nothing frozen reads them
    model.goal += 1
    audit.check("now")
    model = Hidden()
    audit = FreezeAudit(model, freeze(model, "backbone"))
    for buffer, name in ((model.statistics.mean, "statistics.mean"), (model.goal, "goal")):
        buffer += 1
        with pytest.raises(FrozenWeightsChanged, match=f"1 of .*: {name};"):
            audit.check("now")
        buffer -= 1
    torch.manual_seed(0)
    model = Hidden()
    audit = FreezeAudit(model, freeze(model, "vision"), reused=[model.statistics])
    model.statistics.mean += 1
    with pytest.raises(FrozenWeightsChanged, match=r"statistics\.mean"):
        audit.check("now")


def test_an_averaged_copy_of_what_trains_is_no_false_alarm_and_is_saved():
    model, audit = hidden("none")
    before = model.target.weight.clone()
    model(torch.randn(8, 4))
    audit.check("now")
    assert not torch.equal(model.target.weight, before)
    assert "target.weight" in audit.trained_state() and audit.summary()["audit/frozen_tensors"] == 0
    relied_on = FreezeAudit(model, [], reused=[model.target])  # where its outputs are kept it may not move
    model(torch.randn(8, 4))
    with pytest.raises(FrozenWeightsChanged, match=r"target\.weight"):
        relied_on.check("now")


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


def test_adapters_that_were_trained_before_drift_from_there():
    torch.manual_seed(0)
    model = Model()
    norm = sum(p.square().sum().item() for p in model.fusion.parameters()) ** 0.5
    freeze(model, "lora", lora=LoRAConfig(rank=2, targets=["fusion"]))
    nn.init.normal_(model.fusion[0].lora_B["default"].weight)
    before = dict(adapter_changes(model))["fusion.0"]
    audit = FreezeAudit(model)
    assert audit.drift()["audit/drift/fusion"] == 0.0
    with torch.no_grad():
        model.fusion[0].lora_A["default"].weight += 0.1
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moved = (dict(adapter_changes(model))["fusion.0"] - before).norm().item() / norm
    assert moved > 0 and audit.drift()["audit/drift/fusion"] == pytest.approx(moved, rel=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    resumed = FreezeAudit(model)  # with adapters of another start, which the checkpoint's wins over
    resumed.load_state_dict(audit.state_dict())
    assert resumed.drift() == audit.drift()
    state = audit.state_dict()  # of earlier versions, without adapters
    state["start"] = {name: value for name, value in state["start"].items() if "lora" not in name}
    audit.load_state_dict(state)
    assert audit.drift()["audit/drift/fusion"] == pytest.approx(moved, rel=1e-5)


def test_tied_tensors_are_hashed_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False), "c": nn.Linear(3, 1)})
    model["b"].weight = model["a"].weight
    freeze(model, ["b"])
    assert FreezeAudit(model).summary()["audit/frozen_tensors"] == 1
