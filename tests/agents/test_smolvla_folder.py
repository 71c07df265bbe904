"""A SmolVLA policy's folder: LeRobot's layout read and written, statistics, tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from record_smolvla import POLICY, RECORDED, STATISTICS
from safetensors.torch import load_file, save_file
from test_smolvla import CONFIG, TINY, make, observations, recorded_policy, sampled
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PI0ForConditionalGeneration
from worlds import ROOT

from agents.pi0_folder import pi0_config
from agents.smolvla_folder import LM_HEAD, hub_name
from research.errors import UserError

WEIGHTS = "model.safetensors"


def copied(folder: Path) -> Path:
    shutil.copytree(POLICY, folder / "policy")
    return folder / "policy"


def changed(policy: Path, **values) -> None:
    path = policy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_lerobots_weights_are_loaded_whole():
    weights = load_file(POLICY / WEIGHTS)
    model = recorded_policy()
    for name, weight in model.state_dict().items():
        if not name.startswith("value_head"):
            assert torch.equal(weight, weights.pop(hub_name(name)).float()), name
    assert list(weights) == [LM_HEAD]


def test_an_export_has_lerobots_layout_and_is_read_back(tmp_path):
    cameras, recorded = ("rgb", "rgb_wrist"), load_file(RECORDED)
    model = recorded_policy(cameras)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.export(tmp_path / "out")
    theirs, ours = load_file(POLICY / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {name: w.shape for name, w in theirs.items()} == {name: w.shape for name, w in ours.items()}
    assert torch.equal(ours[LM_HEAD], theirs[LM_HEAD])
    for file in POLICY.iterdir():
        assert (tmp_path / "out" / file.name).exists()
        if file.suffix == ".json" and file.name != "config.json":
            written, expected = (json.loads((p / file.name).read_text()) for p in (tmp_path / "out", POLICY))
            assert [step["registry_name"] for step in written["steps"]] == [
                step["registry_name"] for step in expected["steps"]
            ]
            assert [set(step["config"]) for step in written["steps"]] == [
                set(step["config"]) for step in expected["steps"]
            ]
        if "normalizer" in file.name:
            statistics, expected = load_file(tmp_path / "out" / file.name), load_file(file)
            assert all(torch.equal(statistics[name], expected[name]) for name in statistics)
    written, expected = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", POLICY))
    differing = {name for name in expected if written[name] != expected[name]}
    assert differing == {"vlm_model_name"} and Path(written["vlm_model_name"]).is_dir()
    seen, noise = observations(recorded, cameras), recorded["noise"]
    other = recorded_policy(cameras, pretrained=str(tmp_path / "out"))
    assert torch.equal(sampled(other, seen, noise), sampled(model, seen, noise))
    assert torch.equal(other.get_value(seen), model.get_value(seen))
    (tmp_path / "out" / "value_head.safetensors").unlink()
    torch.manual_seed(9)
    fresh = recorded_policy(cameras, pretrained=str(tmp_path / "out"))
    assert not torch.equal(fresh.get_value(seen), model.get_value(seen))


def test_fresh_weights_are_exported_with_the_sizes_and_the_units_that_they_have(tmp_path):
    (tmp_path / "stats.json").write_text(json.dumps({n: {**s, "count": [9]} for n, s in STATISTICS.items()}))
    model = make(("rgb", "rgb_wrist", "proprio", "language"), statistics=str(tmp_path), gradient_checkpointing=True)
    model.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["type"] == "smolvla" and config["num_steps"] == 4 and config["n_action_steps"] == 2
    assert list(config["input_features"]) == [
        "observation.state", "observation.images.rgb", "observation.images.rgb_wrist",
    ]  # fmt: skip
    recorded = load_file(RECORDED)
    seen = observations(recorded, ("rgb", "rgb_wrist"))
    other = recorded_policy(("rgb", "rgb_wrist"), pretrained=str(tmp_path / "out"))
    assert torch.equal(sampled(other, seen, recorded["noise"]), sampled(model, seen, recorded["noise"]))
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(weights[LM_HEAD], model.language_model.embed_tokens.weight)


def test_denoising_steps_are_those_of_the_folder_unless_others_are_named(tmp_path):
    make(steps=7).export(tmp_path / "out")
    counted = [len(recorded_policy(pretrained=str(tmp_path / "out"), steps=steps).flow.steps) for steps in (None, 3)]
    assert counted == [7, 3] and len(make().flow.steps) == 4


def test_statistics_are_the_policys_own_unless_others_are_named(tmp_path):
    std = torch.tensor(STATISTICS["action"]["std"])
    torch.testing.assert_close(recorded_policy().actions.scale, std)
    torch.testing.assert_close(recorded_policy().states.middle, torch.tensor(STATISTICS["observation.state"]["mean"]))
    statistics = {name: {**of, "std": [3.0, 3.0, 3.0]} for name, of in STATISTICS.items()}
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    assert recorded_policy(statistics=str(tmp_path)).actions.scale.tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(UserError, match="has MEAN_STD for STATE, not quantiles; set it to mean_std"):
        recorded_policy(normalisation="quantiles")


def test_a_tokenizer_is_read_used_and_exported(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "go": 2, "push": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    recorded = load_file(RECORDED)
    model = recorded_policy(tokenizer=str(tmp_path))
    actions = sampled(model, observations(recorded), recorded["noise"])
    assert (actions - sampled(recorded_policy(), observations(recorded), recorded["noise"])).abs().max() > 1e-3
    model.export(tmp_path / "out")
    other = recorded_policy(pretrained=str(tmp_path / "out"))
    assert torch.equal(sampled(other, observations(recorded), recorded["noise"]), actions)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"pretrained: there is no .*config.json; name a folder"),
        ("weights", "holds no weights file"),
        ("weight", r"does not fit ActionExpert: action_out_proj.weight should be \[8, 24\], got none"),
        ("shape", r"does not fit ActionExpert: action_out_proj.weight should be \[8, 24\], got \[9, 24\]"),
        ("further", "weights that have no place here: model.other.weight"),
        ("old", "has its statistics among the weights, as LeRobot before 0.4 wrote them"),
        ("vlm", r"vlm: .* names the vision-language model 'owner/name'; set it to a local folder"),
        ("tokenizer", r"tokenizer: there is no .*tokenizer.json; name a folder"),
        ("numbers", "statistics: mean has 3 numbers, and 2 are expected"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path, what, message):
    policy = copied(tmp_path)
    weights = load_file(policy / WEIGHTS)
    if what == "weight":
        weights.pop("model.action_out_proj.weight")
    if what == "shape":
        weights["model.action_out_proj.weight"] = torch.zeros(9, 24)
    if what == "further":
        weights["model.other.weight"] = torch.zeros(1)
    if what == "old":
        weights["unnormalize_outputs.buffer_action.mean"] = torch.zeros(3)
        for file in policy.glob("policy_*.safetensors"):
            file.unlink()
    save_file(weights, policy / WEIGHTS, {"format": "pt"})
    if what in ("config", "weights"):
        (policy / {"config": "config.json", "weights": WEIGHTS}[what]).unlink()
        for file in policy.glob("policy_*.safetensors"):
            file.unlink()
    if what == "vlm":
        shutil.rmtree(policy / "vlm")
        changed(policy, vlm_model_name="owner/name")
    if what == "tokenizer":
        vlm = json.loads((policy / "vlm" / "config.json").read_text())
        del vlm["instruction_tokens"]
        (policy / "vlm" / "config.json").write_text(json.dumps(vlm))
    with pytest.raises(UserError, match=message) as caught:
        recorded_policy(pretrained=str(policy), **({"proprio_dim": 2} if what == "numbers" else {}))
    assert "\n" not in str(caught.value)


def test_weights_of_another_family_are_told(tmp_path):
    policy = copied(tmp_path)
    path = ROOT / "experiments" / "configs" / "pi0_tiny.json"
    pi0 = json.loads(path.read_text())["policy"]["vla_config"]["model_config"]["config"]
    PI0ForConditionalGeneration(pi0_config(None, pi0)).save_pretrained(tmp_path / "pi0")
    shutil.copyfile(tmp_path / "pi0" / WEIGHTS, policy / WEIGHTS)
    with pytest.raises(UserError, match="these are weights of pi0"):
        recorded_policy(pretrained=str(policy))
    with pytest.raises(UserError, match=r"config.json is of pi0, not of LeRobot's smolvla"):
        recorded_policy(pretrained=str(tmp_path / "pi0"))


def test_sizes_over_those_of_the_folder_are_checked_against_the_weights():
    assert CONFIG["chunk_size"] == TINY["config"]["chunk_size"]
    assert recorded_policy(config={"chunk_size": 6}).horizon == 6
    with pytest.raises(UserError, match="action_in_proj"):
        recorded_policy(config={"max_action_dim": 9})
