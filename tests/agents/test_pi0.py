"""pi0: the actions of transformers' own sampler, its weights' names, units of the data, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PI0ForConditionalGeneration
from worlds import ROOT

from agents.flow import follow
from agents.pi0 import LONGEST_PROMPT, START, Pi0VLA, hub_name
from agents.prompts import prompt_tokens
from research.schema import UserError, encode_text

TINY = json.loads((ROOT / "experiments" / "configs" / "pi0_tiny.json").read_text())
TINY = TINY["policy"]["vla_config"]["model_config"]["config"]
TOKENS_PER_PICTURE = (32 // 8) ** 2


def make(modalities=("rgb", "proprio", "language"), **options) -> Pi0VLA:
    torch.manual_seed(0)
    return Pi0VLA(3, modalities, **{"proprio_dim": 3, "config": TINY, "executed": 2, **options}).eval()


def looks(cameras=("rgb",), size: int = 32) -> TensorDict:
    torch.manual_seed(2)
    pictures = {camera: torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8) for camera in cameras}
    texts = torch.stack([encode_text(text, 32) for text in ("go", "push it there", "")]).long()
    return TensorDict({**pictures, "proprio": torch.randn(3, 3), "language": texts}, batch_size=[3])


@torch.no_grad()
@pytest.mark.parametrize("cameras", [("rgb",), ("rgb", "rgb_wrist")])
def test_without_noise_it_samples_what_transformers_samples(cameras):
    model, seen = make((*cameras, "proprio", "language")), looks(cameras)
    hub = PI0ForConditionalGeneration(model.config).eval()
    hub.load_state_dict({hub_name(n): w for n, w in model.state_dict().items() if not n.startswith("value_head")})
    noise = torch.randn(3, 4, 8)
    ours = follow(model.velocity(model.run_stages(seen)), noise, model.flow.steps)
    ids, is_token = prompt_tokens(None, seen["language"], 3, noise.device, LONGEST_PROMPT, START)
    assert is_token.sum(dim=1).tolist() == [4, 15, 2]  # a start, the bytes, a line's end
    pictures = len(cameras) * TOKENS_PER_PICTURE
    theirs = hub.sample_actions(
        state=F.pad(seen["proprio"], (0, 5)),
        input_ids=torch.cat([torch.full((3, pictures), TINY["vlm_config"]["image_token_id"]), ids], dim=1),
        attention_mask=torch.cat([torch.ones(3, pictures, dtype=torch.int64), is_token.long()], dim=1),
        pixel_values=torch.stack([seen[c] for c in cameras], 1).movedim(-1, 2).float() / 127.5 - 1,
        pixel_attention_mask=torch.ones(3, len(cameras), dtype=torch.bool),
        noise=noise,
        num_steps=4,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.1


def test_gradients_reach_every_part_and_the_log_probability_counts_what_is_executed():
    model = make(executed=1)
    step = model.run_stages(looks())
    with torch.no_grad():
        step = model.decide(step.detach(), deterministic=False)
    assert step["action"].shape == (3, 3) and step["decision", "pair"].shape == (3, 2, 4, 8)
    log_prob, entropy, value = model.score(model.run_stages(looks()).update(step.select("decision")))
    assert torch.equal(log_prob, step["action_log_prob"]) and (entropy == 0).all()
    (log_prob.sum() + value.sum()).backward()
    for part in ("vision_tower", "projector", "language_model", "action_expert", "value_head"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model, part).parameters()), part
    changed = step.clone()
    changed["decision", "pair"][:, 1, 1:] += 1  # planned, not executed
    changed["decision", "pair"][:, 1, :, 3:] += 1  # beyond the numbers of an action
    with torch.no_grad():
        assert torch.equal(model.score(changed)[0], step["action_log_prob"])
        changed["decision", "pair"][:, 1, 0, 2] += 1
        assert (model.score(changed)[0] != step["action_log_prob"]).all()


@torch.no_grad()
def test_actions_and_states_are_in_the_units_of_the_data(tmp_path):
    statistics = {
        "action": {"mean": [1.0, 0.0, -1.0], "std": [0.5, 2.0, 1.0]},
        "proprio": {"mean": [0.1, 0.2, 0.3], "std": [2.0, 2.0, 2.0]},
    }
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    plain, scaled = make(), make(statistics=str(tmp_path))
    seen, theirs = looks(), looks()
    theirs["proprio"] = seen["proprio"] * 2 + torch.tensor([0.1, 0.2, 0.3])
    draws = []
    for model, look in ((plain, seen), (scaled, theirs)):
        torch.manual_seed(5)
        draws.append(model.decide(model.run_stages(look), deterministic=False))
    torch.testing.assert_close(draws[0]["decision", "pair"], draws[1]["decision", "pair"], rtol=0, atol=1e-6)
    expected = draws[0]["action"] * torch.tensor([0.5, 2.0, 1.0]) + torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(draws[1]["action"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_transformers_is_loaded_whole(tmp_path):
    original = make()
    hub = PI0ForConditionalGeneration(original.config)
    hub.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "go": 2, "there": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = make(pretrained=str(tmp_path), config=None)
    for name, weight in loaded.state_dict().items():
        if not name.startswith("value_head"):
            assert torch.equal(weight, hub.state_dict()[hub_name(name)]), name
    ids, is_token = prompt_tokens(loaded.words, looks()["language"], 3, torch.device("cpu"), LONGEST_PROMPT, START)
    assert ids[0, is_token[0]].tolist() == [1, 2] and ids[1, is_token[1]].tolist() == [1, 0, 0, 3]
    long = encode_text("go " * 48, 160)[None].long()
    with pytest.raises(UserError, match=r"the instruction 'go go .* has 49 tokens, more than 48"):
        prompt_tokens(loaded.words, long, 1, torch.device("cpu"), LONGEST_PROMPT, START)
    as_bytes, is_byte = prompt_tokens(None, long, 1, torch.device("cpu"), LONGEST_PROMPT, START)
    assert bytes(as_bytes[0, is_byte[0]].tolist()) == b"\x01" + ("go " * 48).encode() + b"\n"  # nothing is cut off


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"there is no .*config.json; pretrained is a folder"),
        ("no tokenizer", r"tokenizer: there is no .*tokenizer.json; name a folder"),
        ("tokenizer.json", "tokenizer.json cannot be read"),
        ("weight", r"lacks action_out_proj.weight; what there is besides: other.weight"),
        ("shape", r"does not fit its configuration: action_out_proj.*\[9, 32\] for \[8, 32\]"),
        ("weights", "no weights of pi0 in"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path, what, message):
    PI0ForConditionalGeneration(make().config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if what == "weight":
        weights["other.weight"] = weights.pop("action_out_proj.weight")
    if what == "shape":
        weights["action_out_proj.weight"] = torch.zeros(9, 32)
    save_file(weights, file, {"format": "pt"})
    if what in ("config", "weights"):
        (tmp_path / {"config": "config.json", "weights": "model.safetensors"}[what]).unlink()
    if what == "tokenizer.json":
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=message) as caught:
        make(pretrained=str(tmp_path), config=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("proprio", "language")}, "at least one camera"),
        ({"modalities": ("rgb", "depth")}, "modalities are rgb, proprio, language"),
        ({"executed": 5}, "executed is 5, and the model has room for 4"),
        ({"proprio_dim": 9}, "proprio_dim is 9, and the model has room for 8"),
        (
            {"config": {**TINY, "chunk_sizes": 4}},
            "'chunk_sizes' is no argument of PI0Config; did you mean 'chunk_size'",
        ),
        ({"config": {**TINY, "chunk_size": "many"}}, "no configuration of pi0"),
        ({"config": None}, "set pretrained to a folder, or config to the sizes of fresh weights"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
