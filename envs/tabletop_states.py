"""Tabletop's initial states: what lies where on the table of an id, in which colours, and what is said about it.

A state is a hash of its id, computed in integers, so that it is the same on every machine. What the generalisation
splits change about it: `envs/tabletop.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from envs.tabletop_painter import Painter
from envs.tabletop_scene import BLOCK_RADIUS, COLOURS, PLATE_RADIUS, REACH, SHAPES, State, hashed_uniform

MAX_PLATES = 4
TRIES = 16  # places considered for an object, so that it fits between the others

# Metres, as in envs/tabletop_scene.py.
GRIPPER_START = 0.9  # of REACH, in both directions
CLEARANCE = 0.01
REACH_RADIUS = 0.02
PLACE_RADIUS = 0.04


class TabletopStates:
    """Initial states by id.

    Args:
        task, num_blocks, num_plates, split: see `envs.tabletop.TabletopEnv`.
        instructions: of `tabletop_instructions.instruction_table`, on the device where states are made.
        painter: paints the table and the scene of each state.

    Attributes:
        extra_blocks, extra_plates: how many more of them the split puts on the table.
    """

    def __init__(self, task: str, num_blocks: int, num_plates: int, split: str, instructions: Tensor, painter: Painter):
        self.task, self.num_blocks, self.num_plates, self.split = task, num_blocks, num_plates, split
        self.extra_blocks = min(2, len(COLOURS) - num_blocks) if split == "semantics" else 0
        self.extra_plates = min(1, MAX_PLATES - num_plates) if split == "semantics" else 0
        self._instruction_table, self._painter, self.device = instructions, painter, instructions.device

    def make(self, ids: Tensor) -> State:
        """The states of ids int64 `[M]`, every entry a function of the id alone, their tables and scenes painted."""
        m, k, p = len(ids), self.num_blocks, self.num_plates
        colours, shapes = len(COLOURS), len(SHAPES)
        widths = [TRIES * (p + k) * 2, colours, colours, k, k, 1, 2, 4]
        # A draw depends on the id and on its column: those of a split come last and leave the others as they are.
        widths += {
            "semantics": [
                TRIES * (self.extra_plates + self.extra_blocks) * 2,
                self.extra_blocks,
                self.extra_blocks,
                1,
            ],
            "vision": [2],
            "execution": [TRIES * 2, TRIES * 2, 1, 5],
        }.get(self.split, [])
        draws = hashed_uniform(ids, sum(widths)).split(widths, dim=1)
        layout, block_order, plate_order, shape, yaw, phrase, gripper, looks, *of_split = draws
        centres = self._scatter(layout.view(m, TRIES, p + k, 2), [True] * p + [False] * k)
        block_colour = block_order.argsort(dim=1, stable=True)[:, : k + self.extra_blocks]
        plate_colour = plate_order.argsort(dim=1, stable=True)[:, : p + self.extra_plates]
        block_shape = (shape * shapes).long()
        phrasing = (phrase[:, 0] * len(self._instruction_table)).long()
        zeros = torch.zeros(m, dtype=torch.int64, device=self.device)
        state = {
            "id": ids,
            "gripper": (gripper * 2 - 1) * REACH * GRIPPER_START,
            "shut": torch.full((m,), self.task == "push", device=self.device),
            "held": zeros - 1,
            "held_steps": zeros,
            "steps": zeros.clone(),
            "offset": torch.zeros(m, 2, device=self.device),
            "potential": torch.zeros(m, device=self.device),
            "blocks": centres[:, p:],
            "plates": centres[:, :p],
            "block_colour": block_colour,
            "block_shape": block_shape,
            "plate_colour": plate_colour,
            "block_yaw": (yaw * Painter.YAWS).long(),
            "looks": looks,
            "language": self._instruction_table[phrasing, block_shape[:, 0], block_colour[:, 0], plate_colour[:, 0]],
        }
        if self.split == "semantics":
            self._add_confusing_objects(state, *of_split)
        elif self.split == "execution":
            self._displace(state, *of_split)
        elif self.split == "vision":
            (state["strangeness"],) = of_split
        # Reaching starts at a distance; otherwise some states would be solved before the first action.
        if self.task == "reach":
            away = (state["gripper"] - state["blocks"][:, 0]).norm(dim=-1, keepdim=True) < 2 * REACH_RADIUS
            state["gripper"] = torch.where(away, -state["gripper"].sign() * REACH * 0.8, state["gripper"])
        state.update(self._painter.tables(state))
        state.update(self._painter.scenes(state))
        state["gap"] = (state["blocks"][:, 0] - state["plates"][:, 0]).norm(dim=-1)
        return state

    def _scatter(self, uniform: Tensor, is_plate: list[bool], standing: Tensor | None = None) -> Tensor:
        """Centres of objects put on the table one by one, each apart from all before it.

        Args:
            uniform: `[M, tries, objects, 2]` in [0, 1).
            is_plate: for each object whether it is a plate or a block.
            standing: `[M, T, 2]`, the plates and then the blocks that are on the table already.
        Returns:
            float32 `[M, T + objects, 2]`, metres.
        """
        radii = [] if standing is None else [PLATE_RADIUS] * self.num_plates + [BLOCK_RADIUS] * self.num_blocks
        centres = [] if standing is None else list(standing.unbind(dim=1))
        for j, plate in enumerate(is_plate):
            radius = PLATE_RADIUS if plate else BLOCK_RADIUS
            named = standing is None and j == self.num_plates
            candidates = (uniform[:, :, j] * 2 - 1) * (self._target_span if named else REACH - radius)
            if radii:
                need = torch.tensor([radius + r + CLEARANCE for r in radii], device=uniform.device)
                centres.append(self._first_with_room(candidates, torch.stack(centres, dim=1), need))
            else:
                centres.append(candidates[:, 0])
            radii.append(radius)
        return torch.stack(centres, dim=1)

    @property
    def _target_span(self) -> float:
        """How far from the table's centre the named block starts: one to be pushed needs room on every side."""
        return REACH - (0.085 if self.task == "push" else BLOCK_RADIUS)

    @staticmethod
    def _first_with_room(candidates: Tensor, standing: Tensor, need: Tensor) -> Tensor:
        """The first of several tries that fits, else the roomiest one.

        Args:
            candidates: `[M, tries, 2]`, centres to choose from.
            standing: `[M, T, 2]`, centres of what is on the table.
            need: `[T]`, the distance to keep from each of them.
        Returns:
            float32 `[M, 2]`.
        """
        m, tries, _ = candidates.shape
        rank = torch.arange(tries, 0, -1, device=candidates.device)
        room = ((candidates[:, :, None] - standing[:, None]).norm(dim=-1) - need).amin(dim=-1)
        pick = torch.where(room >= 0, rank, room.clamp(max=0) - 1).argmax(dim=1)
        return candidates[torch.arange(m, device=candidates.device), pick]

    def _add_confusing_objects(self, state: State, layout: Tensor, shape: Tensor, yaw: Tensor, twin: Tensor) -> None:
        """The `semantics` split: more objects, and blocks that are like the named one in colour or in shape."""
        m, p, k = len(layout), self.num_plates, self.num_blocks
        kinds = [True] * self.extra_plates + [False] * self.extra_blocks
        standing = torch.cat([state["plates"], state["blocks"]], dim=1)
        added = self._scatter(layout.view(m, TRIES, len(kinds), 2), kinds, standing)[:, p + k :]
        state["plates"] = torch.cat([state["plates"], added[:, : self.extra_plates]], dim=1)
        state["blocks"] = torch.cat([state["blocks"], added[:, self.extra_plates :]], dim=1)
        state["block_yaw"] = torch.cat([state["block_yaw"], (yaw * Painter.YAWS).long()], dim=1)
        shapes = torch.cat([state["block_shape"], (shape * len(SHAPES)).long()], dim=1)
        # The first distractor may have the named colour and then has another shape; every second one has the shape.
        colours, target, first = state["block_colour"], shapes[:, 0], shapes[:, 1]
        colours[:, 1] = torch.where(twin[:, 0] < 0.5, colours[:, 0], colours[:, 1])
        shapes[:, 1] = torch.where(first == target, (first + 1) % len(SHAPES), first)
        shapes[:, 2::2] = target[:, None]
        state["block_shape"] = shapes

    def _displace(self, state: State, near: Tensor, moved: Tensor, when: Tensor, start: Tensor) -> None:
        """The `execution` split: an unusual place for the named block, another one soon, and for the gripper too."""
        m, span, last = len(near), self._target_span, self.num_plates - 1
        others = torch.cat([state["plates"], state["blocks"][:, 1:]], dim=1)
        radii = [PLATE_RADIUS] * self.num_plates + [BLOCK_RADIUS] * (self.num_blocks - 1)
        need = torch.tensor([BLOCK_RADIUS + r + CLEARANCE for r in radii], device=self.device)
        moved = (moved.view(m, TRIES, 2) * 2 - 1) * span
        state["moved_to"] = self._first_with_room(moved, others, need)
        state["moves_at"] = 3 + (when[:, 0] * 4).long()
        # The last plate is the goal where it is the only one; a block may lie against it, but not have arrived.
        nearest = 0.0 if last else 1.25 * PLACE_RADIUS
        need[last] = nearest
        turn, distance = near.view(m, TRIES, 2).unbind(dim=-1)
        turn, distance = 2 * math.pi * turn, nearest + (0.08 - nearest) * distance
        around = distance[..., None] * torch.stack([turn.cos(), turn.sin()], dim=-1)
        around = (state["plates"][:, last, None] + around).clamp(-span, span)
        place = self._first_with_room(around, others, need)
        state["blocks"] = torch.cat([place[:, None], state["blocks"][:, 1:]], dim=1)
        # The gripper at the rim, further out than training starts in one direction and anywhere in the other.
        sign, out, along, axis, shut = start.unbind(dim=1)
        rim = torch.where(sign < 0.5, -1.0, 1.0) * (GRIPPER_START + (1 - GRIPPER_START) * out)
        pose = torch.stack([rim, along * 2 - 1], dim=1) * REACH
        state["gripper"] = torch.where((axis < 0.5)[:, None], pose, pose.flip(1))
        if self.task == "pick_place":
            state["shut"] = shut < 0.5
