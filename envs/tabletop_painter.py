"""The tabletop's camera: tables, plates, blocks and the gripper as colour and depth pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from envs.tabletop_scene import (
    BLOCK_RADIUS,
    BLOCK_TOP,
    CAMERA,
    COLOURS,
    GRIPPER_TOP,
    HOLDING,
    LIFT,
    OPEN,
    PLATE_RADIUS,
    PLATE_TOP,
    SHAPES,
    SHUT,
    TABLE,
    State,
    hashed_uniform,
    lowbias32,
)
from research.schema import DEPTH, RGB


class Painter:
    """Draws states seen from straight above, from an atlas of anti-aliased sprites.

    Shapes are signed distances, rasterised once for every shape, orientation and sub-pixel position. A frame is the
    episode's scene (table, plates and resting blocks, repainted only where a block moved) with the held block and the
    gripper laid over it, so that only small patches are touched at every step.

    Args:
        size: S, pixels per side.
        colour: paint `rgb`.
        depth: paint `depth`.
        unseen: with the `vision` split's table tops, light and noise.
    """

    YAWS = 24  # orientations per full turn of a block's sprite

    WOOD = (203.0, 178.0, 148.0)
    GRAIN = 64  # noisy pixels per side, in pictures of any size

    def __init__(self, size: int, colour: bool, depth: bool, unseen: bool, device: torch.device):
        self.size, self.colour, self.depth, self.unseen, self.device = size, colour, depth, unseen, device
        self.metre = size / (2 * TABLE)  # pixels per metre
        self.phases = max(1, min(8, 512 // size))  # sub-pixel positions per axis
        self.palette = torch.tensor([*COLOURS.values(), (255, 255, 255)], dtype=torch.float32, device=device)
        blocks = [self._block(corners, yaw) for corners in SHAPES.values() for yaw in self._turns()]
        self.blocks = self._atlas(1.25 * BLOCK_RADIUS, [*blocks, self._nothing])
        self.grippers = self._atlas(0.062, [self._gripper(opening) for opening in (OPEN, HOLDING, SHUT)])
        self.plates = self._atlas(1.05 * PLATE_RADIUS, [self._plate(tinted) for tinted in (False, True)])

    # ---------------------------------------------------------------- sprites

    def _turns(self) -> list[float]:
        return [2 * math.pi * i / self.YAWS for i in range(self.YAWS)]

    @staticmethod
    def _block(corners: int, yaw: float):
        """Distance to the edge (metres, negative inside) and brightness of a regular polygon; 0 corners is a disc."""
        # In-radii that give all shapes about the area of a disc of 0.85 BLOCK_RADIUS.
        inner = {0: 0.85, 3: 0.66, 4: 0.76, 6: 0.81}[corners] * BLOCK_RADIUS

        def shape(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            if corners:
                angles = [yaw + 2 * math.pi * i / corners for i in range(corners)]
                reach = torch.stack([x * math.cos(a) + y * math.sin(a) for a in angles]).amax(dim=0)
            else:
                reach = (x.square() + y.square()).sqrt()
            # A darker rim sets blocks off from plates of the same colour.
            return reach - inner, 1 - 0.55 * ((reach - inner + 0.004) * 600).clamp(0.0, 1.0)

        return shape

    @staticmethod
    def _gripper(opening: float):
        """Two fingers beside the block and the bar behind it that joins them, as a U."""

        def shape(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = x.abs()
            finger = torch.maximum((x - opening / 2 - 0.006).abs() - 0.006, (y - 0.012).abs() - 0.028)
            bar = torch.maximum(x - opening / 2 - 0.012, (y - 0.046).abs() - 0.007)
            return torch.minimum(finger, bar), torch.where(y > 0.038, 0.18, 0.31)

        return shape

    @staticmethod
    def _plate(tinted: bool):
        """A plate is a white disc with its colour laid thinly over it, thinner on the rim."""

        def shape(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            radius = (x.square() + y.square()).sqrt()
            return radius - (0.80 if tinted else 1.0) * PLATE_RADIUS, torch.full_like(radius, 0.88)

        return shape

    @staticmethod
    def _nothing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """In the place of a block that is not there."""
        return torch.ones_like(x + y), torch.ones_like(x + y)

    def _atlas(self, radius: float, shapes: list) -> dict[str, Tensor]:
        """Rasterise `shapes` (functions of x and y in metres) at every sub-pixel position.

        Returns:
            `keep` and `tone` float32 `[shapes * phases * phases, P]`: a pixel becomes `keep * below + tone * colour`;
            `window` int64, alike: flat offsets of these pixels from the patch's corner, P being the number of pixels
            that the largest sprite covers; `half`: pixels from corner to centre.
        """
        half = min(math.ceil(radius * self.metre), (self.size - 1) // 2)
        steps = torch.arange(2 * half + 1, device=self.device)
        phase = (torch.arange(self.phases, device=self.device) + 0.5) / self.phases
        along = (steps + 0.5 - half - phase[:, None]) / self.metre  # [phases, side]
        y, x = torch.broadcast_tensors(-along[:, None, :, None], along[None, :, None, :])
        covers, tones = [], []
        for shape in shapes:
            distance, brightness = shape(x, y)
            cover = (0.5 - distance * self.metre).clamp(0.0, 1.0).reshape(self.phases**2, -1)
            covers.append(cover)
            tones.append(cover * brightness.reshape(self.phases**2, -1))
        cover, tone = torch.cat(covers), torch.cat(tones)
        # Most of a patch is not covered: covered pixels first, and no more of the others than it takes to fill a row.
        covered = int((cover > 0).sum(dim=1).max())
        pixels = (cover == 0).sort(dim=1, stable=True).indices[:, :covered]
        window = (steps[:, None] * self.size + steps).reshape(-1)[pixels]
        return {"keep": 1 - cover.gather(1, pixels), "tone": tone.gather(1, pixels), "window": window, "half": half}

    def _lay(
        self,
        canvas: dict[str, Tensor],
        atlas: dict,
        rows: Tensor,
        at: Tensor,
        sprite: Tensor,
        colour: Tensor,
        depth: float,
    ) -> None:
        """Paint into each of some images, in place, the first layer first.

        Args:
            canvas: `rgb` uint8 `[M * S * S, 3]` and / or `depth` float32 `[M * S * S]`, M images one after the other.
            atlas: the sprites to choose from.
            rows: int64 `[R]`, the images to paint into.
            at: float32 `[layers, R, 2]`, the objects' centres (x right, y up) in metres.
            sprite: int64 `[layers, R]`, which shapes of the atlas.
            colour: int64 `[layers, R]`, which entries of the palette.
            depth: metres from the camera to the objects' tops.
        """
        size, half = self.size, atlas["half"]
        place = torch.stack([TABLE - at[..., 1], at[..., 0] + TABLE], dim=-1) * self.metre  # row, column in pixels
        pixel = place.floor()
        phase = ((place - pixel) * self.phases).long()
        sprite = (sprite * self.phases + phase[..., 0]) * self.phases + phase[..., 1]
        corner = (pixel.long() - half).clamp_(0, size - 2 * half - 1)
        first = (rows * size + corner[..., 0]) * size + corner[..., 1]
        shape = (*sprite.shape, atlas["window"].shape[1])  # layers, R, P
        keep, tone, window = (
            atlas[key].index_select(0, sprite.reshape(-1)).view(shape) for key in ("keep", "tone", "window")
        )
        indices = (first[..., None] + window).flatten(1)
        if self.colour:
            layers = zip(indices, keep[..., None], tone[..., None], self.palette[colour][:, :, None], strict=True)
            for index, kept, toned, tint in layers:
                below = canvas[RGB].index_select(0, index).view(*kept.shape[:2], 3)
                painted = torch.addcmul(below * kept, toned, tint)
                canvas[RGB].index_copy_(0, index, painted.add_(0.5).to(torch.uint8).view(-1, 3))
        if self.depth:
            for index, solid in zip(indices, (keep < 0.5).flatten(1), strict=True):
                below = canvas[DEPTH].index_select(0, index)
                canvas[DEPTH].index_copy_(0, index, below.masked_fill_(solid, depth))

    # ---------------------------------------------------------------- frames

    def tables(self, state: State) -> dict[str, Tensor]:
        """Bare tables with their plates, which stay as they are for an episode: `table_*` `[M, S, S, …]`."""
        m, size, canvas = len(state["id"]), self.size, {}
        if self.colour:
            top = self._cloth if self.unseen else self._wood
            canvas[RGB] = top(state).view(m * size * size, 3)
        if self.depth:
            canvas[DEPTH] = torch.full((m * size * size,), CAMERA, device=self.device)
        if canvas:
            rows = torch.arange(m, device=self.device)
            white = torch.full_like(state["plate_colour"], len(COLOURS))
            tint = torch.stack([white, state["plate_colour"]], dim=-1).flatten(1).T  # a layer of white, then of colour
            layer = (torch.arange(len(tint), device=self.device) % 2)[:, None].expand(-1, m)
            at = state["plates"].repeat_interleave(2, dim=1).transpose(0, 1)
            self._lay(canvas, self.plates, rows, at, layer, tint, CAMERA - PLATE_TOP)
        return {f"table_{key}": value for key, value in self._shape(canvas, m).items()}

    def _wood(self, state: State) -> Tensor:
        """A wooden table top, its tone and grain varied by `looks` [M, 4] in [0, 1): uint8 `[M, S, S, 3]`."""
        looks = state["looks"]
        line = torch.linspace(-1, 1, self.size, device=self.device)
        phase = (looks[:, 0] * 6.28)[:, None, None]
        bend = 0.15 * torch.sin(2.5 * line[None, None, :] + phase)
        grain = torch.sin((14 + 6 * looks[:, 1])[:, None, None] * (line[None, :, None] + bend) + phase)
        light = 1.0 + 0.025 * grain + (looks[:, 2] - 0.5)[:, None, None] * 0.16
        warm = torch.tensor(self.WOOD, device=self.device)
        tint = (looks[:, 3:] - 0.5) * torch.tensor([10.0, 0.0, -14.0], device=self.device)
        channels = [light * channel[:, None, None] for channel in (warm + tint).unbind(dim=1)]
        return torch.stack([channel.clamp_(0, 255).to(torch.uint8) for channel in channels], dim=-1)

    def _cloth(self, state: State) -> Tensor:
        """A table cloth with stripes either way or checks; from wood's colour to grey, white or mauve."""
        looks, strange = state["looks"], state["strangeness"][:, :1]
        line = torch.linspace(-1, 1, self.size, device=self.device)
        dyes = torch.tensor([[140.0, 150.0, 160.0], [222.0, 219.0, 210.0], [170.0, 150.0, 175.0]], device=self.device)
        wood = torch.tensor(self.WOOD, device=self.device)
        cloth = wood + strange * (dyes[(looks[:, 0] * len(dyes)).long()] - wood)  # [M, 3]
        pattern = (looks[:, 1] * 3).long()  # stripes across, along, or both: checks
        wave = torch.cos((10 + 15 * looks[:, 3:]) * line)  # [M, S]
        across = torch.where((pattern == 1)[:, None], 1.0, wave)[:, :, None]
        along = torch.where((pattern == 0)[:, None], 1.0, wave)[:, None, :]
        light = 1 + torch.where(across * along > 0, 0.08, -0.14) * strange[:, :, None]
        return (cloth[:, None, None] * light[..., None]).clamp_(0, 255).to(torch.uint8)

    def _bad_light(self, rgb: Tensor, state: State) -> Tensor:
        """The picture uint8 `[M, S, S, 3]` as a noisy camera sees it when a lamp stands on one side of the table."""
        line = torch.linspace(-1, 1, self.size, device=self.device)
        angle = (state["looks"][:, 2] * 6.28)[:, None, None]
        slope = angle.cos() * line[None, None, :] + angle.sin() * line[None, :, None]
        light = 1 + state["strangeness"][:, 1, None, None] * (0.2 * slope - 0.1)
        noise = hashed_uniform(lowbias32(state["id"]) + state["steps"], self.GRAIN**2).view(-1, self.GRAIN, self.GRAIN)
        grain = torch.arange(self.size, device=self.device) * self.GRAIN // self.size
        noise = 40 * (noise[:, grain[:, None], grain] - 0.5)
        return (rgb * light[..., None] + noise[..., None]).clamp_(0, 255).to(torch.uint8)

    def scenes(self, state: State, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Tables with their resting blocks, all or those of some rows int64 `[M]`: `scene_*` `[M, S, S, …]`."""
        if rows is None:
            rows = torch.arange(len(state["id"]), device=self.device)
        canvas = self._copy(state, "table_", rows)
        if canvas:
            shape, yaw, colour, held = (
                state[key][rows] for key in ("block_shape", "block_yaw", "block_colour", "held")
            )
            resting = torch.arange(shape.shape[1], device=self.device) != held[:, None]
            sprite = torch.where(resting, shape * self.YAWS + yaw, len(SHAPES) * self.YAWS)
            at = state["blocks"][rows].transpose(0, 1)
            images = torch.arange(len(rows), device=self.device)
            self._lay(canvas, self.blocks, images, at, sprite.T, colour.T, CAMERA - BLOCK_TOP)
        return {f"scene_{key}": value for key, value in self._shape(canvas, len(rows)).items()}

    def frames(self, state: State) -> dict[str, Tensor]:
        """Scenes with held blocks and grippers: `rgb` uint8 `[M, S, S, 3]` and / or `depth` float32 `[M, S, S]`."""
        m, held = len(state["id"]), state["held"]
        canvas = self._copy(state, "scene_")
        if canvas:
            holding = held >= 0
            rows = holding.nonzero()[:, 0]
            if len(rows):
                which = held[rows]
                sprite = state["block_shape"][rows, which] * self.YAWS + state["block_yaw"][rows, which]
                at, colour = state["blocks"][rows, which], state["block_colour"][rows, which]
                self._lay(canvas, self.blocks, rows, at[None], sprite[None], colour[None], CAMERA - BLOCK_TOP - LIFT)
            opening = torch.where(state["shut"], torch.where(holding, 1, 2), 0)
            white = torch.full_like(opening, len(COLOURS))
            rows = torch.arange(m, device=self.device)
            gripper = state["gripper"]
            self._lay(canvas, self.grippers, rows, gripper[None], opening[None], white[None], CAMERA - GRIPPER_TOP)
        images = self._shape(canvas, m)
        if self.unseen and self.colour:
            images[RGB] = self._bad_light(images[RGB], state)
        return images

    def _copy(self, state: State, layer: str, rows: Tensor | None = None) -> dict[str, Tensor]:
        """A layer of all tables, or of some, to paint on."""
        layers = {key: state[f"{layer}{key}"] for key, wanted in ((RGB, self.colour), (DEPTH, self.depth)) if wanted}
        copies = {key: image.clone() if rows is None else image.index_select(0, rows) for key, image in layers.items()}
        return {key: copy.view(-1, *copy.shape[3:]) for key, copy in copies.items()}

    def _shape(self, canvas: dict[str, Tensor], m: int) -> dict[str, Tensor]:
        return {key: value.view(m, self.size, self.size, *value.shape[1:]) for key, value in canvas.items()}
