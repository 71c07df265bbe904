"""Whole episodes in groups, each group from one initial state: what group-relative algorithms learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import and_, or_

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from research.schema import ACTION, ENV_STEPS, LOG_PROB, check_finite, with_text_as
from research.training.algorithm import Policy, another_seed
from research.training.evaluation import Episode, EpisodeRows, success_by_task
from research.training.parallel import ALONE, World

EPISODE, RETURN = "episode", "episode_return"  # of a decision: its episode's place among all, and that one's return


class GroupEpisodes:
    """Episodes of G groups of R, flat: the decisions `[M]` of all of them, in no order, and nothing after their ends.

    A row of the environment whose episode has ended takes the next one, as in an evaluation. Groups whose episodes all
    have the same return teach nothing; they are left out, and others are drawn while those under way cannot be expected
    to be enough. All that are begun are played to their ends, and the first G that teach are taken in the order in
    which they were drawn: those that end first would be those of short episodes.

    Args:
        env: batch `[N]`; draws initial states of training (`draw_states`).
        policy: see `algorithm.Policy`.
        groups: G.
        group_size: R.
        most_draws: draw at most so many times G groups.
        max_steps: control steps after which an episode that does not end by itself is cut off.
        world: the processes that share the groups.
        seed: of the run.
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
        seed: int = 0,
    ):
        self.env, self.policy, self.world, self.seed = env, policy, world, seed
        self.groups, self.group_size, self.most_draws, self.max_steps = groups, group_size, most_draws, max_steps
        self.kept_keys = [*policy.kept_keys, ACTION, LOG_PROB]
        self.episodes: list[Episode] = []  # of the last collection, those of groups that were left out among them
        self.left_out = 0
        self.states: list[int] = []  # that were drawn, and are not used yet

    @torch.no_grad()
    def next(self) -> TensorDictBase:
        """Collect.

        Returns:
            `[M]` with `kept_keys`, `action`, `action_log_prob`, `episode` int64 (`group * R + member`),
            `episode_return`, and `next` with `env_steps` where actions are chunks. Fewer than G groups, if too many
            were left out; where all were, the last one that was drawn.
        """
        size, most, parts = self.group_size, self.most_draws * self.groups, []
        states = [self._draw() for _ in range(self.groups)]
        returns: list[list[float]] = [[] for _ in states]  # of the episodes that have ended, by group

        def more(ended: list[int]) -> list[int]:
            """States of further groups, where rows are free and too few groups may turn out useful."""
            for place in ended:
                returns[place // size].append(rows.episodes[place].episode_return)
            if rows.upcoming < len(rows.states):
                return []
            useful = [len(set(group)) > 1 for group in returns]  # some before all of their episodes have ended
            whole = [len(group) == size for group in returns]
            # Taken to be 1 at first, as if an eighth of the groups had been useful before.
            share = (sum(map(and_, useful, whole)) + self.groups / 8) / (sum(whole) + self.groups / 8)
            missing = self.groups - sum(useful) - share * (len(states) - sum(map(or_, useful, whole)))
            room = max(1, int((~rows.running).sum()) // size)
            count = max(0, min(math.ceil(missing / share), room, most - len(states)))
            fresh = [self._draw() for _ in range(count)]
            states.extend(fresh)
            returns.extend([] for _ in fresh)
            return [state for state in fresh for _ in range(size)]

        def record(running: Tensor, places: Tensor, acted: TensorDictBase, after: TensorDictBase) -> None:
            check_finite([(LOG_PROB, acted.get(LOG_PROB))], "while collecting")
            step = with_text_as(torch.uint8, acted.select(*self.kept_keys)).set("place", places)
            if ENV_STEPS in after.keys():
                step.set("next", after.select(ENV_STEPS))
            parts.append(step[running] if not running.all() else step.copy())

        with set_exploration_type(ExplorationType.RANDOM):
            first = [state for state in states for _ in range(size)]
            rows = EpisodeRows(self.env, first, 0, self.max_steps, record, more, collecting=True)
            while rows.running.any():
                rows.step(self.policy.act)
        self.episodes = [rows.episodes[place] for place in range(len(states) * size)]
        kept = [group for group, of_group in enumerate(returns) if len(set(of_group)) > 1]
        self.left_out = len(states) - len(kept)
        return self._of_groups(torch.cat(parts), kept[: self.groups] or [len(states) - 1])

    def _draw(self) -> int:
        """The next initial state of training."""
        if not self.states:
            # A round of all rows: where rows have tasks of their own, fewer would favour those of the first rows.
            self.states = self.env.draw_states(self.env.batch_size[0]).tolist()
        return self.states.pop(0)

    def _of_groups(self, decisions: TensorDictBase, kept: Sequence[int]) -> TensorDictBase:
        """The decisions of these groups, numbered from 0 in this order."""
        size, device = self.group_size, decisions.device
        number = torch.full((len(self.episodes) // size,), -1, device=device)
        number[list(kept)] = torch.arange(len(kept), device=device)
        decisions = decisions[number[decisions.get("place") // size] >= 0]
        place = decisions.pop("place")
        returns = torch.tensor([episode.episode_return for episode in self.episodes], device=place.device)
        return decisions.set(EPISODE, number[place // size] * size + place % size).set(RETURN, returns[place])

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
            metrics |= {f"rollout/success_rate/{task}": rate for task, rate in success_by_task(told).items()}
        return metrics

    @property
    def env_steps(self) -> int:
        """Control steps of the last collection, those of groups that were left out among them."""
        return sum(episode.length for episode in self.episodes)

    def publish(self) -> None:
        """Nothing: the next episodes are collected with the weights as they are then."""

    def state_dict(self) -> dict:
        """The place in the stream of initial states; no episode is under way."""
        return {"environment": self.env.state_dict(), "states": list(self.states)}

    def load_state_dict(self, state: dict | None, env_steps: int) -> bool:
        """Go on from there; False where there is no state, and another stream begins."""
        if state is None:
            self.env.set_seed(another_seed(self.seed, env_steps))
            return False
        self.env.load_state_dict(state["environment"])
        self.states = list(state.get("states", ()))  # checkpoints of before 0.3 have none
        return True

    def shutdown(self) -> None:
        self.env.close()


def by_group(batch: TensorDictBase, group_size: int) -> Tensor:
    """Returns `[G, R]` of the episodes that a batch `[M]` of decisions is of."""
    episode = batch.get(EPISODE)
    returns = torch.full((int(episode.max()) + 1,), torch.nan, device=episode.device)
    returns[episode] = batch.get(RETURN)
    return returns.view(-1, group_size)
