"""Files of what was trained: parts that came from elsewhere are left out, and are checked when the file is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from loading_worlds import VLA, error, load
from safetensors.torch import load_file, save_file

from agents.provided_weights import save_trained, weights_sha256

CLASS = f"{__name__}.PretrainedVLA"


class PretrainedVLA(VLA):
    """Its encoder comes from elsewhere, "elsewhere" being a seed; None: it does not."""

    def __init__(self, encoder: int | None = 1):
        super().__init__()
        self.provided_weights = {}
        if encoder is not None:
            with torch.random.fork_rng():
                torch.manual_seed(encoder)
                self.encoder[0].reset_parameters()
            self.provided_weights["encoder"] = weights_sha256(self.encoder)


class WrittenTwiceVLA(PretrainedVLA):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.same_head = self.head


@pytest.fixture
def trained(tmp_path) -> tuple[VLA, Path]:
    """A model with a trained head, and its file."""
    model, path = PretrainedVLA(), tmp_path / "w.safetensors"
    torch.nn.init.normal_(model.head.weight)
    save_trained(model, path)
    return model, path


def assert_equal(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_provided_part_is_left_out_and_comes_back(trained):
    model, path = trained
    assert load_file(path).keys() == {"head.weight"}
    assert_equal(load(path, CLASS), model)
    assert_equal(load(path.parent, CLASS), model)  # the folder that holds it


def test_a_provided_part_that_was_trained_is_in_the_file(trained):
    model, path = trained
    with torch.no_grad():
        model.encoder[0].bias[1] += 1e-6
    assert save_trained(model, path) == {}
    assert load_file(path).keys() == model.state_dict().keys()
    for encoder in (1, 2, None):  # whatever the constructor made
        assert_equal(load(path, CLASS, {"encoder": encoder}), model)


@pytest.mark.parametrize(("encoder", "has"), [(2, r"is given others \("), (None, "is given none")])
def test_a_part_from_elsewhere_than_the_files_is_refused(trained, encoder, has):
    model, path = trained
    message = error(path, CLASS, {"encoder": encoder})
    sha = model.provided_weights["encoder"][:12]
    assert f"w.safetensors was trained on top of the encoder with SHA-256 {sha}..., which it does not hold" in message
    assert f"PretrainedVLA {has}".replace("\\", "") in message
    assert "set policy.vla_config.model_config to the encoder that it was trained with" in message


def test_a_hash_in_the_file_that_is_not_the_models_is_refused(trained):
    _, path = trained
    save_file(load_file(path), path, metadata={"provided_weights": json.dumps({"encoder": "0" * 64})})
    assert "with SHA-256 000000000000..." in error(path, CLASS)


def test_without_hashes_an_absent_part_is_missing(trained):
    _, path = trained
    for metadata in (None, {"provided_weights": "{}"}, {"format": "pt"}):
        save_file(load_file(path), path, metadata=metadata)
        assert "does not fit PretrainedVLA: 7 missing (encoder.0.weight, " in error(path, CLASS)
    torch.save(load_file(path), path.with_suffix(".pt"))  # a format that holds no hashes
    assert "7 missing" in error(path.with_suffix(".pt"), CLASS)


def test_everything_else_is_as_strict_as_ever(trained):
    _, path = trained
    metadata = {"provided_weights": json.dumps({"encoder": PretrainedVLA().provided_weights["encoder"]})}
    save_file({"head.weight": torch.zeros(2, 5)}, path, metadata=metadata)
    assert "1 shape mismatch" in error(path, CLASS)
    save_file({"other.weight": torch.zeros(2, 4)}, path, metadata=metadata)
    assert "1 missing (head.weight); 1 unexpected (other.weight)" in error(path, CLASS)


def test_without_strictness_other_encoders_are_said(trained, caplog):
    model, path = trained
    caplog.set_level(logging.WARNING)
    found = load(path, CLASS, {"encoder": 2}, strict=False)
    assert "was trained on top of the encoder" in caplog.text
    assert torch.equal(found.head.weight, model.head.weight)
    assert not torch.equal(found.encoder[0].weight, model.encoder[0].weight)


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "is no JSON"), ("[1]", "should map names"), ('{"a": 1}', "should map names")]
)
def test_damaged_metadata_is_one_line(trained, text, expected):
    _, path = trained
    save_file(load_file(path), path, metadata={"provided_weights": text})
    assert f"metadata 'provided_weights' {expected}" in error(path, CLASS)


def test_a_model_that_provides_nothing_is_written_whole(tmp_path):
    model = VLA()
    assert save_trained(model, tmp_path / "w.safetensors") == {}
    assert_equal(load(tmp_path / "w.safetensors"), model)


def test_tied_weights_are_written_once(tmp_path):
    model = WrittenTwiceVLA()
    save_trained(model, tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == {"head.weight"}
    assert_equal(load(tmp_path / "w.safetensors", f"{__name__}.WrittenTwiceVLA"), model)


def test_the_hash_is_of_names_dtypes_shapes_and_numbers():
    one = torch.nn.Linear(2, 2)
    two = torch.nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(two)
    renamed = torch.nn.Sequential(two)
    assert weights_sha256(renamed) != weights_sha256(two)
    with torch.no_grad():
        two.weight.copy_(two.weight.t().clone())
    assert weights_sha256(one) != weights_sha256(two)
    assert weights_sha256(one) != weights_sha256(one.double())


class EmptyBuffersVLA(VLA):
    """Two buffers without elements, and one that is a part of a weight's memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.zeros(0))
        self.register_buffer("b", torch.zeros(0, 3))
        self.register_buffer("first_row", self.head.weight.detach()[:1])


def test_tensors_without_elements_and_views_are_not_taken_for_tied_weights(tmp_path):
    model, path = EmptyBuffersVLA(), tmp_path / "w.safetensors"
    save_trained(model, path)
    assert load_file(path).keys() == model.state_dict().keys()
    assert_equal(load(path, f"{__name__}.EmptyBuffersVLA"), model)
