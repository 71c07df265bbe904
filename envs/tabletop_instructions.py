"""What the tasks of `envs.tabletop` are called in words: those of training, and those of the split `semantics`."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from envs.tabletop_scene import COLOURS, SHAPES
from research.errors import UserError
from research.schema import encode_text

PHRASINGS = {
    "reach": ("move to the {block}", "go to the {block}", "reach for the {block}", "touch the {block}"),
    "push": (
        "push the {block} to the {plate}",
        "slide the {block} onto the {plate}",
        "shove the {block} over to the {plate}",
        "move the {block} to the {plate} by pushing",
    ),
    "pick_place": (
        "put the {block} on the {plate}",
        "place the {block} onto the {plate}",
        "pick up the {block} and put it on the {plate}",
        "move the {block} over to the {plate}",
    ),
}
UNSEEN_PHRASINGS = {
    "reach": (
        "go and touch the {block}",
        "reach over to the {block}",
        "bring the gripper to the {block}",
        "the {block} is where the gripper belongs",
    ),
    "push": (
        "shove the {block} onto the {plate}",
        "push the {block} over to the {plate}",
        "nudge the {block} until it is on the {plate}",
        "the {plate} is where the {block} should end up",
    ),
    "pick_place": (
        "put the {block} onto the {plate}",
        "pick up the {block} and place it on the {plate}",
        "set the {block} down on the {plate}",
        "the {plate} is where the {block} belongs",
    ),
}


@lru_cache(maxsize=16)
def instruction_table(task: str, unseen: bool, length: int) -> Tensor:
    """Every instruction of a task: int64 `[phrasing, block shape, block colour, plate colour, L]`.

    Raises:
        UserError: one of them has more than L bytes.
    """
    phrasings = (UNSEEN_PHRASINGS if unseen else PHRASINGS)[task]
    texts = [
        phrasing.format(block=f"{block} {shape}", plate=f"{plate} plate")
        for phrasing in phrasings
        for shape in SHAPES
        for block in COLOURS
        for plate in COLOURS
    ]
    try:
        table = encode_text(texts, length)
    except UserError as error:
        raise UserError(f"trainer.env_config.instruction_length: {error}") from error
    return table.view(len(phrasings), len(SHAPES), len(COLOURS), len(COLOURS), length)
