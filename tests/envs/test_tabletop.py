"""The tabletop task: specs, units, rewards, ends of episodes, reproducible initial states, the expert."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from envs import make_env
from envs.simulator import HELD_OUT_STATES
from envs.tabletop import (
    SPLITS,
    STEP,
    TASKS,
    TabletopEnv,
)
from envs.tabletop_instructions import PHRASINGS
from envs.tabletop_scene import CAMERA, COLOURS, PLATE_TOP, REACH, SHAPES, hashed_uniform
from envs.tabletop_states import GRIPPER_START, PLACE_RADIUS, REACH_RADIUS
from research.errors import UserError
from research.schema import check_observation, decode_text

STATES = ["gripper", "blocks", "plates", "block_colour", "block_shape", "plate_colour", "block_yaw", "language"]


def reset_to(env: TabletopEnv, ids) -> TensorDict:
    return env.reset(TensorDict({"initial_state": torch.as_tensor(ids)[:, None]}, [len(ids)]))


def run_expert(env: TabletopEnv, step: TensorDict):
    """Sum of rewards, success and length of one episode of the expert per environment."""
    n = env.batch_size[0]
    running, success = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    total, length = torch.zeros(n), torch.zeros(n)
    while running.any():
        step["action"] = env.expert_action()
        step = env.step(step)["next"]
        total += step["reward"][:, 0] * running
        length += running
        success |= running & step["success"][:, 0]
        running &= ~step["done"][:, 0]
    return total, success, length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_specs_and_schema_hold(task, split):
    env = TabletopEnv(3, task=task, split=split)
    check_env_specs(env)
    observation = env.reset()["observation"]
    check_observation(observation, "tabletop")
    assert set(observation.keys()) == {"rgb", "depth", "proprio", "language"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_expert_always_succeeds(task, split):
    env = TabletopEnv(256, task=task, split=split, modalities=["proprio"])
    step = reset_to(env, range(256))
    if task == "reach":  # nothing is solved before it starts
        assert ((env._state["gripper"] - env._state["blocks"][:, 0]).norm(dim=-1) > REACH_RADIUS).all()
    total, success, length = run_expert(env, step)
    assert success.all(), f"expert fails from states {(~success).nonzero()[:, 0].tolist()}"
    assert torch.equal(total, torch.ones(256))  # sparse: 1, once
    assert length.min() > 1 or task == "reach"


@pytest.mark.parametrize("task", TASKS)
def test_milestones_add_up_to_the_potential_at_the_end(task):
    env = TabletopEnv(32, task=task, reward="milestones", modalities=["proprio"])
    total, success, _ = run_expert(env, reset_to(env, range(32)))
    assert success.all()
    # Success, and whatever of the two milestones still holds in the last state.
    assert all(min(abs(value - end) for end in (1.0, 1.1, 1.2)) < 1e-5 for value in total.tolist())


def test_milestones_of_pick_place_grasp_hold_drop():
    env = TabletopEnv(1, reward="milestones", modalities=["proprio"])
    step = reset_to(env, [5])
    rewards = []
    while env._state["held_steps"][0] < 4:
        step["action"] = env.expert_action()
        step["action"][:, :2] *= 0.5 if env._state["held"][0] == 0 else 1.0
        step = env.step(step)["next"]
        rewards.append(step["reward"].item())
    assert rewards.count(pytest.approx(0.1)) == 2  # grasped, then held for three steps
    step["action"] = torch.tensor([[0.0, 0.0, -1.0]])
    dropped = env.step(step)["next"]
    assert not dropped["success"] and dropped["reward"].item() == pytest.approx(-0.2)  # and both are taken back


@pytest.mark.parametrize("split", SPLITS)
def test_a_state_depends_on_its_id_alone(split):
    small, large = TabletopEnv(4, seed=1, split=split), TabletopEnv(64, seed=2, split=split)
    a, b = reset_to(small, [7, 300, 12, 9_999]), reset_to(large, [*range(62), 300, 9_999])
    assert torch.equal(a["initial_state"][:, 0], torch.tensor([7, 300, 12, 9_999]))
    for key in STATES:
        assert torch.equal(small._state[key][[0, 2]], large._state[key][[7, 12]]), key
        assert torch.equal(small._state[key][[1, 3]], large._state[key][[62, 63]]), key
    assert torch.equal(a["observation", "rgb"][0], b["observation", "rgb"][7])


PICTURES = {
    "reach": (12484.55, 32332.89),
    "push": (14311.21, 32288.71),
    "pick_place": (13139.85, 32278.36),
}


@pytest.mark.parametrize("task", TASKS)
def test_pictures_stay_as_they_are(task):
    """Pinned sums of pixels times random weights: a sprite moved by one pixel changes them by hundreds.

    The wood's sines may round differently from machine to machine, by one grey level in a few pixels.
    """
    env = TabletopEnv(2, task=task)
    step = reset_to(env, [3, 4])
    for _ in range(6):
        step["action"] = env.expert_action()
        step = env.step(step)["next"]
    weight = hashed_uniform(torch.arange(2 * 64 * 64 * 3), 1)[:, 0].double() - 0.5
    rgb = step["observation", "rgb"].flatten().double() @ weight
    depth = 1000 * step["observation", "depth"].flatten().double() @ weight[: 2 * 64 * 64]
    assert [rgb.item(), depth.item()] == pytest.approx(PICTURES[task], abs=15)


def test_hash_is_the_same_everywhere():
    """Pinned numbers: initial states must not move between machines, devices or versions."""
    numbers = hashed_uniform(torch.tensor([0, 1, 2**32 - 1]), 3)
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert (numbers * 2**24).long().tolist() == PINNED
    spread = hashed_uniform(torch.arange(4096), 16)
    assert (spread.mean(0) - 0.5).abs().max() < 0.02 and (spread.T.corrcoef() - torch.eye(16)).abs().max() < 0.06


PINNED = [[11431808, 2295367, 14105991], [14917081, 3286158, 3960723], [2282901, 15219852, 3703416]]


def test_training_never_draws_held_out_states_and_seeds_differ():
    streams = []
    for seed in (1, 2):
        env = TabletopEnv(32, seed=seed, modalities=["proprio"], max_steps=2)
        ids = env.rollout(60, break_when_any_done=False)["initial_state"].flatten().unique()
        assert len(ids) > 500 and (ids >= HELD_OUT_STATES).all()
        streams.append(set(ids.tolist()))
    assert not streams[0] & streams[1]
    again = TabletopEnv(32, seed=2, modalities=["proprio"], max_steps=2)
    assert set(again.rollout(60, break_when_any_done=False)["initial_state"].flatten().tolist()) == streams[1]


def test_truncation_and_termination_are_apart():
    env = TabletopEnv(8, max_steps=25, modalities=["proprio"])
    step = reset_to(env, range(8))
    lazy = torch.tensor([True, False] * 4)
    running = torch.ones(8, dtype=torch.bool)
    for _ in range(25):
        step["action"] = torch.where(lazy[:, None], 0.0, env.expert_action())
        step = env.step(step)["next"]
        ended = running & step["done"][:, 0]
        assert torch.equal(step["done"], step["terminated"] | step["truncated"])
        assert not (ended & step["terminated"][:, 0] & step["truncated"][:, 0]).any()
        assert not (ended & lazy & step["terminated"][:, 0]).any()
        assert not (ended & ~lazy & step["truncated"][:, 0]).any()
        running &= ~ended
    assert not running.any()


def test_actions_are_clamped_and_in_metres():
    env = TabletopEnv(2, modalities=["proprio"])
    step = reset_to(env, [0, 1])
    start = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    env._state["gripper"] = start
    step["action"] = torch.tensor([[1.0, -0.5, -1.0], [7.0, -99.0, -1.0]])
    proprio = env.step(step)["next", "observation", "proprio"]
    torch.testing.assert_close(proprio[:, :2], torch.tensor([[STEP, -STEP / 2], [STEP, -STEP]]))
    assert torch.equal(proprio[:, 2], torch.tensor([0.08, 0.08]))


def test_partial_reset_leaves_the_others_alone():
    env = TabletopEnv(4)
    step = env.reset()
    step["action"] = env.expert_action()
    step = env.step(step)["next"]
    state, images = {key: value.clone() for key, value in env._state.items()}, step["observation", "rgb"].clone()
    mask = torch.tensor([[True], [False], [False], [True]])
    after = env.reset(step.copy().set("_reset", mask))
    for key in STATES:
        assert torch.equal(env._state[key][1:3], state[key][1:3])
    assert torch.equal(after["observation", "rgb"][1:3], images[1:3])
    assert not torch.equal(after["observation", "rgb"][0], images[0])
    assert env._state["steps"].tolist() == [0, 1, 1, 0]
    env.reset(step.copy().set("_reset", torch.zeros_like(mask)))
    assert env._state["steps"].tolist() == [0, 1, 1, 0]
    assert torch.equal(step["observation", "rgb"], images)  # what was handed out is never painted over


def test_what_was_handed_out_never_changes():
    """Collectors keep references: a rollout must not show the instruction of the episode that came after."""
    env = TabletopEnv(8, image_size=16, task="reach", max_steps=3)
    step, kept = env.reset(), []
    env._state["steps"] = torch.arange(8) % 3  # so that some are reset at every step
    for _ in range(8):
        both, step = env.step_and_maybe_reset(step.set("action", torch.zeros(8, 3)))
        kept.append((both, both.clone()))
    for both, copy in kept:
        for key in copy.keys(include_nested=True, leaves_only=True):
            assert torch.equal(both[key], copy[key]), key


def test_scene_is_what_painting_from_scratch_gives():
    """Scenes are repainted only where something moved; after a whole episode they must equal a fresh painting."""
    for task in ("push", "pick_place"):
        env = TabletopEnv(16, task=task)
        step = reset_to(env, range(16))
        for _ in range(12):
            step["action"] = env.expert_action() + 0.3 * torch.randn(16, 3)
            step = env.step(step)["next"]
        fresh = env._painter.scenes(env._state)
        assert torch.equal(env._state["scene_rgb"], fresh["scene_rgb"])
        assert torch.equal(env._state["scene_depth"], fresh["scene_depth"])


def test_depth_shows_table_plate_and_held_block():
    env = TabletopEnv(4)
    step = reset_to(env, range(4))
    depth = step["observation", "depth"]
    assert depth.max().item() == pytest.approx(CAMERA)
    assert (depth - (CAMERA - PLATE_TOP)).abs().min() < 1e-6
    lowest = depth.amin(dim=(1, 2))
    while (env._state["held"] < 0).any():
        step["action"] = env.expert_action()
        step = env.step(step)["next"]
        if step["done"].any():
            break
    assert (lowest < CAMERA - 0.1).all()  # the gripper is nearest


def test_instruction_names_the_target():
    env = TabletopEnv(16, num_blocks=3)
    texts = decode_text(reset_to(env, range(16))["observation", "language"])
    colours, shapes = list(COLOURS), list(SHAPES)
    for i, text in enumerate(texts):
        block = f"{colours[env._state['block_colour'][i, 0]]} {shapes[env._state['block_shape'][i, 0]]}"
        plate = f"{colours[env._state['plate_colour'][i, 0]]} plate"
        assert block in text and plate in text, text
        assert len(set(env._state["block_colour"][i].tolist())) == 3  # the colour alone identifies a block
    assert len({text.split()[0] for text in texts}) > 2  # several phrasings


def test_objects_keep_apart():
    env = TabletopEnv(2, modalities=["proprio"])
    state = env._states.make(torch.arange(2000))
    centres = torch.cat([state["plates"], state["blocks"]], dim=1)
    gap = (centres[:, :, None] - centres[:, None]).norm(dim=-1) + 10 * torch.eye(5)
    assert (gap.amin(dim=(1, 2)) > 0.055).float().mean() > 0.995
    assert ((state["blocks"][:, 0] - state["plates"][:, 0]).norm(dim=-1) > PLACE_RADIUS).all()


def differing(a: TabletopEnv, b: TabletopEnv) -> set[str]:
    """Names of what differs between the states of two environments, but for their colour pictures."""
    return {key for key, value in a._state.items() if not torch.equal(value, b._state[key])} - {
        "table_rgb",
        "scene_rgb",
    }


def pair(split: str, **options) -> tuple[TabletopEnv, TabletopEnv, TensorDict, TensorDict]:
    """The same 64 states in `train` and in another split: two environments, and what they show."""
    envs = TabletopEnv(64, **options), TabletopEnv(64, split=split, **options)
    return *envs, *(reset_to(env, range(64))["observation"] for env in envs)


def test_vision_changes_the_picture_alone():
    train, vision, seen, unseen = pair("vision")
    assert not differing(train, vision)
    for key in ("depth", "proprio", "language"):
        assert torch.equal(seen[key], unseen[key])
    off = (seen["rgb"].float() - unseen["rgb"].float()).abs().mean(dim=(1, 2, 3))
    assert off.min() > 9 and off.median() > 15
    assert unseen["rgb"].float().mean(dim=(1, 2, 3)).min() > 60  # the dark gripper can be told from every table
    still = TensorDict({"action": torch.tensor([[0.0, 0.0, -1.0]]).expand(64, 3)}, [64])
    again = vision.step(still)["next", "observation", "rgb"]
    assert (again != unseen["rgb"]).float().mean() > 0.8  # noise is new at every step
    film = vision.render_frames(64)
    assert torch.equal(film, again)


def test_semantics_changes_words_and_distractors_alone():
    train, semantics, *_ = pair("semantics")
    assert differing(train, semantics) == {
        "blocks", "plates", "block_colour", "block_shape", "plate_colour", "block_yaw", "language",
        "table_depth", "scene_depth",
    }  # fmt: skip
    a, b = train._state, semantics._state
    assert b["blocks"].shape[1] == 5 and b["plates"].shape[1] == 3
    for key, count in (("blocks", 3), ("plates", 2), ("plate_colour", 2), ("block_yaw", 3)):
        assert torch.equal(a[key], b[key][:, :count]), key
    colour, shape = b["block_colour"], b["block_shape"]
    assert torch.equal(a["block_colour"][:, 0], colour[:, 0]) and torch.equal(a["block_shape"][:, 0], shape[:, 0])
    same_colour, same_shape = colour[:, 1:] == colour[:, :1], shape[:, 1:] == shape[:, :1]
    assert same_shape.any(1).all() and 0.3 < same_colour.any(1).float().mean() < 0.7
    assert not (same_colour & same_shape).any()
    assert all(len(set(row)) == 3 for row in b["plate_colour"].tolist())
    centres = torch.cat([b["plates"], b["blocks"]], dim=1)
    gap = (centres[:, :, None] - centres[:, None]).norm(dim=-1) + 10 * torch.eye(8)
    assert (gap.amin(dim=(1, 2)) > 0.055).float().mean() > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_semantics_says_it_in_words_that_training_does_not_use(task):
    _, semantics, seen, unseen = pair("semantics", task=task, modalities=["language"])
    state, colours = semantics._state, list(COLOURS)
    known = set()
    for i, (old, new) in enumerate(zip(decode_text(seen["language"]), decode_text(unseen["language"]), strict=True)):
        block = f"{colours[state['block_colour'][i, 0]]} {list(SHAPES)[state['block_shape'][i, 0]]}"
        plate = f"{colours[state['plate_colour'][i, 0]]} plate"
        assert block in old and block in new and (task == "reach" or (plate in old and plate in new))
        known.add(new.replace(block, "{block}").replace(plate, "{plate}"))
    assert len(known) == 4 and not known & set(PHRASINGS[task])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_plates", [1, 2])
def test_execution_changes_poses_alone(task, num_plates):
    train, execution, seen, unseen = pair("execution", task=task, num_plates=num_plates, modalities=["language"])
    assert differing(train, execution) - {"shut"} == {"gripper", "blocks", "gap"}
    assert ("shut" in differing(train, execution)) == (task == "pick_place")
    a, b = train._state, execution._state
    assert torch.equal(a["blocks"][:, 1:], b["blocks"][:, 1:]) and torch.equal(seen["language"], unseen["language"])
    far = b["gripper"].abs().amax(dim=1) / REACH
    assert (far > GRIPPER_START).float().mean() > 0.95 and far.max() <= 1  # `reach` starts some nearer to its block
    gap = (b["blocks"][:, 0] - b["plates"][:, -1]).norm(dim=-1)
    assert (gap < 0.081).float().mean() > 0.9  # training keeps 9 cm
    assert ((b["blocks"][:, 0] - b["plates"][:, 0]).norm(dim=-1) > PLACE_RADIUS).all()


def test_execution_moves_the_block_once_unless_it_is_held():
    _, env, _, _ = pair("execution")
    env._state["held"][:32], env._state["shut"][:32] = 0, True
    env._state["shut"][32:] = False
    places = [env._state["blocks"][:, 0]]
    moves_at = env._state["moves_at"]
    assert moves_at.unique().tolist() == [3, 4, 5, 6]
    still = torch.tensor([0.0, 0.0, 1.0]).repeat(64, 1)
    still[32:, 2] = -1
    for _ in range(9):
        env.step(TensorDict({"action": still}, [64]))
        places.append(env._state["blocks"][:, 0])
    jumps = torch.stack([(b - a).norm(dim=-1) > 0.01 for a, b in pairwise(places)])
    assert not jumps[1:, :32].any()
    assert torch.equal(jumps[:, 32:].sum(0), torch.ones(32, dtype=torch.int64))
    assert torch.equal(jumps[:, 32:].int().argmax(0), moves_at[32:])
    assert torch.equal(env._state["scene_rgb"][32:], env._painter.scenes(env._state)["scene_rgb"][32:])


@pytest.mark.parametrize("split", ["train", "execution"])
def test_state_dict_continues_exactly(split):
    env = TabletopEnv(8, seed=3, split=split)
    env.rollout(30, break_when_any_done=False)
    saved = env.state_dict()
    torch.manual_seed(1)
    actions = torch.rand(50, 8, 3) * 2 - 1

    def play(env):
        step, seen = TensorDict({}, [8]), []
        for action in actions:
            following, step = env.step_and_maybe_reset(step.set("action", action))
            seen.append(following["next"].clone())
        return torch.stack(seen)

    first = play(env)
    other = TabletopEnv(8, seed=99, split=split)
    other.reset()
    other.load_state_dict(saved)
    second = play(other)
    assert (first == second).all()


def test_any_size_and_modality():
    env = TabletopEnv(2, image_size=96, modalities=["rgb"])
    observation = env.reset()["observation"]
    assert list(observation.keys()) == ["rgb"] and observation["rgb"].shape == (2, 96, 96, 3)
    assert env.render_frames(160).shape == (2, 160, 160, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "fly"}, "fly"),
        ({"reward": "dense"}, "dense"),
        ({"modalities": ["rgb", "touch"]}, "touch"),
        ({"modalities": []}, "modalities"),
        ({"num_blocks": 7}, "num_blocks"),
        ({"image_size": 0}, "image_size"),
        ({"max_steps": -1}, "max_steps"),
        ({"num_plates": True}, "env_config.num_plates: expected an integer from 1 to 4, got True"),
        ({"modalities": None}, "env_config.modalities: expected some of rgb, .* got None"),
        ({"modalities": 5}, "env_config.modalities: expected some of rgb, .* got 5"),
        ({"modalities": [["rgb"]]}, r"env_config.modalities: there is no \['rgb'\]"),
        ({"task": {"reach": 1}}, "env_config.task: expected one of reach, .* got {'reach': 1}"),
        ({"instruction_length": "x"}, "env_config.instruction_length: expected an integer .* got 'x'"),
        ({"instruction_length": None}, "env_config.instruction_length: expected an integer .* got None"),
        ({"instruction_length": 10**13}, "env_config.instruction_length: expected an integer from 1 to 65536, got 10"),
        ({"instruction_length": 8}, "env_config.instruction_length: the instruction .* more than the 8 reserved"),
        ({"split": "dark"}, "dark"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        make_env("tabletop", 2, options)
    assert "\n" not in str(caught.value)


def test_unknown_environment():
    with pytest.raises(UserError, match="unknown environment 'tabeltop'"):
        make_env("tabeltop", 2, {})
