"""Return, length and success of the episodes of training, counted by the rollout in which they began.

Episodes that end early are no fair sample: where success ends an episode, the first to end have all succeeded. So an
episode is reported together with all those that began during the same rollout, in whatever environment, and when the
last of them has ended. Whether it counts, and when, then depends on when it began and not on how it went. The report of
a rollout is late by the length of its longest episode, at most by `PATIENCE` rollouts: one that never ends is not
waited for.

An episode succeeds if the environment reports success at any of its steps. Lengths are control steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.schema import ENV_STEPS, INITIAL_STATE, SUCCESS, SUCCESS_NOW
from research.training.parallel import ALONE, World

PATIENCE = 100


class EpisodeStatistics:
    """Episodes followed across the boundaries of rollouts, environment by environment.

    Args:
        num_envs: N.
        device: where rollouts are.
        task_names: where there are several tasks: the task of an initial state is `task_names[id % len(task_names)]`,
            and success is also reported of each.
        world: the processes whose episodes are reported together.
    """

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        task_names: Sequence[str] = (),
        world: World = ALONE,
    ):
        self.world = world
        self.task_names = task_names if len(task_names) > 1 else ()
        # Of the episode under way in each environment:
        self.running_return = torch.zeros(num_envs, device=device)
        self.running_length = torch.zeros(num_envs, device=device)
        self.running_success = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.began = torch.zeros(num_envs, dtype=torch.int64, device=device)  # in which rollout
        self._rollout = 0  # the one being collected
        # Of episodes that have ended, float64 [E, 7]: the rollout that they began in, their task, 1, return, length,
        # success at any step, success at the last one. Then the sums of the last five, by rollout and task.
        self._ended: list[Tensor] = []
        self._sums: dict[int, Tensor] = {}
        self._has_success = self._goes_on = False  # whether success is reported, and whether episodes go on after it

    def observe(self, rollout: TensorDictBase, rows: Sequence[int] | slice = slice(None)) -> None:
        """Follow the episodes of a rollout `[M, T]`; `rows` says which of the N environments it is of."""
        after = rollout["next"]
        reward, done = after["reward"].squeeze(-1), after["done"].squeeze(-1)
        self._has_success = self._has_success or SUCCESS in after.keys()
        success = after[SUCCESS].squeeze(-1) if SUCCESS in after.keys() else torch.zeros_like(done)
        at_end = after[SUCCESS_NOW].squeeze(-1) if SUCCESS_NOW in after.keys() else success
        taken = after[ENV_STEPS].squeeze(-1) if ENV_STEPS in after.keys() else torch.ones_like(reward)
        task = after[INITIAL_STATE].squeeze(-1) % len(self.task_names) if self.task_names else torch.zeros_like(reward)
        total, length, succeeded = self.running_return[rows], self.running_length[rows], self.running_success[rows]
        returns, lengths, successes = [], [], []  # of the episodes under way, [M] at every step
        for t in range(rollout.batch_size[1]):
            returns.append(total + reward[:, t])
            lengths.append(length + taken[:, t])
            successes.append(succeeded | success[:, t])
            total = torch.where(done[:, t], 0.0, returns[-1])
            length = torch.where(done[:, t], 0.0, lengths[-1])
            succeeded = successes[-1] & ~done[:, t]
        self.running_return[rows], self.running_length[rows], self.running_success[rows] = total, length, succeeded
        ends, first = done.any(dim=1), self.began[rows].clone()
        self.began[rows] = torch.where(ends, self._rollout + done[:, -1].long(), first)
        if ends.any():
            began = torch.where(done.cumsum(dim=1) > 1, self._rollout, first[:, None])  # at a row's later ends
            sums = (torch.stack(column, dim=1) for column in (returns, lengths, successes))
            columns = (began, task, torch.ones_like(began), *sums, at_end)
            self._ended.append(torch.stack([column[done].double() for column in columns], dim=-1))

    def forget(self, rows: Sequence[int] | slice) -> None:
        """Leave out the episodes under way in these environments: what would have ended them was lost."""
        self.running_return[rows], self.running_length[rows], self.running_success[rows] = 0.0, 0.0, False
        self.began[rows] = self._rollout

    def metrics(self) -> dict[str, float]:
        """Means over the episodes of the rollouts of which, since this was last asked, the last episode has ended.

        Empty if there is none; without success if the environment has no such notion. A task of which no episode ended
        is left out. Ends the rollout that is being collected, in all processes.
        """
        self._add_up()
        self._rollout += 1
        waited_for = max(-self.world.largest(-int(self.began.min())), self._rollout - PATIENCE)
        complete = [self._sums.pop(rollout) for rollout in sorted(self._sums) if rollout < waited_for]
        none = torch.zeros(max(1, len(self.task_names)), 5, dtype=torch.float64)
        by_task = self.world.sum(torch.stack([none, *complete]).sum(dim=0))  # [tasks, 5]
        self._goes_on = bool(self.world.largest(self._goes_on))
        episodes, *sums = by_task.sum(dim=0).tolist()
        if not episodes:
            return {}
        total, length, success, success_at_end = (one / episodes for one in sums)
        metrics = {"rollout/return": total, "rollout/episode_length": length, "rollout/episodes": episodes}
        if self._has_success:
            metrics["rollout/success_rate"] = success
            for name, (count, *_, succeeded, _) in zip(self.task_names, by_task.tolist(), strict=False):
                metrics |= {f"rollout/success_rate/{name}": succeeded / count} if count else {}
        if self._goes_on:
            metrics["rollout/success_at_end"] = success_at_end
        return metrics

    def describe_endless(self, limit: int) -> str | None:
        """A warning that all episodes under way are longer than `limit` control steps, or None where one is not.

        Where none ends, none begins: the worlds that a run started in are all that it trains on.
        """
        if not (shortest := int(self.running_length.min())) > limit:
            return None
        return (
            f"no episode has ended in the last {shortest:,} control steps of each environment, where an evaluation "
            f"cuts its episodes off after {limit:,} (trainer.max_eval_steps): a run then trains in the worlds that it "
            "started in alone, and has no rollout/return and rollout/success_rate; give the environment a time limit "
            "(gym: has env_config.max_episode_steps), or raise trainer.max_eval_steps if its episodes are so long"
        )

    def _add_up(self) -> None:
        """Add the episodes that have ended to the sums of the rollouts that they began in."""
        if not self._ended:
            return
        rows, self._ended = torch.cat(self._ended).cpu(), []
        for began in rows[:, 0].unique().tolist():
            these = rows[rows[:, 0] == began]
            sums = self._sums.setdefault(int(began), torch.zeros(max(1, len(self.task_names)), 5, dtype=torch.float64))
            sums.index_add_(0, these[:, 1].long(), these[:, 2:])
        self._goes_on = self._goes_on or bool((rows[:, -2] != rows[:, -1]).any())

    def state_dict(self) -> dict[str, Any]:
        """Everything: episodes under way, and those that wait for others."""
        self._add_up()
        return {
            "return": self.running_return.clone(),
            "length": self.running_length.clone(),
            "success": self.running_success.clone(),
            "began": self.began.clone(),
            "rollout": self._rollout,
            "sums": {str(rollout): sums for rollout, sums in self._sums.items()},
            "has_success": self._has_success,
            "goes_on": self._goes_on,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; earlier ones have returns and lengths alone."""
        self.running_return.copy_(state["return"])
        self.running_length.copy_(state["length"])
        if "began" not in state:
            return
        self.running_success.copy_(state["success"])
        self.began.copy_(state["began"])
        self._rollout, self._ended = state["rollout"], []
        self._sums = {int(rollout): sums.cpu().clone().view(-1, 5) for rollout, sums in state["sums"].items()}
        self._has_success, self._goes_on = state["has_success"], state["goes_on"]
