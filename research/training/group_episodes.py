"""Whole episodes in groups, each group from one initial state: what group-relative algorithms learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from research.schema import ACTION, ENV_STEPS, LOG_PROB, check_finite, with_text_as
from research.training.algorithm import Policy
from research.training.evaluation import Episode, EpisodeRows
from research.training.parallel import ALONE, World

EPISODE, RETURN = "episode", "episode_return"  # of a decision: its episode's place among all, and that one's return


class GroupEpisodes:
    """Episodes of G groups of R, flat: the decisions `[M]` of all of them, in no order, and nothing after their ends.

    A row of the environment whose episode has ended takes the next one, as in an evaluation. Groups whose episodes all
    have the same return teach nothing; they are left out, and others are drawn.

    Args:
        env: batch `[N]`; draws initial states of training (`draw_states`).
        policy: see `algorithm.Policy`.
        groups: G.
        group_size: R.
        most_draws: draw at most so many times G groups.
        max_steps: control steps after which an episode that does not end by itself is cut off.
        world: the processes that share the groups.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: Policy,
        groups: int,
        group_size: int,
        most_draws: int = 4,
        max_steps: int = 1000,
        world: World = ALONE,
    ):
        self.env, self.policy, self.world = env, policy, world
        self.groups, self.group_size, self.most_draws, self.max_steps = groups, group_size, most_draws, max_steps
        self.kept_keys = [*policy.kept_keys, ACTION, LOG_PROB]
        self.episodes: list[Episode] = []  # of the last collection, those of groups that were left out among them
        self.left_out = 0

    @torch.no_grad()
    def next(self) -> TensorDictBase:
        """Collect.

        Returns:
            `[M]` with `kept_keys`, `action`, `action_log_prob`, `episode` int64 (`group * R + member`),
            `episode_return`, and `next` with `env_steps` where actions are chunks. Fewer than G groups, if too many
            were left out; where all were, the last one that was drawn.
        """
        self.episodes, self.left_out, kept = [], 0, []
        drawn = 0
        while len(kept) < self.groups and drawn < self.most_draws * self.groups:
            # At first all that are wanted, then as many as the rows have room for at once.
            most = max(1, self.env.batch_size[0] // self.group_size) if drawn else self.groups
            count = min(self.groups - len(kept) if not drawn else most, self.most_draws * self.groups - drawn)
            for group in self._play(self.env.draw_states(count).tolist()):
                useful = group[RETURN].min() < group[RETURN].max()
                self.left_out += not useful
                if useful and len(kept) < self.groups:
                    kept.append(group)
                last = group
            drawn += count
        kept = kept or [last]
        for place, group in enumerate(kept):
            group.set(EPISODE, group.get(EPISODE) + place * self.group_size)
        return torch.cat(kept)

    def _play(self, states: Sequence[int]) -> list[TensorDictBase]:
        """The decisions of R episodes from each state, by group."""
        size, parts = self.group_size, []

        def record(running: Tensor, places: Tensor, acted: TensorDictBase, after: TensorDictBase) -> None:
            check_finite([(LOG_PROB, acted.get(LOG_PROB))], "while collecting")
            step = with_text_as(torch.uint8, acted.select(*self.kept_keys)).set("place", places)
            if ENV_STEPS in after.keys():
                step.set("next", after.select(ENV_STEPS))
            parts.append(step[running] if not running.all() else step.copy())

        with set_exploration_type(ExplorationType.RANDOM):
            rows = EpisodeRows(self.env, [state for state in states for _ in range(size)], 0, self.max_steps, record)
            while rows.running.any():
                rows.step(self.policy.act)
        episodes = [rows.episodes[place] for place in range(len(states) * size)]
        self.episodes += episodes
        whole = torch.cat(parts)
        place = whole.pop("place")
        returns = torch.tensor([episode.episode_return for episode in episodes], device=place.device)
        whole.set(EPISODE, place % size).set(RETURN, returns[place])
        return [whole[place // size == group] for group in range(len(states))]

    def metrics(self) -> dict[str, float]:
        """Of all episodes of the last collection, over all processes: no fair sample leaves any out."""
        told = [e for part in self.world.gather(self.episodes) for e in part]
        mean = lambda values: sum(values) / len(told)  # noqa: E731
        metrics = {
            "rollout/return": mean([e.episode_return for e in told]),
            "rollout/episode_length": mean([e.length for e in told]),
            "rollout/episodes": float(len(told)),
            "rollout/groups_left_out": float(self.world.total(self.left_out)),
        }
        if told[0].success is not None:
            metrics["rollout/success_rate"] = mean([float(e.success) for e in told])
            tasks = sorted({e.task for e in told} - {None})
            for task in tasks if len(tasks) > 1 else ():
                own = [float(e.success) for e in told if e.task == task]
                metrics[f"rollout/success_rate/{task}"] = sum(own) / len(own)
        return metrics

    @property
    def env_steps(self) -> int:
        """Control steps of the last collection, those of groups that were left out among them."""
        return sum(episode.length for episode in self.episodes)

    def publish(self) -> None:
        """Nothing: the next episodes are collected with the weights as they are then."""

    def state_dict(self) -> dict:
        """The place in the stream of initial states; no episode is under way."""
        return {"environment": self.env.state_dict()}

    def load_state_dict(self, state: dict | None, env_steps: int) -> bool:
        """Go on from there; False where there is no state, and the stream begins anew."""
        if state is not None:
            self.env.load_state_dict(state["environment"])
        return state is not None

    def shutdown(self) -> None:
        self.env.close()


def by_group(batch: TensorDictBase, group_size: int) -> Tensor:
    """Returns `[G, R]` of the episodes that a batch `[M]` of decisions is of."""
    episode = batch.get(EPISODE)
    returns = torch.full((int(episode.max()) + 1,), torch.nan, device=episode.device)
    returns[episode] = batch.get(RETURN)
    return returns.view(-1, group_size)
