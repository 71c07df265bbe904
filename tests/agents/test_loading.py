"""`agents.loading`: a class by its dotted path, a checkpoint in any format, and what happens when either is wrong."""

import json
import logging
import os
import pickle
import sys
import textwrap
import weakref
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from agents import loading
from agents.loading import import_model_class, load_vla_model
from research.schema import UserError


class VLA(nn.Module):
    """Eight weights, a buffer among them; `width` is the only thing to configure."""

    def __init__(self, width: int = 4, *, dtype=torch.float32):
        super().__init__()
        if width == 0:
            raise UserError("width must be positive")
        self.encoder = nn.Sequential(nn.Linear(3, width, dtype=dtype), nn.BatchNorm1d(width, dtype=dtype))
        self.head = nn.Linear(width, 2, bias=False, dtype=dtype)

    def forward(self, observations):
        return self.head(self.encoder(observations["proprio"]))

    def get_value(self, observations):
        return self.forward(observations)[:, :1]

    def evaluate_actions(self, observations, actions):
        mean = self.forward(observations)
        return -(actions - mean).square().sum(-1), mean.new_zeros(len(mean))


class TiedVLA(VLA):
    """A second name for the head's weight, as language models have it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 2, bias=False)
        self.embedding.weight = self.head.weight


class LazyVLA(VLA):
    """A layer whose shape only the checkpoint knows."""

    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2, bias=False)


class AnyConfigVLA(VLA):
    def __init__(self, **config):
        super().__init__(config["breadth"])


class EvalVLA(VLA):
    def __init__(self):
        super().__init__()
        self.eval()


class OnlyActs(nn.Module):
    def forward(self, observations):
        return observations["proprio"]


class NoForward(nn.Module):
    def get_value(self, observations):
        return observations["proprio"][:, :1]


class Plain:
    pass


class RunsCode:
    """A pickle of it creates the folder `path` when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


HERE = __name__
CLASS = f"{HERE}.VLA"


@pytest.fixture
def weights():
    """The weights of a VLA that no constructor gives, BatchNorm statistics and step counter included."""
    model = VLA()
    for value in model.state_dict().values():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7))
    return model.state_dict()


def load(path, model_class=CLASS, config=None, **options):
    return load_vla_model(path, model_class, config or {}, **options)


def assert_loaded(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def error(*args, **options) -> str:
    """The message of the UserError that loading ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_shards(folder, weights, suffix="safetensors"):
    """Three shards and their index; returns the index."""
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"model-{i % 3}.{suffix}" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        shard = {name: weights[name] for name in weight_map if weight_map[name] == file}
        save_file(shard, folder / file) if suffix == "safetensors" else torch.save(shard, folder / file)
    index = folder / ("model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# --- the class ---


def test_both_forms_of_the_dotted_path():
    assert import_model_class(f"{HERE}.VLA") is VLA
    assert import_model_class(f"{HERE}:VLA") is VLA


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A working directory that holds the user's own modules; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write_model(path, before="", name="MyVLA"):
    path.write_text(
        textwrap.dedent(before)
        + textwrap.dedent(f"""
            from torch import nn
            class {name}(nn.Module):
                def forward(self, observations): ...
                def get_value(self, observations): ...
                def evaluate_actions(self, observations, actions): ...
            """)
    )


def test_a_model_beside_the_config_is_importable(user_folder):
    write_model(user_folder / "my_model_beside.py")
    assert load(None, "my_model_beside.MyVLA").__class__.__name__ == "MyVLA"


def test_the_working_directory_shadows_no_installed_package(user_folder):
    (user_folder / "textwrap_shadowed.py").write_text("origin = 'installed'")
    (user_folder / "work").mkdir()
    (user_folder / "work" / "textwrap_shadowed.py").write_text("origin = 'work'")
    sys.path.append(str(user_folder))
    os.chdir(user_folder / "work")
    write_model(user_folder / "work" / "my_shadow_model.py", "import textwrap_shadowed")
    import_model_class("my_shadow_model.MyVLA")
    assert sys.modules["textwrap_shadowed"].origin == "installed"


def test_the_users_module_is_missing(user_folder):
    message = error(None, "my_absent_model.MyVLA")
    assert "there is no module 'my_absent_model'" in message
    assert str(user_folder) in message


def test_a_module_of_the_users_package_is_missing(user_folder):
    (user_folder / "my_package").mkdir()
    (user_folder / "my_package" / "__init__.py").touch()
    assert "there is no module 'my_package.model'" in error(None, "my_package.model.MyVLA")


def test_the_users_module_imports_something_missing(user_folder):
    write_model(user_folder / "my_inner_model.py", "import flash_attention_nine.ops")
    message = error(None, "my_inner_model.MyVLA")
    assert "'my_inner_model' exists, but imports 'flash_attention_nine', which cannot be found" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = = 1", "SyntaxError"),
        ("from json import absent_name", "ImportError"),
        ("raise ValueError('one line\\n  and another')", "ValueError: one line and another"),
    ],
)
def test_the_users_module_fails_to_import(user_folder, line, expected):
    name = f"my_broken_{expected.split(':')[0].lower()}"
    write_model(user_folder / f"{name}.py", line)
    message = error(None, f"{name}.MyVLA")
    assert f"{name!r} exists, but fails with {expected}" in message


@pytest.mark.parametrize("model_class", ["", "MyVLA", "models/my.MyVLA", "my_model.", ".MyVLA", "my model.MyVLA"])
def test_a_malformed_class_path(model_class):
    message = error(None, model_class)
    assert repr(model_class) in message
    assert '"package.module.ClassName"' in message


def test_a_misspelt_class_gets_the_near_ones():
    message = error(None, f"{HERE}.LazzyVLA")
    assert "does not exist in its module; did you mean LazyVLA" in message
    assert "Plain" not in message


def test_an_unknown_class_gets_the_models_of_the_module():
    message = error(None, f"{HERE}.Zebra")
    assert "torch.nn.Module classes there: VLA, TiedVLA" in message
    assert "Plain" not in message


@pytest.mark.parametrize("name", ["Plain", "load", "loading"])
def test_not_an_nn_module_class(name):
    assert "not a torch.nn.Module class" in error(None, f"{HERE}.{name}")


def test_missing_methods_are_named():
    assert "lacks get_value, evaluate_actions;" in error(None, f"{HERE}.OnlyActs")
    assert "lacks forward, evaluate_actions;" in error(None, f"{HERE}.NoForward")


# --- its configuration ---


def test_model_config_reaches_the_constructor():
    assert load(None, config={"width": 6}).head.weight.shape == (2, 6)


def test_unknown_configuration_names_the_accepted():
    message = error(None, config={"width": 4, "widht": 5, "depth": 2})
    assert "VLA does not know widht, depth; it accepts width, dtype" in message


def test_absent_configuration_is_named(user_folder):
    write_model(user_folder / "my_needy_model.py")
    with (user_folder / "my_needy_model.py").open("a") as file:
        file.write("    def __init__(self, hub, /, *, action_dim, width=3): super().__init__()\n")
    message = error(None, "my_needy_model.MyVLA", {"hidth": 1})
    assert "MyVLA does not know hidth and needs action_dim; it accepts action_dim, width" in message
    assert "MyVLA needs action_dim; it accepts action_dim, width" in error(None, "my_needy_model.MyVLA")


def test_a_constructor_error_is_one_line_and_chained():
    with pytest.raises(UserError, match="VLA cannot be constructed: TypeError: ") as caught:
        load(None, config={"width": "wide"})
    assert isinstance(caught.value.__cause__, TypeError)
    assert "\n" not in str(caught.value)


def test_a_constructor_with_free_keywords_judges_them_itself():
    assert load(None, f"{HERE}.AnyConfigVLA", {"breadth": 5}).head.weight.shape == (2, 5)
    assert "AnyConfigVLA cannot be constructed: KeyError: 'breadth'" in error(
        None, f"{HERE}.AnyConfigVLA", {"width": 5}
    )


def test_a_models_own_user_error_passes_unchanged():
    assert error(None, config={"width": 0}) == "width must be positive"


# --- what comes back ---


def test_fresh_weights_are_logged(caplog):
    load(None)
    assert [r.getMessage() for r in caplog.records] == [
        f"{CLASS} starts from fresh weights: no policy.vla_config.model_path is given"
    ]


def test_training_mode_is_the_constructors(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    assert load(tmp_path / "w.pt").training
    assert not load(tmp_path / "w.pt", f"{HERE}.EvalVLA").training


def test_the_model_is_on_the_device(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    for path in (None, tmp_path / "w.pt"):
        assert {p.device.type for p in load(path, device="meta").parameters()} == {"meta"}


def test_weights_take_the_models_dtype(tmp_path, weights):
    save_file({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "w.safetensors")
    model = load(tmp_path / "w.safetensors")
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, weights["head.weight"].bfloat16().float())
    torch.save(weights, tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", config={"dtype": torch.bfloat16})
    assert torch.equal(model.head.weight, weights["head.weight"].bfloat16())


def test_the_file_is_not_written_through_the_memory_map(tmp_path, weights):
    for path, save in ((tmp_path / "w.pt", torch.save), (tmp_path / "w.safetensors", save_file)):
        save(weights, path)
        before = path.read_bytes()
        nn.init.zeros_(load(path).head.weight)
        assert path.read_bytes() == before


# --- formats ---


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model"])
def test_torch_files(tmp_path, weights, suffix, key):
    path = tmp_path / f"w.{suffix}"
    content = {key: weights, "optimizer": {"state": {0: torch.ones(3)}}, "step": 12} if key else weights
    torch.save(content, path)
    assert_loaded(load(path), weights)
    assert_loaded(load(str(path)), weights)


def test_the_order_of_the_keys(tmp_path, weights):
    wrong = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"model": wrong, "state_dict": wrong, "model_state_dict": weights}, tmp_path / "a.pt")
    torch.save({"model": wrong, "state_dict": weights}, tmp_path / "b.pt")
    # "model" names the architecture here, not a state dict
    torch.save({"model": "vla-small", **weights}, tmp_path / "c.pt")
    assert_loaded(load(tmp_path / "a.pt"), weights)
    assert_loaded(load(tmp_path / "b.pt"), weights)
    assert_loaded(load(tmp_path / "c.pt", strict=False), weights)


def test_the_older_torch_format(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_loaded(load(tmp_path / "w.pt"), weights)


def test_the_zip_format_is_memory_mapped(tmp_path, weights, monkeypatch):
    torch.save(weights, tmp_path / "w.pt")
    calls = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or original(*a, **k))
    load(tmp_path / "w.pt")
    assert calls[0]["mmap"] is True
    assert calls[0]["weights_only"] is True


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    assert_loaded(load(tmp_path / "w.safetensors"), weights)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_by_index_and_by_directory(tmp_path, weights, suffix):
    index = write_shards(tmp_path, weights, suffix)
    assert_loaded(load(index), weights)
    assert_loaded(load(tmp_path), weights)


def test_the_index_decides_what_a_shard_gives(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(name for name in weights if weight_map[name] == "model-1.safetensors")
    stale = {n: weights[n] for n in weights if weight_map[n] == "model-0.safetensors"}
    save_file({**stale, name: torch.zeros_like(weights[name])}, tmp_path / "model-0.safetensors")
    assert_loaded(load(index), weights)


def test_shards_are_released_one_by_one(tmp_path, weights, monkeypatch):
    index = write_shards(tmp_path, weights)
    shards = []
    original = loading.load_file

    def load_file(path):
        tensors = original(path)
        shards.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    alive = []
    load_state_dict = nn.Module.load_state_dict

    def count(model, state, **options):
        alive.append(sum(any(tensor() is not None for tensor in shard) for shard in shards))
        return load_state_dict(model, state, **options)

    monkeypatch.setattr(loading, "load_file", load_file)
    monkeypatch.setattr(nn.Module, "load_state_dict", count)
    load(index)
    assert alive == [3, 2, 1]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "anything.pt", "anything.safetensors"])
def test_a_directory_with_one_weights_file(tmp_path, weights, name):
    path = tmp_path / name
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("x")
    assert_loaded(load(tmp_path), weights)


def test_the_standard_name_wins_in_a_directory(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({name: torch.zeros_like(value) for name, value in weights.items()}, tmp_path / "other.pt")
    assert_loaded(load(tmp_path), weights)


def test_directories_that_do_not_say_which_file(tmp_path, weights):
    assert "holds no weights file" in error(tmp_path)
    for i in range(5):
        torch.save(weights, tmp_path / f"step_{i}.pt")
    message = error(tmp_path)
    assert str(tmp_path) in message
    assert "several weights files (step_0.pt, step_1.pt, step_2.pt, …)" in message


def test_the_home_directory(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(weights, tmp_path / "w.pt")
    assert_loaded(load("~/w.pt"), weights)


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
    weights["module.head.weight"] = weights.pop("head.weight")
    torch.save(weights, tmp_path / "w.pt")
    message = error(tmp_path / "w.pt")
    assert 'set policy.vla_config.strip_prefix: "module." or policy.vla_config.strict: false' in message


def test_a_prefix_of_weights_with_other_shapes_is_not_suggested(tmp_path, weights):
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
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


# --- files that are not what they should be ---


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "absent.json", "absent/model.pt", "org/model-7b"])
def test_a_missing_file(tmp_path, name):
    assert f"{tmp_path / name} does not exist" in error(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert error(tmp_path / name) == f"{tmp_path / name} is empty"


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "older", "safetensors"])
def test_a_truncated_file(tmp_path, weights, kind, fraction):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    message = error(path)
    assert str(path) in message
    assert "cannot be read" in message or "is damaged" in message


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"<html>404: not found</html>" * 9, bytes(range(256)) * 9, b"\0" * 99, b"PK\3\4"])
def test_a_file_of_another_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in error(tmp_path / name)


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "w.pt").write_text("version https://git-lfs.example/spec/v1\noid sha256:abc\nsize 123\n")
    assert "git lfs pull" in error(tmp_path / "w.pt")


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"x")
    message = error(tmp_path / "w.onnx")
    assert "'.onnx'" in message
    assert ".safetensors" in message


def test_a_file_without_weights(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 1.0}}, tmp_path / "dict.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    save_file({}, tmp_path / "empty.safetensors")
    assert "found the keys epoch, optimizer" in error(tmp_path / "dict.pt")
    assert "found Tensor" in error(tmp_path / "tensor.pt")
    assert "no weights under model_state_dict, state_dict, model" in error(tmp_path / "empty.pt")
    assert "8 missing" in error(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{not json", "not valid JSON"),
        ("{}", "weight_map"),
        ("[1]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
    ],
)
def test_a_wrong_index(tmp_path, content, expected):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    message = error(tmp_path)
    assert str(path) in message
    assert expected in message


def test_a_shard_that_does_not_exist(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    (tmp_path / "model-1.safetensors").unlink()
    message = error(index, strict=False)
    assert str(index) in message
    assert "3 shards, of which 1 do not exist: model-1.safetensors" in message


def test_a_damaged_shard_is_named(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    (tmp_path / "model-1.safetensors").write_bytes(b"damaged")
    assert str(tmp_path / "model-1.safetensors") in error(index, strict=False)


def test_a_shard_without_what_the_index_promises(tmp_path, weights):
    index = write_shards(tmp_path, weights)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    message = error(index, strict=False)
    assert f"{tmp_path / 'model-1.safetensors'} lacks 3 of the weights that its index puts there" in message


def test_the_file_is_checked_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(VLA, "__init__", lambda self: pytest.fail("the model was built"))
    assert "does not exist" in error(tmp_path / "absent.pt")


# --- pickles ---


@pytest.mark.parametrize("kind", ["zip", "older", "plain"])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, weights, monkeypatch, kind, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    path, proof = tmp_path / "w.pt", tmp_path / "code_ran"
    content = {"state_dict": weights, "extra": RunsCode(proof)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = error(path)
    assert not proof.exists()
    assert "set policy.vla_config.trust_checkpoint: true, which RUNS CODE FROM THE FILE" in message
    assert str(path) in message


def test_a_malicious_shard_does_not_run(tmp_path, weights):
    index = write_shards(tmp_path, weights, "bin")
    torch.save({"a": RunsCode(tmp_path / "code_ran")}, tmp_path / "model-1.bin")
    assert "trust_checkpoint" in error(index)
    assert not (tmp_path / "code_ran").exists()


def test_the_message_says_what_the_pickle_asks_for(tmp_path):
    torch.save({"state_dict": RunsCode(tmp_path / "code_ran")}, tmp_path / "w.pt")
    assert "(posix.mkdir)" in error(tmp_path / "w.pt") or os.name != "posix"


def test_trust_checkpoint_unpickles_and_warns(tmp_path, weights, caplog):
    torch.save({"state_dict": weights, "extra": RunsCode(tmp_path / "code_ran")}, tmp_path / "w.pt")
    assert_loaded(load(tmp_path / "w.pt", trust_checkpoint=True), weights)
    assert (tmp_path / "code_ran").exists()
    assert "may run code while it is read" in caplog.text


def test_a_trusted_whole_model(tmp_path, weights):
    model = VLA()
    model.load_state_dict(weights)
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"model": model, "epoch": 3}, tmp_path / "wrapped.pt")
    assert "trust_checkpoint" in error(tmp_path / "whole.pt")
    assert_loaded(load(tmp_path / "whole.pt", trust_checkpoint=True), weights)
    assert_loaded(load(tmp_path / "wrapped.pt", trust_checkpoint=True), weights)


def test_a_trusted_pickle_that_is_damaged(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pt").write_bytes(b"\x80\x02garbage")
    assert "cannot be read" in error(tmp_path / "w.pt", trust_checkpoint=True)


def test_fresh_weights_that_are_meant_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    load_vla_model(None, "test_loading.VLA", {}, expect_fresh=True)
    assert caplog.text == ""


# ---- numbers that are not the weights that they seem


def test_compressed_entries_are_the_same_weights(tmp_path):
    """Memory-mapped they would be read as noise, without a word."""
    plain, deflated = tmp_path / "plain.pt", tmp_path / "deflated.pt"
    torch.manual_seed(0)
    weights = nn.Linear(30, 20).state_dict()
    torch.save(weights, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    read = loading._read(deflated, None, trust_checkpoint=False)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


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
