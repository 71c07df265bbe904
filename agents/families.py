"""Which family of VLA a checkpoint is of, by how its weights are called."""

from __future__ import annotations

from collections.abc import Iterable

# Family -> starts of names, past any prefix; one of them that is there says that it is this family. In the order tried:
# OpenVLA-OFT has OpenVLA's names and its own heads besides.
MARKS = {
    "pi0": ("dit.layers.", "embed_action_time.", "paligemma_with_expert."),
    "SmolVLA": ("vlm_with_expert.",),
    "OpenVLA-OFT": ("action_head.model.", "mlp_resnet.", "proprio_projector.", "noise_predictor."),
    "OpenVLA": ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer."),
}


def recognise(keys: Iterable[str]) -> str | None:
    """The family whose names these are: "pi0", "SmolVLA", "OpenVLA" or "OpenVLA-OFT"; None: none of them."""
    dotted = [f".{key}" for key in keys]
    for family, marks in MARKS.items():
        if any(f".{mark}" in name for name in dotted for mark in marks):
            return family
    return None


def told_apart(keys: Iterable[str], expected: str) -> str:
    """The end of a message about weights that do not fit: "" or which other family they look like."""
    found = recognise(keys)
    return "" if found in (None, expected) else f"; these are weights of {found}"
