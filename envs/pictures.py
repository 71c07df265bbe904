"""Pictures at other sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` at another size: bilinear, averaging where it shrinks."""
    if frame.shape[:2] == (height, width):
        return frame
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


def letterbox(frame: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` fitted into a black square, uint8 `[size, size, 3]`."""
    scale = size / max(frame.shape[:2])
    height, width = (max(1, round(side * scale)) for side in frame.shape[:2])
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = resize(frame, height, width)
    return square
