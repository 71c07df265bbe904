"""Tabletop: a language-conditioned manipulation task, batched in torch, seen by a camera above the table.

A parallel gripper moves over a table with coloured blocks and coloured plates and is told, in words, what to do:

| task         | instruction (one of several phrasings)  | success, which ends the episode                           |
|--------------|-----------------------------------------|-----------------------------------------------------------|
| `reach`      | "move to the red cube"                  | gripper within 2 cm of the block                          |
| `push`       | "push the red cube to the blue plate"   | block centre within 4 cm of the plate's                   |
| `pick_place` | "put the red cube on the blue plate"    | block let go within 4 cm of the plate's centre            |

Action `[N, 3]` in [-1, 1] (clamped here): `dx, dy` as fractions of 4 cm a step, and the gripper, closed when > 0. The
gripper takes a block when it closes within 2.5 cm of it; in `push` it stays closed and low, and shoves what it touches.

Observation: `rgb` uint8 `[N, S, S, 3]`; `depth` float32 `[N, S, S]`, metres from the camera, 0.8 m above the table;
`proprio` float32 `[N, 3]`: gripper x and y in metres from the table's centre, finger opening in metres (0.08 open, 0.05
on a block, 0 closed on nothing); `language` int64 `[N, L]`, the instruction's bytes.

Every initial state has an id, and state `i` of a configuration is the same on every machine: all that is random is a
hash of the id, computed in integers. Ids below `HELD_OUT_STATES` are kept for evaluation and never drawn in training.

Generalisation splits, after RL4VLA (Liu et al., 2025). Each changes one thing about the state that an id has in
`train`, and nothing else, so that success can be compared state by state:

| split       | what training has never shown                                                                         |
|-------------|-------------------------------------------------------------------------------------------------------|
| `vision`    | striped and chequered table tops, light that falls from one side, both from hardly to plainly         |
|             | different; pixel noise, new at every step                                                             |
| `semantics` | other phrasings, two with known words and two with new ones, of which one names the plate first; two  |
|             | more blocks (up to 6) and one more plate (up to 4); distractors that share the named block's shape    |
|             | and, in half of the states, its colour                                                                |
| `execution` | the named block on another plate (or against the only one), the gripper at the rim and, in            |
|             | `pick_place`, perhaps shut; the block is moved after 3 to 6 steps, unless the gripper has it          |

Training shows every colour with every shape, but blocks of one table never share a colour, so that the shape word can
be ignored; where `semantics` has two blocks of the named colour it cannot, and it is in this sense that their colours
and shapes are paired anew. A colour that training never names would ask what a model that reads bytes cannot know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from envs.chunks import BatchedDecision, check_chunk
from envs.gym_options import check_options
from envs.simulator import HELD_OUT_STATES
from envs.simulator_options import check_one_of, check_some_of
from envs.tabletop_instructions import instruction_table
from envs.tabletop_painter import Painter
from envs.tabletop_scene import (
    BLOCK_RADIUS,
    CAMERA,
    COLOURS,
    HOLDING,
    OPEN,
    PUSHER_RADIUS,
    REACH,
    SHUT,
    TABLE,
    State,
    lowbias32,
)
from envs.tabletop_states import MAX_PLATES, PLACE_RADIUS, REACH_RADIUS, TabletopStates
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import (
    ACTION,
    DEPTH,
    ENV_STEPS,
    INITIAL_STATE,
    LANGUAGE,
    MODALITIES,
    OBSERVATION,
    PROPRIO,
    RGB,
    SUCCESS,
    SUCCESS_NOW,
)

TASKS = ("reach", "push", "pick_place")
REWARDS = ("sparse", "milestones")
SPLITS = ("train", "vision", "semantics", "execution")
MAX_STEPS = {"reach": 25, "push": 80, "pick_place": 40}

# Metres, as in envs/tabletop_scene.py.
STEP = 0.04
GRASP_RADIUS = 0.025
HOLD_STEPS = 3  # a block held this long has been held, not touched in passing


class TabletopEnv(EnvBase):
    """`num_envs` tables stepped together; see the module's docstring for the task, units and observations.

    Args:
        num_envs: N.
        task: "reach", "push" or "pick_place".
        reward: "sparse" (1 at success) or "milestones" (differences of 0.1 grasp + 0.1 hold + 1.0 success, as RL4VLA;
            "grasp" is contact for `push` and within 10 cm for `reach`, "hold" is half-way and within 5 cm).
        image_size: S, pixels per side of `rgb` and `depth`.
        modalities: which observations to produce.
        num_blocks: blocks per table, of different colours; the first is the one that is named.
        num_plates: plates per table, of different colours; the first is the one that is named.
        max_steps: truncation limit; by default 25 / 80 / 40 for reach / push / pick_place.
        instruction_length: L, bytes reserved for the instruction.
        split: "train", or what to generalise to: "vision", "semantics" or "execution".
        chunk: H, actions that are executed per decision, without a look in between; see `envs.simulator.Environment`.
        seed: which stream of initial states training episodes are drawn from.
        device: where state, rendering and observations live.

    Reset with `TensorDict({"initial_state": ids}, [N])`, ids int64 `[N, 1]`, starts from these states.
    """

    batch_locked = True
    distinct_states = True
    action_choices = None
    action_map = ActionMap.clipping(3)
    resumes_exactly = True
    has_expert = True
    held_out = HELD_OUT_STATES

    def __init__(
        self,
        num_envs: int = 64,
        task: str = "pick_place",
        reward: str = "sparse",
        image_size: int = 64,
        modalities: Sequence[str] = MODALITIES,
        num_blocks: int = 3,
        num_plates: int = 2,
        max_steps: int | None = None,
        instruction_length: int = 64,
        split: str = "train",
        chunk: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        for name, value, known in (("task", task, TASKS), ("reward", reward, REWARDS), ("split", split, SPLITS)):
            check_one_of(name, value, known)
        check_some_of("modalities", modalities, MODALITIES)
        check_options("tabletop", {"instruction_length": instruction_length}, {})
        max_steps = MAX_STEPS[task] if max_steps is None else max_steps
        sizes = {"num_envs": num_envs, "max_steps": max_steps}
        for name, value, low, high in (
            *((name, value, 1, None) for name, value in sizes.items()),
            ("image_size", image_size, 16, 1024),
            ("num_blocks", num_blocks, 1, len(COLOURS)),
            ("num_plates", num_plates, 1, MAX_PLATES),
        ):
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or value < low
                or (high is not None and value > high)
            ):
                bound = f"from {low} to {high}" if high else f"of at least {low}"
                raise UserError(f"trainer.env_config.{name}: expected an integer {bound}, got {value!r}")
        check_chunk(chunk)
        super().__init__(device=device, batch_size=[num_envs])
        self.chunk = chunk
        self._filmed, self._film_size = 0, 256  # of the first rows, what they look like between control steps is kept
        self._between: list[list[Tensor]] = []
        self.task, self.reward_kind, self.image_size, self.max_steps = task, reward, image_size, max_steps
        self.modalities, self.split = tuple(modalities), split
        self.num_blocks, self.num_plates = num_blocks, num_plates
        self._painter = Painter(image_size, RGB in modalities, DEPTH in modalities, split == "vision", self.device)
        table = instruction_table(task, split == "semantics", instruction_length).to(self.device)
        self._states = TabletopStates(task, num_blocks, num_plates, split, table, self._painter)
        self._make_specs(num_envs, image_size, instruction_length)
        self._rows = torch.arange(num_envs, device=self.device)
        self._block_numbers = torch.arange(num_blocks + self._states.extra_blocks, device=self.device)
        self._state: State | None = None
        self._film_painter: Painter | None = None
        self._share = (0, 1)
        self._set_seed(seed)

    def _make_specs(self, n: int, size: int, length: int) -> None:
        device = self.device
        kinds = {
            RGB: lambda: Bounded(0, 255, (n, size, size, 3), dtype=torch.uint8, device=device),
            DEPTH: lambda: Bounded(0.0, CAMERA, (n, size, size), dtype=torch.float32, device=device),
            PROPRIO: lambda: Unbounded((n, 3), dtype=torch.float32, device=device),
            LANGUAGE: lambda: Bounded(0, 255, (n, length), dtype=torch.int64, device=device),
        }
        flag = lambda: Categorical(2, (n, 1), dtype=torch.bool, device=device)  # noqa: E731
        observation = Composite({k: kinds[k]() for k in self.modalities}, shape=(n,), device=device)
        root = {
            OBSERVATION: observation,
            SUCCESS: flag(),
            INITIAL_STATE: Bounded(0, 2**32 - 1, (n, 1), dtype=torch.int64, device=device),
        }
        action_shape = (n, 3)
        if self.chunk > 1:
            root |= {SUCCESS_NOW: flag(), ENV_STEPS: Bounded(0, self.chunk, (n, 1), dtype=torch.int64, device=device)}
            action_shape = (n, self.chunk, 3)
        self.observation_spec = Composite(root, shape=(n,), device=device)
        self.action_spec = Bounded(-1.0, 1.0, action_shape, dtype=torch.float32, device=device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,), device=device)

    # ---------------------------------------------------------------- initial states

    def _set_seed(self, seed: int | None) -> None:
        """Choose the stream of training states: it starts at a hash of the seed and wraps past the held-out ids."""
        self._next_id = int(lowbias32(torch.tensor((int(seed or 0) + 1) & 0xFFFFFFFF)))
        self._upcoming: State | None = None

    def take_share(self, share: int, of: int) -> None:
        """Draw every `of`-th of the stream of training states, from the `share`-th on; before the first reset."""
        self._share = (share, of)

    def draw_states(self, count: int) -> Tensor:
        """The ids of the next `count` states of training, int64 `[count]`, which are then used up."""
        return self._draw_training_states(count)["id"]

    def _draw_training_states(self, count: int) -> State:
        """The next `count` states of the stream, made a few hundred at a time: a state costs little in bulk."""
        left = 0 if self._upcoming is None else len(self._upcoming["id"])
        if left < count:
            fresh = max(256, 2 * self.batch_size[0], count)
            share, of = self._share
            ids = self._next_id + share + of * torch.arange(fresh, device=self.device)
            ids = self.held_out + ids % (2**32 - self.held_out)
            self._next_id += of * fresh
            made = self._states.make(ids)
            if left:
                made = {key: torch.cat([self._upcoming[key], value]) for key, value in made.items()}
            self._upcoming = made
        drawn = {key: value[:count] for key, value in self._upcoming.items()}
        self._upcoming = {key: value[count:] for key, value in self._upcoming.items()}
        return drawn

    # ---------------------------------------------------------------- reset and step

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDictBase:
        n = self.batch_size[0]
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = self._rows if mask is None or self._state is None else mask.view(n).nonzero()[:, 0]
        ids = None if tensordict is None else tensordict.get(INITIAL_STATE, None)
        fresh = self._draw_training_states(len(rows)) if ids is None else self._states.make(ids.view(n)[rows])
        images = self._painter.frames(fresh)
        if len(rows) == n:
            self._state = fresh
        else:
            for key, value in fresh.items():
                self._state[key].index_copy_(0, rows, value)
            images = {key: self._images[key].index_copy(0, rows, image) for key, image in images.items()}
        self._images = images
        none = torch.zeros(n, 1, dtype=torch.bool, device=self.device)
        outcome = {SUCCESS: none, "done": none, "terminated": none.clone(), "truncated": none.clone()}
        if self.chunk > 1:
            outcome |= {SUCCESS_NOW: none.clone(), ENV_STEPS: none.long()}
        return self._report(images, outcome)

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reset the environments that are done. As TorchRL's own, but faster: `_reset` reports all environments, so no
        choice between old and new is made row by row, over whole pictures and over all that the policy left behind.
        """
        if self.any_done(tensordict):
            tensordict.update(self._reset(tensordict.select("_reset")))
            del tensordict["_reset"]
        return tensordict

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(ACTION).clamp(-1.0, 1.0)
        outcome = self._control_step(action) if self.chunk == 1 else self._execute(action)
        self._images = self._painter.frames(self._state)
        return self._report(self._images, {"done": outcome["terminated"] | outcome["truncated"], **outcome})

    def _execute(self, actions: Tensor) -> dict[str, Tensor]:
        """Take a decision `[N, H, 3]`: step after step; a row whose episode has ended stands still."""
        decision = BatchedDecision(self.batch_size[0], self.device)
        self._between = [[] for _ in range(self._filmed)]
        for taken, action in enumerate(actions.unbind(1), 1):
            decision.add(self._control_step(action, decision.live[:, 0]))
            if taken < self.chunk and self._filmed:
                self._film_live_rows(decision.live)
        return decision.result()

    def _control_step(self, action: Tensor, live: Tensor | None = None) -> dict[str, Tensor]:
        """One control step `[N, 3]` of all rows, or of those that are live: what it earned and ended, `[N, 1]` each."""
        state = self._state
        before = dict(state) if live is not None else {}
        success = self._move(state, action, live)
        state["steps"] = state["steps"] + 1
        reward = success.float()
        if self.reward_kind == "milestones":
            potential = self._milestones(state, reward)
            reward = potential - state["potential"]
            state["potential"] = potential
        truncated = (state["steps"] >= self.max_steps) & ~success
        for key, value in before.items():  # what a step replaces; scenes are painted in place, of live rows alone
            if value is not state[key]:
                state[key] = torch.where(live.view(-1, *[1] * (value.dim() - 1)), state[key], value)
        outcome = {"reward": reward, "terminated": success, "truncated": truncated, SUCCESS: success.clone()}
        return {key: value[:, None] for key, value in outcome.items()}

    def _move(self, state: State, action: Tensor, live: Tensor | None) -> Tensor:
        """Advance gripper and blocks by one control step; returns success, bool `[N]`. Paints live rows' scenes."""
        gripper = (state["gripper"] + action[:, :2] * STEP).clamp(-REACH, REACH)
        held, resting = state["held"], state["blocks"]
        blocks, disturbed = resting, None
        if self.task == "push":
            blocks = self._shove(state["gripper"], gripper, resting)
            disturbed = (blocks != resting).any(-1).any(-1)
        elif self.task == "pick_place":
            # Move first, then open or close: a block that is let go has come along with the gripper's last move.
            carried = self._block_numbers == held[:, None]  # [N, K]
            blocks = torch.where(carried[..., None], (gripper + state["offset"])[:, None], resting)
            shut = action[:, 2] > 0
            nearest, which = (blocks - gripper[:, None]).norm(dim=-1).min(dim=1)
            grasps = shut & ~state["shut"] & (nearest <= GRASP_RADIUS)
            held = torch.where(shut, torch.where(grasps, which, held), -1)
            offset = torch.where(grasps[:, None], blocks[self._rows, which] - gripper, state["offset"])
            disturbed = held != state["held"]
            held_steps = torch.where(held == 0, state["held_steps"] + 1, 0)
            state.update(shut=shut, held=held, offset=offset, held_steps=held_steps)
        if self.split == "execution":
            moved = (state["steps"] == state["moves_at"]) & (held != 0)
            target = torch.where(moved[:, None], state["moved_to"], blocks[:, 0])
            blocks = torch.cat([target[:, None], blocks[:, 1:]], dim=1)
            disturbed = moved if disturbed is None else disturbed | moved
        state.update(gripper=gripper, blocks=blocks)
        if disturbed is not None:
            self._repaint_scenes(state, disturbed if live is None else disturbed & live)
        target, plate = blocks[:, 0], state["plates"][:, 0]
        if self.task == "reach":
            return (gripper - target).norm(dim=-1) <= REACH_RADIUS
        on_plate = (target - plate).norm(dim=-1) <= PLACE_RADIUS
        return on_plate if self.task == "push" else on_plate & (held != 0)

    def _repaint_scenes(self, state: State, disturbed: Tensor) -> None:
        """Scenes are painted again only where a block was moved, lifted or put down."""
        rows = disturbed.nonzero()[:, 0]
        if len(rows):
            for key, scene in self._painter.scenes(state, rows).items():
                state[key].index_copy_(0, rows, scene)

    @staticmethod
    def _shove(start: Tensor, end: Tensor, blocks: Tensor) -> Tensor:
        """Quasi-static pushing: blocks give way along the contact normal, in sub-steps so that none is jumped over."""
        reach = PUSHER_RADIUS + BLOCK_RADIUS
        for fraction in (0.25, 0.5, 0.75, 1.0):
            pusher = torch.lerp(start, end, fraction)[:, None]
            away = blocks - pusher
            distance = away.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            blocks = torch.where(distance < reach, pusher + away / distance * reach, blocks)
        return blocks.clamp(-REACH, REACH)

    def _milestones(self, state: State, success: Tensor) -> Tensor:
        """0.1 grasp + 0.1 hold + 1.0 success (float32 `[N]`, as is the result); rewards are its differences."""
        gap = (state["gripper"] - state["blocks"][:, 0]).norm(dim=-1)
        if self.task == "reach":
            first, second = gap < 0.10, gap < 0.05
        elif self.task == "push":
            left = (state["blocks"][:, 0] - state["plates"][:, 0]).norm(dim=-1)
            first, second = gap < PUSHER_RADIUS + BLOCK_RADIUS + 0.005, left < 0.5 * state["gap"]
        else:
            first, second = state["held"] == 0, state["held_steps"] >= HOLD_STEPS
        return 0.1 * first.float() + 0.1 * second.float() + success

    def _report(self, images: dict[str, Tensor], outcome: dict[str, Tensor]) -> TensorDictBase:
        """What TorchRL is handed: the observation, which state the episode began from, and `outcome`."""
        state, observation = self._state, dict(images)
        if PROPRIO in self.modalities:
            opening = torch.where(state["shut"], torch.where(state["held"] >= 0, HOLDING, SHUT), OPEN)
            observation[PROPRIO] = torch.cat([state["gripper"], opening[:, None]], dim=1)
        if LANGUAGE in self.modalities:
            observation[LANGUAGE] = state["language"].clone()  # partial resets write into the state
        observation = {key: observation[key] for key in self.modalities}
        return TensorDict(
            {OBSERVATION: observation, INITIAL_STATE: state["id"][:, None].clone(), **outcome},
            self.batch_size,
            device=self.device,
        )

    # ---------------------------------------------------------------- expert, video, resume

    def expert_action(self) -> Tensor:
        """What the scripted expert, who sees the state and not the pixels, would do now: float32 `[N, 3]`."""
        state = self._state
        gripper, target, plate = state["gripper"], state["blocks"][:, 0], state["plates"][:, 0]
        if self.task == "push":
            goal = self._push_waypoint(gripper, target, plate)
            grip = torch.ones_like(gripper[:, :1])
        elif self.task == "reach":
            goal, grip = target, -torch.ones_like(gripper[:, :1])
        else:
            holds, empty = state["held"] == 0, state["held"] < 0
            goal = torch.where(holds[:, None], plate - state["offset"], target)
            arrives = (goal - gripper).abs().amax(dim=-1) <= STEP
            # Close on arrival at the block, let go on arrival at the plate; open first when shut on nothing.
            grip = torch.where(holds, ~arrives, arrives & empty & ~state["shut"])[:, None].float() * 2 - 1
        return torch.cat([((goal - gripper) / STEP).clamp(-1, 1), grip], dim=1)

    def named_places(self) -> Tensor:
        """Where the block and the plate are that the instruction names: `[N, 2, 2]`, x and y, the edges at -1 and 1."""
        return torch.stack([self._state["blocks"][:, 0], self._state["plates"][:, 0]], dim=1) / TABLE

    @staticmethod
    def _push_waypoint(gripper: Tensor, target: Tensor, plate: Tensor) -> Tensor:
        """Where to go next: round the block, at a distance, until behind it as seen from the plate; then through it."""
        contact = PUSHER_RADIUS + BLOCK_RADIUS
        along = torch.nn.functional.normalize(plate - target, dim=-1)
        rel = gripper - target
        angle = torch.atan2(rel[:, 1], rel[:, 0])
        turn = torch.atan2(-along[:, 1], -along[:, 0]) - angle
        turn = torch.remainder(turn + math.pi, 2 * math.pi) - math.pi  # the shorter way round
        ahead = angle + turn.clamp(-0.5, 0.5)
        around = target + 1.25 * contact * torch.stack([torch.cos(ahead), torch.sin(ahead)], dim=-1)
        through = target - along * (contact - 0.5 * STEP)
        return torch.where((turn.abs() < 0.15)[:, None], through, around)

    def film_between(self, rows: int, size: int = 256) -> None:
        """Keep what the first rows look like between the control steps of a decision; see `frames_between`."""
        self._filmed, self._film_size, self._between = rows, size, [[] for _ in range(rows)]

    def frames_between(self) -> list[Tensor]:
        """Of the first rows' last decision: uint8 `[K, size, size, 3]`, after each control step but the last."""
        none = torch.empty((0, self._film_size, self._film_size, 3), dtype=torch.uint8, device=self.device)
        return [torch.stack(shot) if shot else none for shot in self._between]

    def _film_live_rows(self, live: Tensor) -> None:
        frames = self.render_frames(self._film_size)
        for row, shot in enumerate(self._between):
            if live[row]:
                shot.append(frames[row])

    def render_frames(self, size: int = 256) -> Tensor:
        """The tables as a person would want to see them: uint8 `[N, size, size, 3]`."""
        if self._film_painter is None or self._film_painter.size != size:
            self._film_painter = Painter(size, True, False, self.split == "vision", self.device)
        painter, state = self._film_painter, dict(self._state)
        state.update(painter.tables(state))
        state.update(painter.scenes(state))
        return painter.frames(state)[RGB]

    def state_dict(self, *args, **kwargs) -> dict:
        """All that decides the future of these environments; see `load_state_dict`."""
        upcoming = None if self._upcoming is None else self._upcoming["id"].clone()
        return {
            "state": None if self._state is None else {key: value.clone() for key, value in self._state.items()},
            "next_id": self._next_id,
            "upcoming": upcoming,
        }

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._next_id = state_dict["next_id"]
        upcoming = state_dict["upcoming"]
        self._upcoming = None if upcoming is None else self._states.make(upcoming.to(self.device))
        if state_dict["state"] is not None:
            self._state = {key: value.to(self.device, copy=True) for key, value in state_dict["state"].items()}
            self._images = self._painter.frames(self._state)
