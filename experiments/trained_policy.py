"""What a training run ended with: its model with the trained weights, or one function that acts, for a robot's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import packages  # noqa: F401

import numpy as np
from assembling import choose_device
from building import load_trained, make_model, model_arguments
from resuming import load_run
from tensordict import TensorDictBase
from torch import nn

from agents.serving import serve
from envs import make_env
from research.action_map import ActionMap
from research.config import ExperimentConfig
from research.errors import UserError
from research.options import parse_config
from research.runs.folder import RunFolder
from research.schema import OBSERVATION


class TrainedModel(NamedTuple):
    """The model of a run, frozen and adapted as in training."""

    model: nn.Module
    config: ExperimentConfig
    observations: TensorDictBase
    """Zeros `[2]` as the environment offers observations."""
    arguments: dict[str, Any]
    """What its constructor was called with."""
    action_map: ActionMap | None
    """What the environment makes of an action."""


def load_trained_model(checkpoint: str, trusted: bool = False, device: str = "cpu") -> TrainedModel:
    """The model of a run with the weights that it ended with.

    Its environment is made once: a configuration says which one it is, and only the environment says what it offers.

    Args:
        checkpoint: a run folder, its newest checkpoint, or a checkpoint in one.
        trusted: run code that a run folder from elsewhere names.
        device: where the model lies; "auto" is the GPU if there is one.
    Raises:
        UserError: there is no such run, its weights do not fit, or it names code that is not trusted.
    """
    folder = RunFolder.containing(checkpoint)
    if not folder.is_run:
        raise UserError(f"--checkpoint: {checkpoint} is neither a run folder nor a checkpoint in one")
    config = parse_config(ExperimentConfig, [f"--config={folder.config}"])
    trained = load_run(checkpoint, config, trusted)
    env = make_env(config.trainer.env, 2, config.trainer.env_config, "cpu")
    observations, action_shape = env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[1:]
    choices, action_map = getattr(env, "action_choices", None), getattr(env, "action_map", None)
    env.close()
    where = choose_device(device)
    observations = observations.to(where)
    arguments = model_arguments(config, observations, action_shape, choices)
    model = make_model(config, observations, action_shape, where, True, choices, action_map).model
    load_trained(model, trained)
    return TrainedModel(model, config, observations, arguments, action_map)


def load_policy(checkpoint: str, trusted: bool = False, device: str = "auto") -> Callable[..., np.ndarray]:
    """`act(observation, deterministic=True)` of a run, see `agents.serving.serve`; arguments as above.

    Actions are those that the run's environment gave to its world: in its units, within its bounds, of its dtype.
    """
    trained = load_trained_model(checkpoint, trusted, device)
    return serve(trained.model, trained.observations, trained.config.trainer.autocast, trained.action_map)
