"""`agents.loading`: a class by its dotted path, its configuration, and what comes back."""

import os
import sys
import textwrap

import pytest
import torch
from loading_worlds import CLASS, HERE, VLA, any_weights, error, load
from safetensors.torch import save_file
from torch import nn

from agents.loading import import_model_class, load_vla_model
from research.errors import UserError


@pytest.fixture
def weights():
    return any_weights()


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


@pytest.mark.parametrize("name", ["Plain", "load", "torch"])
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
    with pytest.raises(
        UserError, match=r"VLA cannot be constructed: TypeError: .* \(loading_worlds.py, line \d+\)$"
    ) as caught:
        load(None, config={"width": "wide"})
    assert isinstance(caught.value.__cause__, TypeError)
    assert "\n" not in str(caught.value)


def test_a_constructor_that_leaves_weights_without_memory_is_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    for path in (None, tmp_path / "w.pt"):
        assert "leaves head.weight on the device 'meta'" in error(path, f"{HERE}.MetaVLA")


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


class Pretrained(VLA):
    def __init__(self, pretrained: str | None = None):
        super().__init__()


@pytest.mark.parametrize(("pretrained", "warned"), [("folder", False), (None, True)])
def test_weights_that_the_constructor_reads_are_not_called_fresh(caplog, pretrained, warned):
    load_vla_model(None, f"{__name__}.Pretrained", {"pretrained": pretrained})
    assert bool(caplog.records) == warned


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


def test_fresh_weights_that_are_meant_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    load_vla_model(None, "test_loading.VLA", {}, expect_fresh=True)
    assert caplog.text == ""


def test_a_folder_that_this_projects_package_hides_is_named(tmp_path, monkeypatch):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "my_model.py").write_text("import torch\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="this project's package 'agents' has the same name and hides it; rename your"):
        import_model_class("agents.my_model.MyVLA")
