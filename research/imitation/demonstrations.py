"""From demonstrations to samples to imitate, whoever recorded them.

Samples are a TensorDict `[S]`, one for each look of the expert's:

| key                    | dtype and shape      | meaning                                                            |
|------------------------|----------------------|--------------------------------------------------------------------|
| ("observation", key)   | research.schema      | what a policy sees                                                 |
| action                 | float32 `[S, H, A]`  | the expert's next H actions; past the end of the episode, its last |
| return                 | float32 `[S, 1]`     | discounted sum of the rewards to the end of the episode            |
| task, episode          | int64 `[S, 1]`       | numbers of the task, in order of appearance, and of the episode    |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from research.errors import UserError
from research.schema import ACTION, OBSERVATION, Demonstration

RETURN, TASK, EPISODE = "return", "task", "episode"


def check_fits(
    observations: TensorDictBase, action_dim: int, offered_observations: TensorDictBase, offered_dim: int
) -> None:
    """Refuse demonstrations that show, or do, something else than the environment in which success is measured.

    Args:
        observations, action_dim: of the demonstrations, and how many numbers one of their actions has.
        offered_observations, offered_dim: the same of the environment.
    Raises:
        UserError: a key or a shape differs; names it.
    """
    for key, offered in offered_observations.items():
        found = list(observations[key].shape[1:]) if key in observations.keys() else None
        if found != list(offered.shape[1:]):
            raise UserError(
                f"demonstrations: {key!r} is {found or 'not in the data set'}, and {list(offered.shape[1:])} in the "
                "environment; see lerobot.keys, lerobot.image_size and lerobot.instruction_length, or env_config"
            )
    if action_dim != offered_dim:
        raise UserError(f"demonstrations: an action has {action_dim} numbers, and {offered_dim} in the environment")


def samples_of(demonstrations: Sequence[Demonstration], horizon: int, executed: int, gamma: float) -> TensorDict:
    """The samples of whole episodes.

    Args:
        demonstrations: at least one.
        horizon: H.
        executed: control steps per decision of the policy that will imitate.
        gamma: discount per decision.
    """
    tasks = list(dict.fromkeys(one.task for one in demonstrations))
    parts: dict[str, list[Tensor]] = {ACTION: [], RETURN: [], TASK: [], EPISODE: []}
    for number, one in enumerate(demonstrations):
        looks = slice(None, None, one.every)
        actions, rewards = torch.from_numpy(one.actions)[:, None], torch.from_numpy(one.rewards)[:, None, None]
        dones = torch.zeros_like(rewards, dtype=torch.bool)
        dones[-1] = True
        parts[ACTION].append(upcoming_actions(actions, dones, horizon)[looks, 0])
        parts[RETURN].append(discounted_returns(rewards, dones, gamma, executed)[looks, 0])
        count = len(parts[ACTION][-1])
        parts[TASK].append(torch.full((count, 1), tasks.index(one.task)))
        parts[EPISODE].append(torch.full((count, 1), number))
    samples = {key: torch.cat(values) for key, values in parts.items()}
    keys = demonstrations[0].observations
    seen = {key: torch.from_numpy(np.concatenate([one.observations[key] for one in demonstrations])) for key in keys}
    size = [len(samples[ACTION])]
    return TensorDict({OBSERVATION: TensorDict(seen, size), **samples}, size)


def samples_of_rollout(
    observations: Sequence[TensorDictBase],
    actions: Tensor,
    rewards: Tensor,
    dones: Tensor,
    horizon: int,
    executed: int,
    gamma: float,
) -> TensorDict:
    """The samples of the first K of T steps of N rows, which begin new episodes by themselves; step after step.

    Args:
        observations: K of `[N]`; K below T, so that the last episodes that count go on to their ends.
        actions: `[T, N, A]`; rewards, dones: `[T, N, 1]`.
        horizon, executed, gamma: see `samples_of`.
    """
    steps, rows = len(observations), actions.shape[1]
    begun = torch.cat([torch.zeros_like(dones[:1]), dones[:-1]]).cumsum(dim=0)
    samples = {
        ACTION: upcoming_actions(actions, dones, horizon),
        RETURN: discounted_returns(rewards, dones, gamma, executed),
        TASK: torch.zeros_like(begun),
        EPISODE: begun * rows + torch.arange(rows, device=dones.device)[:, None],
    }
    samples = {key: value[:steps].flatten(0, 1) for key, value in samples.items()}
    return TensorDict({OBSERVATION: torch.cat(list(observations)), **samples}, [steps * rows])


def discounted_returns(rewards: Tensor, dones: Tensor, gamma: float, executed: int = 1) -> Tensor:
    """Discounted sums of rewards to the end of the episode, had a decision been taken at each control step.

    Args:
        rewards, dones: `[T, N, 1]`.
        gamma: discount per decision.
        executed: control steps per decision; their rewards are summed undiscounted.
    Returns:
        `[T, N, 1]`.
    """
    returns = torch.empty_like(rewards)
    for t in reversed(range(len(rewards))):
        running, alive = rewards[t], ~dones[t]
        for k in range(t + 1, min(t + executed, len(rewards))):
            running, alive = running + rewards[k] * alive, alive & ~dones[k]
        if t + executed < len(rewards):
            running = running + gamma * returns[t + executed] * alive
        returns[t] = running
    return returns


def upcoming_actions(actions: Tensor, dones: Tensor, horizon: int) -> Tensor:
    """The next H actions from each step on, the episode's last one repeated: `[T, N, A]` -> `[T, N, H, A]`.

    Args:
        actions: `[T, N, A]`.
        dones: `[T, N, 1]`, whether the step ended its episode.
        horizon: H.
    """
    last, running = torch.empty_like(dones, dtype=torch.int64), torch.full_like(dones[0], len(dones) - 1, dtype=int)
    for t in reversed(range(len(dones))):
        running = torch.where(dones[t], t, running)
        last[t] = running
    ahead = torch.arange(len(dones), device=dones.device)[:, None, None] + torch.arange(horizon, device=dones.device)
    steps = torch.minimum(ahead, last)[..., None].expand(-1, -1, -1, actions.shape[-1])  # [T, N, H, A]
    return actions[:, :, None].expand(-1, -1, horizon, -1).gather(0, steps)


def only_successful(demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
    """Those that did not fail; where nobody says, all.

    Raises:
        UserError: all of them failed.
    """
    kept = [one for one in demonstrations if one.success is not False]
    if not kept:
        raise UserError(
            f"only_successful: all {len(demonstrations)} demonstrations failed; disturb the expert less, play other "
            "initial states, or set it to false"
        )
    return kept


def count_by_task(demonstrations: Sequence[Demonstration]) -> dict[str, dict[str, int | None]]:
    """Of each task, how many demonstrations there are and how many succeeded; None: nobody says of any."""
    counts: dict[str, dict[str, int | None]] = {}
    for one in demonstrations:
        count = counts.setdefault(one.task, {"episodes": 0, "successful": None})
        count["episodes"] += 1
        if one.success is not None:
            count["successful"] = (count["successful"] or 0) + one.success
    return counts


def count_samples(demonstrations: Sequence[Demonstration]) -> int:
    """How many samples `samples_of` makes of some demonstrations."""
    return sum(-(-len(one.actions) // one.every) for one in demonstrations)
