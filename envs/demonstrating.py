"""Demonstrations: whole episodes in which a simulator's expert acts, in the process that steps it.

The expert is disturbed, so that the data shows how to recover, and what is recorded is what it would have done without:
noise injection as in DART (Laskey et al., 2017, arXiv:1703.09327).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.simulator import Simulator
from research.schema import SUCCESS, Demonstration

LONGEST = 10_000  # control steps after which an episode that does not end by itself is cut off


class Disturbance(NamedTuple):
    """How an expert is disturbed while it demonstrates; the last action component, the gripper's, never is."""

    noise: float = 0.4
    """Standard deviation of what is added to the motion, the same number for all control steps of a decision."""
    probability: float = 0.5
    """Of a decision to be so disturbed."""
    wander: int = 4
    """Half of the episodes begin with this many decisions at most, from none on, of which all motion is random."""


UNDISTURBED = Disturbance(noise=0.0, probability=0.0, wander=0)


def demonstrate(
    simulator: Simulator, state: int, every: int = 1, disturbance: Disturbance = UNDISTURBED, seed: int = 0
) -> Demonstration:
    """Let a simulator's expert play one episode.

    Args:
        simulator: one with an expert; what it was doing is lost.
        state: id of the initial state.
        every: control steps per decision: how often the policy that imitates will look.
        disturbance: of the expert.
        seed: with `state`, of all that is drawn.
    Returns:
        observations at the decisions, and of each control step the expert's undisturbed action at the state that was
        visited. The same arguments give the same episode in any process.
    """
    rng, layout = np.random.default_rng((seed, state)), simulator.layout
    simulator.reset(state)
    wandering = rng.integers(disturbance.wander + 1) if rng.random() < 0.5 else 0
    observations, actions, rewards, success, ended = [], [], [], False, False
    while not ended and len(actions) < LONGEST:
        motion = slice(0, layout.action_dim - 1)
        push = rng.normal(0, disturbance.noise, layout.action_dim - 1) * (rng.random() < disturbance.probability)
        anywhere = rng.uniform(-1, 1, layout.action_dim - 1)
        astray = len(observations) < wandering
        observations.append({key: value.copy() for key, value in simulator.observe().items()})
        for _ in range(every):
            action = simulator.expert_action().astype(np.float32)
            actions.append(action.copy())
            action[motion] = anywhere if astray else action[motion] + push
            out = simulator.step(action)
            rewards.append(out["reward"][0])
            success |= bool(out.get(SUCCESS, [False])[0])
            ended = bool(out["terminated"][0] or out["truncated"][0])
            if ended:
                break
    return Demonstration(
        number=state,
        task=layout.task_names[state % len(layout.task_names)] if layout.task_names else "",
        observations={key: np.stack([one[key] for one in observations]) for key in observations[0]},
        actions=np.stack(actions),
        rewards=np.array(rewards, np.float32),
        success=success if layout.has_success else None,
        every=every,
    )
