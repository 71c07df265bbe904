"""What training keeps of all it has seen: the spread of discounted rewards, and what a model makes of `proprio`.

Both stand still while a rollout is collected and learned from: the probability ratio starts at 1, and all rewards of an
update are on one scale. Statistics are those of all processes of a run.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import RunningValueNorm

from research.schema import OBSERVATION, PROPRIO
from research.training.parallel import ALONE, World
from research.training.rollout import WORKER

LARGEST_REWARD = 10.0  # after scaling, as in Stable-Baselines3's VecNormalize


class RewardScaling:
    """Rewards over the running standard deviation of their discounted sum, R_t = gamma R_{t-1} + r_t, from 0 at resets.

    Engstrom et al. 2020 (https://arxiv.org/abs/2005.12729), algorithm 1; `VecNormalize` of Stable-Baselines3 and
    `NormalizeReward` of Gymnasium are the same but for when statistics are taken in: there at every step, here with
    every rollout, before it is scaled. Rewards are not centred.

    Args:
        gamma: discount per decision.
        num_envs: N of this process.
        share: environments of one worker, which arrive together; N where nobody else collects.
        world: the processes of the run.
    """

    def __init__(self, gamma: float, num_envs: int, share: int, world: World = ALONE):
        self.gamma, self.share, self.world = gamma, share, world
        self.statistics = RunningValueNorm(shape=1, epsilon=1e-8).double()
        self.sums = torch.zeros(world.size * num_envs, dtype=torch.float64)  # R of every environment, all processes'
        self.own = slice(world.rank * num_envs, (world.rank + 1) * num_envs)

    def __call__(self, rollout: TensorDictBase) -> TensorDictBase:
        """Take a rollout `[N, T]` in, and return it with scaled rewards; the one that was given stays as it is."""
        reward = rollout["next", "reward"]
        sums, now = self._discounted(rollout)
        gathered = self.world.gather((sums, now))
        self.statistics.update(torch.cat([sums.reshape(-1, 1) for sums, _ in gathered]))
        self.sums = torch.cat([now for _, now in gathered])
        scaled = (reward / self.statistics.scale().item()).clamp(-LARGEST_REWARD, LARGEST_REWARD)
        return rollout.copy().set("next", rollout["next"].copy().set("reward", scaled))

    def _discounted(self, rollout: TensorDictBase) -> tuple[Tensor, Tensor]:
        """R at every step, `[N, T]`, and as it goes on in each environment, `[N]`."""
        now, all_sums = self.sums[self.own].clone(), []
        for place, part in enumerate(rollout.split(self.share)):
            # Workers' parts come in any order, and one may come twice; those thrown away leave a gap.
            worker = int(part[WORKER][0, 0]) if WORKER in part.keys() else place
            rows = slice(worker * self.share, (worker + 1) * self.share)
            reward, done = (part["next", key].squeeze(-1).cpu() for key in ("reward", "done"))
            sums = torch.empty(reward.shape, dtype=torch.float64)
            for t in range(reward.shape[1]):
                sums[:, t] = self.gamma * now[rows] + reward[:, t]
                now[rows] = torch.where(done[:, t], 0.0, sums[:, t])
            all_sums.append(sums)
        return torch.cat(all_sums), now

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": dict(self.statistics.state_dict()), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with as many environments, in whatever number of processes."""
        self.statistics.load_state_dict(state["statistics"])
        self.sums = state["sums"].clone()

    def begin_anew(self) -> None:
        """All environments are reset: what episodes had until then belongs to none that goes on."""
        self.sums.zero_()


class Normaliser(Protocol):
    """A module that follows what it is shown; `agents.normalisation.RunningNormalisation` is one."""

    def update(self, seen: Tensor) -> None:
        """Take in `[B, P]`."""


class ProprioStatistics:
    """Shows a model's normaliser the `proprio` of every batch, once the batch has been learned from.

    Args:
        normaliser: of the model; the same in all processes.
        world: the processes of the run.
    """

    def __init__(self, normaliser: Normaliser, world: World = ALONE):
        self.normaliser, self.world = normaliser, world

    def __call__(self, batch: TensorDictBase) -> None:
        proprio = batch[OBSERVATION, PROPRIO]
        everyones = self.world.gather(proprio.cpu() if self.world.size > 1 else proprio)
        self.normaliser.update(torch.cat(everyones).to(proprio.device))
