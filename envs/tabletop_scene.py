"""What the tabletop's task and its painter both know: sizes, heights, colours, and numbers hashed from ids.

Lengths are in metres; x to the right and y up in the picture, from the table's centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Everything about M tables, each entry with M rows. A plain dict: a TensorDict's checks cost a third of a step.
State = dict[str, Tensor]

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 200),
    "yellow": (240, 200, 40),
    "purple": (136, 60, 170),
    "orange": (245, 130, 30),
}
SHAPES = {"cube": 4, "prism": 3, "hexagon": 6, "cylinder": 0}  # name -> corners seen from above; 0 is a disc

# The camera sees the square [-TABLE, TABLE]^2; the gripper stays within [-REACH, REACH]^2.
TABLE, REACH = 0.25, 0.235
PLATE_RADIUS, BLOCK_RADIUS = 0.05, 0.03
PUSHER_RADIUS = 0.02
OPEN, HOLDING, SHUT = 0.08, 0.05, 0.0  # between the fingers
# The camera's height above the table, the heights of what lies on it, and by how much a block in the gripper is lifted.
CAMERA, PLATE_TOP, BLOCK_TOP, GRIPPER_TOP, LIFT = 0.80, 0.01, 0.05, 0.12, 0.07


def lowbias32(x: Tensor) -> Tensor:
    """A bijective 32-bit integer hash ("lowbias32", C. Wellons, 2018), in int64 so that no sign bit interferes."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def hashed_uniform(ids: Tensor, draws: int) -> Tensor:
    """`draws` numbers in [0, 1) for each id: the same on every machine and device.

    Args:
        ids: int64 `[M]`, each in [0, 2^32).
        draws: D.
    Returns:
        float32 `[M, D]`, multiples of 2^-24.
    """
    columns = lowbias32(torch.arange(draws, device=ids.device) + 0x9E3779B9)
    return (lowbias32(lowbias32(ids & 0xFFFFFFFF)[:, None] ^ columns) >> 8).float() * 2.0**-24
