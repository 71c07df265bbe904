"""ManiSkill's tasks that need no download and were tried here: an instruction for each."""

from __future__ import annotations

INSTRUCTIONS = {
    "LiftPegUpright-v1": "stand the peg upright",
    "PegInsertionSide-v1": "insert the peg into the hole of the box",
    "PickCube-v1": "pick up the red cube and hold it at the goal",
    "PickCubeSO100-v1": "pick up the red cube and hold it at the goal",
    "PlaceSphere-v1": "put the blue ball into the bin",
    "PlugCharger-v1": "plug the charger into the wall",
    "PokeCube-v1": "poke the cube with the peg",
    "PullCube-v1": "pull the cube onto the target",
    "PullCubeTool-v1": "pull the cube closer with the tool",
    "PushCube-v1": "push the cube onto the target",
    "PushT-v1": "push the T onto its outline",
    "RollBall-v1": "roll the ball into the goal",
    "StackCube-v1": "put the red cube on the green cube",
    "StackPyramid-v1": "put the red cube beside the green cube and the blue cube on both",
}
