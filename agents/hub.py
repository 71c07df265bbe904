"""A policy that is shared: a folder, or a repository of the Hugging Face hub, that anyone acts with, without the run.

    policy = SharedPolicy.from_pretrained("my_vla")            # a folder; or "me/my_vla" of the hub
    action = policy.act({"rgb": picture, "proprio": joints, "language": "put the cup on the plate"})
    policy.push_to_hub("me/my_vla")                            # huggingface_hub's own, with its login

`export_vla.py --output=<folder>` writes one for models that have no folder of their family.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from tensordict import TensorDict
from torch import nn

from agents.loading import in_eval_mode, load_vla_model
from agents.serving import serve
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import LANGUAGE, RGB, base_modality

CARD = """---
{{ card_data }}
---

A policy of VLA-RL, fine-tuned with reinforcement learning: `SharedPolicy.from_pretrained` of `agents/hub.py` loads
it, and its `act` takes one observation and returns one action, numpy in and numpy out.
"""


class SharedPolicy(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vla-rl",
    tags=["robotics", "reinforcement-learning"],
    model_card_template=CARD,
):
    """A model with all that acting with it takes; `config.json` in its folder holds the arguments.

    Args:
        model_class: dotted name of the model's class; one that is not of this project has to be imported before.
        model_config: keyword arguments of its constructor.
        observations: observation key -> shape of one, as in training: `rgb` -> `[H, W, 3]`.
        autocast: as in training, see `VLAPolicy`.
        action_map: what the environment of training made of an action, as `ActionMap.to_dict` has it; None: nothing.
    Raises:
        UserError: the class would be imported from elsewhere, or has no such arguments.
    """

    def __init__(
        self,
        model_class: str,
        model_config: dict[str, Any],
        observations: dict[str, list[int]],
        autocast: str = "off",
        action_map: dict[str, Any] | None = None,
    ):
        super().__init__()
        module = model_class.replace(":", ".").rpartition(".")[0]
        if not module.startswith("agents.") and module not in sys.modules:  # a folder from elsewhere names it
            raise UserError(f"model_class: {model_class} is code of its own; look at it, and import {module} before")
        self.model = in_eval_mode(load_vla_model(None, model_class, model_config, expect_fresh=True))
        dtypes = {RGB: torch.uint8, LANGUAGE: torch.int64}
        seen = {
            key: torch.zeros(2, *shape, dtype=dtypes.get(base_modality(key), torch.float32))
            for key, shape in observations.items()
        }
        to_robot = None if action_map is None else ActionMap.from_dict(action_map)
        self.act = serve(self.model, TensorDict(seen, [2]), autocast, to_robot)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        model_class: str,
        model_config: dict[str, Any],
        observations: TensorDict,
        autocast: str,
        action_map: ActionMap | None = None,
    ) -> SharedPolicy:
        """A trained model, its adapters merged, as one to share.

        Args:
            model: with the weights.
            model_class, model_config, autocast: as above.
            observations: some, `[B]`, as in training.
            action_map: of the environment.
        Raises:
            UserError: what the constructor makes has other weights, or reads files that nobody else has.
        """
        if files := [name for name, value in model_config.items() if isinstance(value, str) and _is_here(value)]:
            raise UserError(f"model_config.{files[0]} is a file of this machine; nobody else has it: export to a .pt")
        shapes = {key: list(value.shape[1:]) for key, value in observations.items()}
        shared = cls(
            model_class=model_class, model_config=model_config, observations=shapes, autocast=autocast,
            action_map=None if action_map is None else action_map.to_dict(),
        )  # fmt: skip
        try:
            shared.model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()[:200]
            raise UserError(f"{model_class} has parts that its constructor lacks; export to a .pt: {first}") from None
        return shared


def _is_here(value: str) -> bool:
    """Whether a text names a file of this machine, or a folder by its path; a word may be one by chance."""
    return bool(value) and (Path(value).is_file() or ("/" in value and Path(value).is_dir()))
