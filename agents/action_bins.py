"""Actions as tokens: each number in [-1, 1] is one of 256 bins, and a bin is one of the last tokens of a vocabulary.

RT-2 (Brohan et al. 2023, arXiv:2307.15818) and OpenVLA (Kim et al. 2024, arXiv:2406.09246, section 3.2). The 256 edges
lie evenly from -1 to 1, and between them there are 255 intervals. A number goes to the token of the last edge that is
not above it; a token stands for the middle of its interval, the last two for that of the last interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActionBins:
    """Numbers to the ids of tokens, and back.

    Args:
        tokens: how many tokens the vocabulary has; the first bin is its last token, the second the one before, ...
        bins: how many of them are bins.
    """

    tokens: int
    bins: int = 256

    @property
    def first_id(self) -> int:
        """The smallest id of a bin, that of the greatest number."""
        return self.tokens - self.bins

    def ids(self, numbers: Tensor) -> Tensor:
        """Float `[...]`, cut off to [-1, 1] -> int64 `[...]`."""
        return self.tokens - torch.bucketize(numbers.double().clamp(-1, 1), self._edges(numbers), right=True)

    def numbers(self, ids: Tensor) -> Tensor:
        """Int64 `[...]` -> float32 `[...]`."""
        edges, interval = self._edges(ids), (self.tokens - 1 - ids).clamp(max=self.bins - 2)
        return ((edges[interval] + edges[interval + 1]) / 2).float()

    def _edges(self, beside: Tensor) -> Tensor:
        # To the last bit as NumPy's linspace, which OpenVLA's data were made with.
        return torch.arange(self.bins, dtype=torch.float64, device=beside.device) * (2 / (self.bins - 1)) - 1
