"""Return, length and success of the episodes that end while collecting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from research.schema import SUCCESS


class EpisodeStatistics:
    """Episodes followed across the boundaries of rollouts, environment by environment.

    Args:
        num_envs: N.
        device: where rollouts are.
    """

    def __init__(self, num_envs: int, device: torch.device | str = "cpu"):
        self.running_return = torch.zeros(num_envs, device=device)
        self.running_length = torch.zeros(num_envs, device=device)
        self._ended: list[tuple[Tensor, Tensor, Tensor | None]] = []  # returns, lengths, successes

    def observe(self, rollout: TensorDictBase, rows: Sequence[int] | slice = slice(None)) -> None:
        """Follow the episodes of a rollout `[M, T]`; `rows` says which of the N environments it is of."""
        after = rollout["next"]
        reward, done = after["reward"].squeeze(-1), after["done"].squeeze(-1)
        total, length = self.running_return[rows], self.running_length[rows]
        returns, lengths = [], []  # of the episodes under way, [M] at every step
        for t in range(rollout.batch_size[1]):
            returns.append(total + reward[:, t])
            lengths.append(length + 1)
            total = torch.where(done[:, t], 0.0, returns[-1])
            length = torch.where(done[:, t], 0.0, lengths[-1])
        self.running_return[rows], self.running_length[rows] = total, length
        ended = done.T  # [T, M]
        if ended.any():
            success = after[SUCCESS].squeeze(-1)[done].float() if SUCCESS in after.keys() else None
            self._ended.append((torch.stack(returns)[ended], torch.stack(lengths)[ended], success))

    def metrics(self) -> dict[str, float]:
        """Means over the episodes that ended since this was last asked.

        Empty if none did; without success if the environment has no such notion.
        """
        ended, self._ended = self._ended, []
        if not ended:
            return {}
        returns, lengths, success = ([part for part in parts if part is not None] for parts in zip(*ended, strict=True))
        metrics = {
            "rollout/return": torch.cat(returns).mean().item(),
            "rollout/episode_length": torch.cat(lengths).mean().item(),
            "rollout/episodes": float(sum(map(len, returns))),
        }
        if success:
            metrics["rollout/success_rate"] = torch.cat(success).mean().item()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        return {"return": self.running_return, "length": self.running_length}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.running_return.copy_(state["return"])
        self.running_length.copy_(state["length"])
