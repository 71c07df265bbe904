"""`agents.fitting`: which name of a file goes where in a model, and what is refused, strict or not."""

import logging

import pytest
import torch
from loading_worlds import HERE, VLA, MaskVLA, any_weights, assert_loaded, error, load, write_shards
from torch import nn

from agents.fitting import fill
from agents.loading import load_vla_model
from research.errors import UserError


@pytest.fixture
def weights():
    return any_weights()


# --- prefixes ---


@pytest.mark.parametrize("prefix", ["module.", "module", "policy.vla."])
def test_strip_prefix(tmp_path, weights, prefix):
    full = prefix.rstrip(".") + "."
    # A weight without the prefix is left alone.
    torch.save({name if name == "head.weight" else full + name: v for name, v in weights.items()}, tmp_path / "w.pt")
    assert_loaded(load(tmp_path / "w.pt", strip_prefix=prefix), weights)


def test_add_prefix(tmp_path, weights):
    encoder = {n.removeprefix("encoder."): v for n, v in weights.items() if n.startswith("encoder.")}
    torch.save(encoder, tmp_path / "w.pt")
    for prefix in ("encoder", "encoder."):
        model = load(tmp_path / "w.pt", add_prefix=prefix, strict=False)
        assert torch.equal(model.encoder[0].weight, weights["encoder.0.weight"])


def test_strip_then_add(tmp_path, weights):
    torch.save(
        {f"net.{n.removeprefix('encoder.')}": v for n, v in weights.items() if "encoder" in n}, tmp_path / "w.pt"
    )
    model = load(tmp_path / "w.pt", strip_prefix="net", add_prefix="encoder", strict=False)
    assert torch.equal(model.encoder[1].running_mean, weights["encoder.1.running_mean"])


def test_prefixes_over_shards(tmp_path, weights):
    index = write_shards(tmp_path, {f"module.{name}": value for name, value in weights.items()})
    assert_loaded(load(index, strip_prefix="module"), weights)


def test_a_prefix_that_no_weight_has(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt", strip_prefix="module")
    assert "no weight in" in message
    assert "'module.'" in message
    assert "encoder.0.weight" in message


def test_a_prefix_that_makes_two_weights_one(tmp_path, weights):
    torch.save({**weights, "module.head.weight": weights["head.weight"]}, tmp_path / "w.pt")
    assert "both with and without" in error(tmp_path / "w.pt", strip_prefix="module")


# --- names of wrapped modules ---


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("encoder.", "encoder._orig_mod."),
        lambda name: name.replace("head.", "head._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('encoder.1.', 'encoder.1._fsdp_wrapped_module.')}",
        lambda name: name,
    ],
)
@pytest.mark.parametrize("cls", ["VLA", "WrappedVLA"])
def test_infixes_of_wrapped_modules_are_recognised_on_both_sides(tmp_path, weights, caplog, wrapped, cls):
    torch.save({wrapped(name): value for name, value in weights.items()}, tmp_path / "w.pt")
    state = load(tmp_path / "w.pt", f"{HERE}.{cls}").state_dict()
    unwrapped = {
        n.replace("encoder.module.", "encoder.").replace("head._orig_mod.", "head."): v for n, v in state.items()
    }
    assert unwrapped.keys() == weights.keys()
    assert all(torch.equal(unwrapped[name], value) for name, value in weights.items())
    differing = sum(wrapped(name) not in state for name in weights)
    said = [r.getMessage() for r in caplog.records if "infixes of wrapped modules" in r.getMessage()]
    assert len(said) == (differing > 0)
    assert all(f"{differing} of its names were matched" in message for message in said)


def test_what_wrappers_write_is_loaded(tmp_path, weights):
    """Oracle: torch's own wrappers around the same model."""
    for i, wrap in enumerate((torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
        model = VLA()
        model.load_state_dict(weights)
        torch.save(wrap(model).state_dict(), tmp_path / f"{i}.pt")
        assert_loaded(load(tmp_path / f"{i}.pt", strict=i < 2), weights)  # the last holds a counter besides


def test_a_part_that_is_called_like_a_wrapper_keeps_its_name(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(2, 2)}), "module": nn.Linear(2, 2)})
    shards = [{name: value + 1 for name, value in model.state_dict().items()}]
    expected = dict(shards[0])
    fill(model, shards, tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_a_name_that_two_weights_of_the_model_could_mean_is_not_guessed(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "module": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    with pytest.raises(UserError, match="4 missing"):
        fill(model, [{f"_orig_mod.{name}": torch.ones(2) for name in ("a.weight", "a.bias")}], tmp_path)


@pytest.mark.parametrize("strict", [True, False])
def test_two_names_for_one_weight_are_refused(tmp_path, weights, strict):
    torch.save({**weights, "module.head.weight": weights["head.weight"] + 1}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt", strict=strict)
    assert (
        "holds two weights, head.weight and module.head.weight, for the one that the model calls head.weight" in message
    )


def test_a_prefix_is_suggested_past_infixes(tmp_path, weights):
    torch.save({f"policy._orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    assert error(tmp_path / "w.pt").endswith('; set policy.vla_config.strip_prefix: "policy."')
    assert_loaded(load(tmp_path / "w.pt", strip_prefix="policy."), weights)


def test_a_model_saved_with_its_adapters_apart_is_named(tmp_path, weights):
    weights["head.base_layer.weight"] = weights.pop("head.weight")
    torch.save({**weights, "head.lora_A.default.weight": torch.ones(2, 2)}, tmp_path / "w.pt")
    assert "holds peft's adapters apart: merge them before saving (merge_and_unload)" in error(tmp_path / "w.pt")


# --- one weight under two names ---


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("cls", "alias"), [("TiedVLA", "embedding.weight"), ("ViewVLA", "embedding")])
def test_tied_weights_have_one_value(tmp_path, weights, cls, alias, strict):
    torch.save(weights | {alias: weights["head.weight"] + 1}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt", f"{HERE}.{cls}", strict=strict)
    assert f"head.weight and {alias} have different values, but {cls} has one weight under both names" in message
    for same in ({}, {alias: weights["head.weight"].clone()}, {alias: weights["head.weight"].double()}):
        torch.save(weights | same, tmp_path / "w.pt")
        state = load(tmp_path / "w.pt", f"{HERE}.{cls}", strict=strict).state_dict()
        assert torch.equal(state["head.weight"], weights["head.weight"])
        assert torch.equal(state[alias], weights["head.weight"])
    del weights["head.weight"]
    torch.save(weights | same, tmp_path / "w.pt")
    assert torch.equal(load(tmp_path / "w.pt", f"{HERE}.{cls}", strict=strict).head.weight, same[alias].float())


# --- strictness ---


def test_strict_reports_everything_at_once(tmp_path, weights):
    del weights["encoder.0.bias"], weights["encoder.1.bias"]
    weights["head.weight"] = torch.zeros(5, 4)
    weights |= {f"extra_{i}": torch.zeros(1) for i in range(5)}
    torch.save(weights, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in message
    assert "2 missing (encoder.0.bias, encoder.1.bias)" in message
    assert "5 unexpected (extra_0, extra_1, extra_2, …)" in message
    assert "1 shape mismatch (head.weight: expected [2, 4], got [5, 4])" in message
    assert "set policy.vla_config.strict: false to load only what fits" in message
    assert "prefix: " not in message


@pytest.mark.parametrize("spoil", [lambda w: w.pop("head.weight"), lambda w: w.update(extra=torch.zeros(1))])
def test_one_problem_is_enough_to_refuse(tmp_path, weights, spoil):
    spoil(weights)
    torch.save(weights, tmp_path / "w.pt")
    assert "does not fit VLA" in error(tmp_path / "w.pt")


def test_a_missing_batch_norm_counter_is_missing(tmp_path, weights):
    del weights["encoder.1.num_batches_tracked"]
    torch.save(weights, tmp_path / "w.pt")
    assert "1 missing (encoder.1.num_batches_tracked)" in error(tmp_path / "w.pt")


def test_a_prefix_is_suggested_where_it_would_fit(tmp_path, weights):
    torch.save({f"policy.vla.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt")
    assert message.endswith('; set policy.vla_config.strip_prefix: "policy.vla."')
    assert_loaded(load(tmp_path / "w.pt", strip_prefix="policy.vla."), weights)
    # Nothing fits, whatever `strict` says.
    assert error(tmp_path / "w.pt", strict=False) == message


def test_a_prefix_to_add_is_suggested_where_it_would_fit(tmp_path, weights):
    torch.save({n.removeprefix("encoder."): v for n, v in weights.items() if "encoder" in n}, tmp_path / "w.pt")
    assert error(tmp_path / "w.pt").endswith('; set policy.vla_config.add_prefix: "encoder."')


def test_a_prefix_to_strip_from_some_is_suggested(tmp_path, weights):
    weights["policy.head.weight"] = weights.pop("head.weight")
    torch.save(weights, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt")
    assert 'set policy.vla_config.strip_prefix: "policy." or policy.vla_config.strict: false' in message


def test_a_prefix_of_weights_with_other_shapes_is_not_suggested(tmp_path, weights):
    torch.save({f"policy.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt", config={"width": 9})
    assert "does not fit" in message
    assert "prefix: " not in message


def test_no_second_prefix_is_suggested(tmp_path, weights):
    torch.save({f"a.b.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    assert "prefix: " not in error(tmp_path / "w.pt", strip_prefix="a")


def test_not_strict_loads_what_fits_and_says_so(tmp_path, weights, caplog):
    weights["encoder.0.weight"] = torch.zeros(9, 9)
    del weights["encoder.0.bias"]
    torch.save({**weights, "extra": torch.zeros(1)}, tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", strict=False)
    for name in set(weights) - {"encoder.0.weight"}:
        assert torch.equal(model.state_dict()[name], weights[name])
    assert model.encoder[0].weight.any()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "loaded 6 of the weights of VLA, not all: " in message
    assert "1 missing (encoder.0.bias); 1 unexpected (extra); 1 shape mismatch (encoder.0.weight" in message


def test_a_full_load_is_logged_as_such(tmp_path, weights, caplog):
    torch.save(weights, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        load(tmp_path / "w.pt")
    assert "loaded all 8 weights of VLA" in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_fits(tmp_path, strict):
    torch.save({"other": torch.zeros(2), "head.weight": torch.zeros(7)}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt", strict=strict)
    assert "does not fit VLA" in message
    assert "strict: false" not in message


def test_tied_weights_need_only_one_name(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", f"{HERE}.TiedVLA")
    assert model.embedding.weight is model.head.weight
    assert torch.equal(model.embedding.weight, weights["head.weight"])


def test_lazy_layers_take_their_shape_from_the_file(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    assert_loaded(load(tmp_path / "w.pt", f"{HERE}.LazyVLA"), weights)


# ---- numbers that are not the weights that they seem


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.int8), "is torch.int8, where SmallVLA has torch.float32"),
        (lambda w: w.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda w: w.to(torch.complex64), "is torch.complex64"),
        (lambda w: w > 0, "is torch.bool"),
        (lambda w: w.to_sparse(), "is torch.sparse_coo, which holds no values"),
        (lambda w: w.to("meta"), "is a meta tensor"),
        (lambda w: w * float("nan"), "holds a NaN or an infinity"),
    ],
)
def test_other_numbers_are_refused_by_name(tmp_path, strict, change, message):
    config = {"action_dim": 3, "modalities": ["proprio"], "hidden_size": 16}
    weights = load_vla_model(None, "agents.small_vla.SmallVLA", config).state_dict()
    weights["fusion.layers.0.weight"] = change(weights["fusion.layers.0.weight"])
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"fusion\.layers\.0\.weight {message}") as caught:
        load_vla_model(tmp_path / "w.pt", "agents.small_vla.SmallVLA", config, strict=strict)
    assert "\n" not in str(caught.value)


def test_half_precision_and_doubles_are_rounded_to_the_models_own(tmp_path):
    config = {"action_dim": 3, "modalities": ["proprio"], "hidden_size": 16}
    weights = load_vla_model(None, "agents.small_vla.SmallVLA", config).state_dict()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.save({name: w.to(dtype) for name, w in weights.items()}, tmp_path / "w.pt")
        model = load_vla_model(tmp_path / "w.pt", "agents.small_vla.SmallVLA", config)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), weights, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder.1.running_mean", torch.full((4,), float("nan")), "holds a NaN or an infinity"),
        ("encoder.1.running_var", torch.full((4,), float("inf")), "holds a NaN or an infinity"),
        ("mask", torch.tensor([0.0, float("nan")]), "holds a NaN or an infinity"),
        ("mask", torch.tensor([-float("inf"), 0.0]), "holds a NaN or an infinity"),
        (
            "head.weight",
            torch.full((2, 4), 1e6),
            "is torch.float32 with values too large for torch.float16",
        ),
        (
            "encoder.1.num_batches_tracked",
            torch.tensor(7.5),
            "is torch.float32 with values that are none of torch.int64",
        ),
        ("encoder.1.num_batches_tracked", torch.tensor(float("nan")), "is torch.float32 with values that are none"),
        ("head.weight", "a text", "is a str, which holds no values"),
        ("head.weight", [[0.0] * 4] * 2, "is a list, which holds no values"),
        ("head.weight", nn.UninitializedParameter(), "is a UninitializedParameter, which holds no values"),
        ("head.weight", torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8), "is quantised"),
        ("head.weight", torch.ones(2, 4, dtype=torch.uint8), "is torch.uint8, where MaskVLA has torch.float16"),
    ],
)
def test_numbers_that_would_not_stay_what_they_are(tmp_path, strict, name, value, message):
    model = MaskVLA()
    state = {**model.state_dict(), name: value}
    with pytest.raises(UserError) as caught:
        fill(model, [state], tmp_path / "w.pt", strict=strict)
    assert f"w.pt: {name} {message}" in str(caught.value)


def test_an_infinity_that_the_constructor_put_there_is_meant(tmp_path):
    model, state = MaskVLA(), any_weights(MaskVLA)
    state["mask"] = torch.tensor([0.5, -float("inf")])
    fill(model, [dict(state)], tmp_path)
    assert torch.equal(model.mask, state["mask"])


def test_conversions_are_told(tmp_path, weights, caplog):
    with caplog.at_level(logging.INFO):
        fill(VLA(), [{name: value.bfloat16() for name, value in weights.items()}], tmp_path)
        fill(MaskVLA(), [weights | {"mask": torch.zeros(2)}], tmp_path)
    said = [(r.levelname, r.getMessage().partition(": ")[2]) for r in caplog.records if "become" in r.getMessage()]
    assert ("INFO", "7 weights are torch.bfloat16 and become torch.float32") in said
    assert ("WARNING", "1 weights are torch.float32 and become torch.float16, rounded") in said


class Picky(nn.Linear):
    """Refuses what it is given, as modules with a version of their own do."""

    def _load_from_state_dict(self, *args):
        raise KeyError("version 3")


def test_a_module_that_refuses_its_weights_is_quoted(tmp_path):
    model = Picky(2, 2)
    with pytest.raises(UserError, match="cannot be copied into Picky: KeyError: 'version 3'"):
        fill(model, [dict(model.state_dict())], tmp_path)


def test_the_network_of_a_residual_run_is_told_and_not_left_out(tmp_path, weights):
    """What would be loaded without it is the policy that the run started from."""
    torch.save(weights | {"residual.network.0.weight": torch.zeros(2)}, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt")
    assert "it has the network of a run with policy.freeze=residual (residual.network.0.weight" in message
    assert "run's own folder" in message and "strict" not in message and "\n" not in message
