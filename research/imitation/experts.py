"""Experts of environments that step their rows together, and which initial states demonstrations may start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict

from research.errors import UserError
from research.imitation.demonstrations import samples_of_rollout
from research.progress_bar import ProgressBar
from research.schema import ACTION, OBSERVATION


def collect_rollout(
    env: Any,
    samples: int,
    noise: float = 0.0,
    gripper_noise: float = 0.0,
    horizon: int = 1,
    executed: int = 1,
    gamma: float = 1.0,
) -> TensorDict:
    """Steps of an expert with noise, and what it would have done without: `[samples]`.

    Args:
        env: `envs.simulator.Environment` with `expert_action` and `max_steps`, one control step per decision.
        samples: how many; all rows of a step are taken before those of the next.
        noise: standard deviation of what is added to the actions.
        gripper_noise: probability that the last action component is its opposite; it has no other noise.
        horizon, executed, gamma: see `research.imitation.demonstrations.samples_of`.
    """
    steps = -(-samples // env.batch_size[0])
    observations, actions, rewards, dones = [], [], [], []
    step = env.reset()
    # Beyond the last sample, so that its episode ends and its return is complete.
    for _ in ProgressBar(range(steps + env.max_steps), desc="demonstrations"):
        expert = env.expert_action()
        noisy = expert + noise * torch.randn_like(expert)
        slip = torch.rand_like(expert[:, -1]) < gripper_noise
        noisy[:, -1] = torch.where(slip, -expert[:, -1], expert[:, -1])
        observations.append(step[OBSERVATION])
        actions.append(expert)
        done_step, step = env.step_and_maybe_reset(step.set(ACTION, noisy))
        rewards.append(done_step["next", "reward"])
        dones.append(done_step["next", "done"])
    taken = [torch.stack(values) for values in (actions, rewards, dones)]
    return samples_of_rollout(observations[:steps], *taken, horizon, executed, gamma)[:samples]


def check_states(states: range, used: Mapping[str, range], held_out: int) -> None:
    """Refuse demonstrations from initial states that measure success, or that reinforcement learning will draw.

    Args:
        states: ids from which demonstrations start.
        used: option -> ids from which success is measured.
        held_out: ids from this on are drawn in training.
    Raises:
        UserError: they meet.
    """
    told = f"first_state: demonstrations start from the ids {states.start} to {states.stop - 1}"
    for option, others in used.items():
        if states.start < others.stop and others.start < states.stop:
            raise UserError(
                f"{told} and meet those of {option}, {others.start} to {others.stop - 1}; begin elsewhere below "
                f"{held_out}"
            )
    if states.stop > held_out:
        raise UserError(f"{told}, but training draws those from {held_out} on; begin earlier, or play fewer episodes")
