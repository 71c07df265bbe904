"""An environment that breaks in one process of several."""

from __future__ import annotations

import os

from user_package.odd_envs import Long


class BreaksInRank1(Long):
    """In the second process of torchrun alone."""

    def info(self, end: bool):
        if os.environ.get("RANK") == "1" and self.t > 20:
            raise RuntimeError("the gripper is loose")
        return {}
