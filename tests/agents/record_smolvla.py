"""What LeRobot's SmolVLA does on tiny random weights: a policy's folder, and inputs and outputs of it, for a test.

    python tests/agents/record_smolvla.py            writes smolvla_policy/ and smolvla_recorded.safetensors here
    python tests/agents/record_smolvla.py --check    exports that policy and loads the export with LeRobot, strictly

It needs LeRobot 0.4.4, which does not install beside this project's dependencies: an environment of its own, with
`pip install --no-deps lerobot==0.4.4` and the packages that its imports then ask for.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SmolVLMConfig

HERE = Path(__file__).resolve().parent
POLICY, RECORDED = HERE / "smolvla_policy", HERE / "smolvla_recorded.safetensors"
TEXTS = ("go", "push the red cube", "open the drawer\n")
CAMERAS = {"one": ("rgb",), "two": ("rgb", "rgb_wrist")}
STEPS = 4
STATISTICS = {
    "observation.state": {"mean": [0.1, 0.2, 0.3], "std": [2.0, 1.5, 0.5]},
    "action": {"mean": [1.0, 0.0, -1.0], "std": [0.5, 2.0, 1.0]},
}


def lerobot():
    """LeRobot's SmolVLA, past what of LeRobot does not import beside newer versions of what it needs."""
    # A torchvision that was built for another torch lacks its compiled functions; its import asks for two of them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The package imports every policy, of which some do not survive transformers 5.
    package = types.ModuleType("lerobot.policies")
    package.__path__ = [str(Path(importlib.util.find_spec("lerobot").submodule_search_locations[0]) / "policies")]
    package.library = library
    sys.modules["lerobot.policies"] = package
    from lerobot.policies.smolvla import modeling_smolvla, smolvlm_with_expert

    class NoProcessor:
        class tokenizer:
            fake_image_token_id, global_image_token_id = 1, 2

        @classmethod
        def from_pretrained(cls, *_, **__):
            return cls

    smolvlm_with_expert.AutoProcessor = NoProcessor
    return modeling_smolvla


def fresh_policy():
    """Random weights, of a size at which every part of them moves the actions; in bfloat16's values."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    text = {
        "model_type": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    vlm = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=263)
    vlm.instruction_tokens = "bytes"
    vlm.save_pretrained("vlm")
    picture = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    config = SmolVLAConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
            "observation.images.rgb": picture,
            "observation.images.rgb_wrist": picture,
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
        vlm_model_name="vlm", num_vlm_layers=3, chunk_size=4, n_action_steps=2, max_action_dim=8, max_state_dim=8,
        num_steps=STEPS, resize_imgs_with_padding=(32, 32), device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    policy = lerobot().SmolVLAPolicy(config).eval()
    for name, weight in policy.named_parameters():
        near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.1 if weight.ndim == 1 else 0.8 * weight[0].numel() ** -0.5
        weight.data = near + spread * torch.randn_like(weight)
    return policy.to(torch.bfloat16)


def processors(config):
    from lerobot.policies.smolvla import processor_smolvla
    from lerobot.processor import tokenizer_processor

    tokenizer_processor.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *_, **__: object())
    statistics = {q: {s: torch.tensor(numbers) for s, numbers in of.items()} for q, of in STATISTICS.items()}
    return processor_smolvla.make_smolvla_pre_post_processors(config, statistics)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    lines = [text if text.endswith("\n") else f"{text}\n" for text in TEXTS]
    longest = max(map(len, lines)) + 3
    return {
        "rgb": torch.randint(0, 256, (3, 20, 28, 3), dtype=torch.uint8),
        "rgb_wrist": torch.randint(0, 256, (3, 40, 25, 3), dtype=torch.uint8),
        "proprio": torch.randn(3, 3),
        "ids": torch.tensor([[*line.encode(), *[0] * (longest - len(line))] for line in lines]),
        "noise": torch.randn(3, 4, 8),
        "time": torch.tensor([0.9, 0.5, 0.05]),
        "plan": torch.randn(3, 4, 3),
    }


def outputs(policy, unnormalise, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Actions in the data's units after a whole denoising, and the error of imitation, by the cameras that are read."""
    found = {}
    mean, std = ({q: torch.tensor(of[s]) for q, of in STATISTICS.items()} for s in ("mean", "std"))
    for name, cameras in CAMERAS.items():
        batch = {f"observation.images.{c}": given[c].movedim(-1, 1).float() / 255 for c in cameras}
        batch["observation.state"] = (given["proprio"] - mean["observation.state"]) / std["observation.state"]
        batch["observation.language.tokens"] = given["ids"]
        batch["observation.language.attention_mask"] = given["ids"] != 0
        chunk = policy.predict_action_chunk(dict(batch), noise=given["noise"])
        found[f"actions.{name}"] = unnormalise(chunk)
        batch["action"] = (given["plan"] - mean["action"]) / std["action"]
        padded = torch.nn.functional.pad(batch["action"], (0, 5))
        assert padded.shape == given["noise"].shape
        with torch.no_grad():
            found[f"loss.{name}"], _ = policy(batch, noise=given["noise"], time=given["time"], reduction="none")
    return found


def record() -> None:
    POLICY.mkdir(exist_ok=True)
    os.chdir(POLICY)
    lerobot()
    policy = fresh_policy()
    policy.save_pretrained(POLICY)
    before, after = processors(policy.config)
    before.save_pretrained(POLICY)
    after.save_pretrained(POLICY)
    given = inputs()
    save_file(given | outputs(policy.float(), after, given), RECORDED)


def check() -> None:
    modeling = lerobot()
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    from agents.smolvla import SmolVLA

    recorded = load_file(RECORDED)
    with tempfile.TemporaryDirectory() as folder:
        ours = SmolVLA(3, ("rgb", "rgb_wrist", "proprio", "language"), 3, str(POLICY), executed=2, steps=STEPS)
        with torch.no_grad():  # another policy than the one it was loaded from
            for parameter in ours.parameters():
                parameter.mul_(1.01)
        ours.export(Path(folder))
        theirs = modeling.SmolVLAPolicy.from_pretrained(folder, strict=True)
        processors(theirs.config)
        saved, own = load_file(Path(folder) / "model.safetensors"), theirs.state_dict()
        assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
        from lerobot.processor import PolicyProcessorPipeline
        from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

        after = PolicyProcessorPipeline.from_pretrained(
            folder, "policy_postprocessor.json",
            to_transition=policy_action_to_transition, to_output=transition_to_policy_action,
        )  # fmt: skip
        PolicyProcessorPipeline.from_pretrained(folder, "policy_preprocessor.json")
        found = outputs(theirs, after, recorded)
        from test_smolvla import observations, sampled

        for name, cameras in CAMERAS.items():
            mine = SmolVLA(3, (*cameras, "proprio", "language"), 3, folder, executed=2, steps=STEPS)
            actions = sampled(mine, observations(recorded, cameras), recorded["noise"])
            print(name, "largest difference", (actions - found[f"actions.{name}"]).abs().max().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check() if parser.parse_args().check else record()
