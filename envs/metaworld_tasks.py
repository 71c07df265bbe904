"""Meta-World's 50 tasks as this project tells and shows them: instructions, cameras, and the lists MT10 and MT50.

Meta-World (Yu et al., 2019, arXiv:1910.10897; names and lists of its release 3) comes without language. Colours are
those of the pictures: where a task's goal is marked by a ball that can be seen, the instruction names its colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.mujoco_rendering import FreeCamera
from research.errors import UserError, did_you_mean

# task -> phrasings; the first is the default one. No two tasks share a phrasing.
INSTRUCTIONS = {
    "assembly-v3": (
        "put the ring on the red peg",
        "pick up the ring by its green handle and put it over the peg",
        "slip the grey ring over the red peg",
        "assemble the ring and the peg",
    ),
    "basketball-v3": (
        "put the orange ball in the basket",
        "throw the basketball through the hoop",
        "pick up the ball and drop it through the red ring",
        "score a basket",
    ),
    "bin-picking-v3": (
        "move the green block from the red bin to the blue bin",
        "pick the block out of the red bin and put it in the blue one",
        "take the block over into the blue bin",
        "put what is in the red bin into the blue bin",
    ),
    "box-close-v3": (
        "put the lid on the box",
        "close the box with its lid",
        "pick up the wooden lid by its handle and cover the box",
        "cover the open box",
    ),
    "button-press-topdown-v3": (
        "press the red button from above",
        "push the red button down",
        "press down the button on top of the box",
        "move above the button and press it",
    ),
    "button-press-topdown-wall-v3": (
        "press the red button from above, behind the wall",
        "reach over the wall and push the button down",
        "press down the button on the box behind the wall",
        "go over the wall and press the button on top",
    ),
    "button-press-v3": (
        "press the red button on the front of the box",
        "push the red button in",
        "press the button that faces you",
        "move in front of the button and push it in",
    ),
    "button-press-wall-v3": (
        "press the red button on the front of the box, past the wall",
        "go over the wall and push the button in",
        "push in the button that is behind the wall",
        "get around the wall and press the front button",
    ),
    "coffee-button-v3": (
        "press the button of the coffee machine",
        "start the coffee machine",
        "push the coffee machine's button",
        "make a coffee: press the button",
    ),
    "coffee-pull-v3": (
        "pull the mug away from the coffee machine to the green dot",
        "take the mug from the coffee machine to the green dot",
        "pull the white mug to the green dot",
        "drag the mug out from under the coffee machine",
    ),
    "coffee-push-v3": (
        "push the mug under the coffee machine, to the red dot",
        "put the mug under the coffee machine",
        "push the white mug to the red dot",
        "slide the mug up to the coffee machine",
    ),
    "dial-turn-v3": (
        "turn the dial",
        "rotate the knob",
        "turn the dial on the table around",
        "push the dial so that it turns",
    ),
    "disassemble-v3": (
        "take the ring off the red peg",
        "pick up the ring by its green handle and lift it off the peg",
        "pull the grey ring up from the peg",
        "disassemble the ring and the peg",
    ),
    "door-close-v3": (
        "close the door",
        "shut the door",
        "push the open door shut",
        "swing the door closed, to the green ball",
    ),
    "door-lock-v3": (
        "lock the door",
        "turn the lock down to the green dot",
        "rotate the lock of the door until it is locked",
        "bolt the door",
    ),
    "door-open-v3": (
        "open the door",
        "pull the door open",
        "pull the handle to swing the door open",
        "swing the door open, to the green ball",
    ),
    "door-unlock-v3": (
        "unlock the door",
        "turn the lock to the blue dot",
        "rotate the lock of the door until it is unlocked",
        "unbolt the door",
    ),
    "hand-insert-v3": (
        "put the gripper into the hole, to the blue ball",
        "insert the hand into the hole",
        "reach down into the hole in the table",
        "lower the gripper to the blue ball in the hole",
    ),
    "drawer-close-v3": (
        "close the drawer",
        "push the green drawer shut",
        "shut the drawer",
        "push the drawer in",
    ),
    "drawer-open-v3": (
        "open the drawer",
        "pull the green drawer open",
        "pull the drawer out by its white handle",
        "pull the drawer out to the green ball",
    ),
    "faucet-open-v3": (
        "open the faucet",
        "turn the faucet on",
        "turn the red handle of the faucet to the green dot",
        "turn the tap on",
    ),
    "faucet-close-v3": (
        "close the faucet",
        "turn the faucet off",
        "turn the red handle of the faucet to the blue dot",
        "turn the tap off",
    ),
    "hammer-v3": (
        "hammer the nail into the block",
        "pick up the red hammer and drive in the nail",
        "hit the nail with the hammer",
        "use the hammer on the nail",
    ),
    "handle-press-side-v3": (
        "press the handle down from the side",
        "push down the red handle that points to the side",
        "press down the sideways handle",
        "move the handle at the side down",
    ),
    "handle-press-v3": (
        "press the handle down",
        "push down the red handle that points forward",
        "push the handle in front of you down",
        "move the front handle down",
    ),
    "handle-pull-side-v3": (
        "pull the handle up from the side",
        "pull up the red handle that points to the side",
        "lift the sideways handle",
        "move the handle at the side up",
    ),
    "handle-pull-v3": (
        "pull the handle up",
        "pull up the red handle that points forward",
        "lift the handle in front of you",
        "move the front handle up",
    ),
    "lever-pull-v3": (
        "pull the lever up to the red ball",
        "pull up the lever",
        "raise the lever with the blue end",
        "turn the lever until it points up",
    ),
    "pick-place-wall-v3": (
        "pick up the puck and bring it over the wall to the blue ball",
        "carry the puck over the wall to the blue ball",
        "lift the red puck across the wall to the blue ball",
        "take the puck to the blue ball behind the wall",
    ),
    "pick-out-of-hole-v3": (
        "pick the red puck out of the hole",
        "take the puck out of the hole to the blue dot",
        "lift the red cylinder out of the hole in the table",
        "get the puck out of the hole",
    ),
    "pick-place-v3": (
        "pick up the puck and bring it to the blue ball",
        "carry the puck to the blue ball",
        "lift the red puck to the blue ball",
        "pick the puck up and hold it at the blue ball",
    ),
    "plate-slide-v3": (
        "slide the plate forward into the goal",
        "push the black plate into the goal in front of you",
        "slide the plate straight into the net",
        "shoot the plate forward to the red dot",
    ),
    "plate-slide-side-v3": (
        "slide the plate sideways into the goal",
        "push the black plate into the goal at the side",
        "slide the plate to the side, into the net",
        "shoot the plate sideways to the red dot",
    ),
    "plate-slide-back-v3": (
        "slide the plate back out of the goal",
        "pull the black plate out of the goal, towards you",
        "slide the plate back to the red dot",
        "get the plate straight back out of the net",
    ),
    "plate-slide-back-side-v3": (
        "slide the plate sideways out of the goal",
        "push the black plate out of the goal to the side",
        "slide the plate out sideways, to the red dot",
        "get the plate out of the net, to the side",
    ),
    "peg-insert-side-v3": (
        "insert the green peg into the hole in the side of the box",
        "put the peg into the red hole",
        "pick up the green peg and push it into the box",
        "plug the peg in from the side",
    ),
    "peg-unplug-side-v3": (
        "pull the peg out sideways",
        "unplug the grey peg",
        "pull the plug out of the wall plate to the red dot",
        "take the peg out of its socket",
    ),
    "soccer-v3": (
        "kick the ball into the goal",
        "push the soccer ball into the goal",
        "score a goal: push the ball to the green ball in the net",
        "roll the football into the net",
    ),
    "stick-push-v3": (
        "push the thermos to the green ball with the blue stick",
        "pick up the stick and push the thermos with it",
        "use the blue stick to push the bottle",
        "shove the thermos with the stick",
    ),
    "stick-pull-v3": (
        "pull the thermos to the green ball with the blue stick",
        "put the stick through the thermos handle and pull",
        "use the blue stick to pull the bottle",
        "hook the thermos with the stick and pull it",
    ),
    "push-v3": (
        "push the puck to the green ball",
        "slide the red puck to the green ball",
        "push the puck over the table until it is at the green ball",
        "move the puck along the table to the green ball",
    ),
    "push-wall-v3": (
        "push the puck around the wall to the green ball",
        "slide the red puck past the wall to the green ball",
        "push the puck to the green ball behind the wall",
        "get the puck around the wall, to the green ball",
    ),
    "push-back-v3": (
        "pull the wooden block back to the green ball",
        "push the block back to the green ball",
        "slide the wooden block towards you, to the green ball",
        "drag the block back until it is at the green ball",
    ),
    "reach-v3": (
        "reach the red ball",
        "move the gripper to the red ball",
        "bring the hand to the red ball",
        "go to the red ball",
    ),
    "reach-wall-v3": (
        "reach the red ball behind the wall",
        "move the gripper past the wall to the red ball",
        "bring the hand over the wall to the red ball",
        "go around the wall to the red ball",
    ),
    "shelf-place-v3": (
        "put the blue block on the shelf",
        "place the block on the shelf, at the green ball",
        "pick up the blue block and set it in the shelf",
        "store the block in the shelf",
    ),
    "sweep-into-v3": (
        "sweep the block into the hole",
        "push the wooden block into the hole, to the blue ball",
        "slide the block into the hole in the table",
        "sweep the block to the blue ball",
    ),
    "sweep-v3": (
        "sweep the block to the pale dot at the side of the table",
        "push the wooden block sideways to the pale dot",
        "slide the block far to the side, to the pale dot",
        "sweep the block over to the side of the table",
    ),
    "window-open-v3": (
        "open the window",
        "slide the window open",
        "push the window's handle to the right",
        "push the window open by its white handle",
    ),
    "window-close-v3": (
        "close the window",
        "slide the window shut",
        "push the window's handle to the left",
        "push the window shut by its white handle",
    ),
}
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
BENCHMARKS = {"MT10": MT10, "MT50": tuple(INSTRUCTIONS)}

CLOSE = "close"  # this project's camera; Meta-World's own are two to three times as far from the gripper
CAMERAS = (CLOSE, "topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
_CLOSE = FreeCamera(lookat=(0.0, 0.72, 0.12), distance=1.05, azimuth=135, elevation=-42)
_WIDE = FreeCamera(lookat=(0.1, 0.72, 0.12), distance=1.4, azimuth=135, elevation=-42)
_FACING = FreeCamera(lookat=(0.0, 0.72, 0.12), distance=1.1, azimuth=225, elevation=-40)
_EXCEPTIONS = {
    # The goal, or the gripper, is out of the close picture in some states.
    "door-close-v3": _WIDE,
    "door-open-v3": _WIDE,
    "peg-insert-side-v3": _WIDE,
    "stick-pull-v3": _WIDE,
    "stick-push-v3": _WIDE,
    "sweep-v3": _WIDE,
    # The arm stands before the object.
    "handle-press-side-v3": _FACING,
    "handle-pull-side-v3": _FACING,
    "peg-unplug-side-v3": _FACING,
}


def close_camera(task: str) -> FreeCamera:
    """The camera called "close", in a task: near enough for small pictures, and nothing that matters is outside."""
    return _EXCEPTIONS.get(task, _CLOSE)


def choose_tasks(task: str | Sequence[str]) -> tuple[str, ...]:
    """The tasks that the option `task` names.

    Args:
        task: a task, several, "MT10" or "MT50".
    Raises:
        UserError: a name that is none, none at all, or one twice.
    """
    if isinstance(task, str) and task in BENCHMARKS:
        return BENCHMARKS[task]
    names = [task] if isinstance(task, str) else task
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"trainer.env_config.task: expected a task, a list of tasks, MT10 or MT50, got {task!r}")
    for name in names:
        if name not in INSTRUCTIONS:
            known = [*INSTRUCTIONS, *(BENCHMARKS if isinstance(task, str) else ())]
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise UserError(f"trainer.env_config.task: Meta-World has no task {name!r}{hint}")
    if len(set(names)) < len(names):
        raise UserError(f"trainer.env_config.task: a task is named twice in {', '.join(names)}")
    return tuple(names)
