"""What every flow VLA does with its velocity: draw a chunk, score a stored step of it, imitate an expert's.

The state of the denoising is `[B, H, D]`: H control steps that are planned, D numbers that the model has room for; of
these, `executed` steps and `action_dim` numbers go to the environment. The mathematics are in `agents/flow.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn

from agents.flow import FlowNoise, FlowSDE, Velocity, follow
from agents.normalisation import Kind, Normalisation
from agents.ratio_level import LEVELS, at_level
from agents.vla import DecidingVLA, check_modalities
from research.action_map import ActionMap
from research.errors import UserError
from research.schema import ACTION, LANGUAGE, LOG_PROB, PROPRIO, RGB, VALUE, base_modality

READS = (RGB, PROPRIO, LANGUAGE)
STEPS = 4  # denoising steps where nothing says how many
PAIR, INDEX, STATES = ("decision", "pair"), ("decision", "index"), ("decision", "states")
Noise = float | Sequence[float]
PREFIX_HIDDEN = "prefix_hidden"


class FlowVLA(DecidingVLA):
    """A VLA with a velocity.

    A subclass adds its parts, stages of which one writes `prefix_hidden`, and `velocity`.

    Args:
        modalities: which observations to read.
        horizon, room, state_room: H and D of the model, and of how many numbers its state is.
        width: D of `prefix_hidden`, `[B, D]`.
        action_dim, proprio_dim: numbers of the environment's actions and states.
        executed: control steps of the H that are executed.
        steps: K denoising steps.
        noise: a of `FlowSDE`, or the two bounds of the deviations of `FlowNoise`, which `noise_head` learns.
        statistics, dataset, normalisation: see `agents.normalisation.Normalisation.from_file`.

    Attributes:
        images: keys of the pictures it reads.
        reads_language, reads_proprio: what it reads besides.
        actions, states: between the data's units and the model's.
    Raises:
        UserError: it reads no camera, or something has no room in the model.
    """

    heads: tuple[str, ...] = ("action_expert", "value_head")
    ratio_levels = LEVELS

    def __init__(
        self,
        modalities: Sequence[str],
        horizon: int,
        room: int,
        state_room: int,
        width: int,
        action_dim: int,
        proprio_dim: int,
        executed: int,
        steps: int,
        noise: Noise,
        statistics: str | None,
        dataset: str | None,
        normalisation: Kind,
    ):
        super().__init__()
        name = type(self).__name__
        check_modalities(self, modalities, READS)
        self.images = [m for m in modalities if base_modality(m) == RGB]
        if not self.images:
            raise UserError(f"{name}: modalities name no picture; it reads at least one camera")
        self.reads_language, self.reads_proprio = LANGUAGE in modalities, PROPRIO in modalities
        self.observation_keys = tuple(modalities)
        self.horizon, self.room, self.state_room = horizon, room, state_room
        self.executed, self.action_dim = executed, action_dim
        proprio_dim = proprio_dim if self.reads_proprio else 0
        for option, got, most in (
            ("action_dim", action_dim, room),
            ("proprio_dim", proprio_dim, state_room),
            ("executed", executed, horizon),
        ):
            if got > most:
                raise UserError(f"{name}: {option} is {got}, and the model has room for {most}")
        counted = (executed, action_dim)
        self.value_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 1))
        if isinstance(noise, Real):
            self.flow, self.decision_keys = FlowSDE(steps, noise, counted), (PAIR, INDEX)
            self.entropy_trains = False  # that of a stochastic step does not depend on its mean
        elif len(noise) == 2:
            self.flow, self.decision_keys = FlowNoise(steps, *noise, counted), (STATES,)
            self.noise_head = NoiseHead(width, horizon, room)
            self.heads = (*self.heads, "noise_head")
        else:
            raise UserError(
                f"{name}: noise is {list(noise)}; expected one number, or the two bounds of what is learned"
            )
        self.actions = Normalisation.from_file(statistics, "action", dataset, normalisation, action_dim)
        self.states = Normalisation.from_file(statistics, "proprio", dataset, normalisation, proprio_dim)

    @abstractmethod
    def velocity(self, step: TensorDictBase) -> Velocity:
        """The velocity of noised actions `[B, H, D]` at times `[B]`, for the observations of a step."""

    def act_through(self, action_map: ActionMap) -> None:
        """See `Normalisation.act_through`."""
        self.actions.act_through(action_map)

    def padded_state(self, proprio: Tensor) -> Tensor:
        """Proprioception `[B, P]` as the model reads it: normalised, and zeros up to its room."""
        if proprio.shape[-1] != self.states.size:
            raise UserError(
                f"{type(self).__name__}: proprio has {proprio.shape[-1]} numbers, and proprio_dim is {self.states.size}"
            )
        state = self.states.normalise(proprio.float())
        return F.pad(state, (0, self.state_room - state.shape[-1]))

    def decide(self, step: TensorDictBase, deterministic: bool) -> TensorDictBase:
        """Denoise a chunk; `deterministic` is where the equation leads, without noise on the way.

        What is denoised is drawn in either case. Noise of zeros, or the same noise at every decision, leads to worse
        actions than fresh noise, by far after reinforcement learning: such a policy gets stuck beside its goal.
        """
        velocity, hidden = self.velocity(step), step.get(PREFIX_HIDDEN)
        noise = torch.randn(len(hidden), self.horizon, self.room, device=hidden.device)
        if deterministic:
            with torch.no_grad():
                x = follow(velocity, noise, self.flow.steps)
            states = [x] * (2 if isinstance(self.flow, FlowSDE) else self.flow.steps.count + 1)
            drawn = (torch.stack(states, dim=1), torch.zeros(len(x), dtype=torch.int64, device=x.device))
            log_prob = at_level(x.new_zeros(len(x), self.executed, self.action_dim), self.ratio_level)
        elif isinstance(self.flow, FlowSDE):
            x, *drawn, log_prob = self.flow.sample(velocity, noise, level=self.ratio_level)
        else:
            x, *drawn, log_prob = self.flow.sample(velocity, self._raw_std(step), noise, level=self.ratio_level)
        action = self.actions.unnormalise(x[:, : self.executed, : self.action_dim])
        step.set(ACTION, action[:, 0] if self.executed == 1 else action)
        step.update(dict(zip(self.decision_keys, drawn, strict=False)))
        return step.set(LOG_PROB, log_prob).set(VALUE, self.state_value(step))

    def score(self, step: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        velocity, value = self.velocity(step), self.state_value(step)
        if isinstance(self.flow, FlowSDE):
            log_prob = self.flow.log_prob(velocity, step.get(PAIR), step.get(INDEX), self.ratio_level)
            return log_prob, log_prob.new_zeros(len(log_prob)), value
        return *self.flow.score(velocity, self._raw_std(step), step.get(STATES), self.ratio_level), value

    def _raw_std(self, step: TensorDictBase) -> Velocity:
        hidden = step.get(PREFIX_HIDDEN).detach().float()  # how large the noise is does not teach the model to see
        return lambda x, time: self.noise_head(hidden, time)

    def state_value(self, step: TensorDictBase) -> Tensor:
        return self.value_head(step.get(PREFIX_HIDDEN).float()).float()

    def imitation_loss(self, step: TensorDictBase, plan: Tensor) -> Tensor:
        """The flow-matching error `[B]` of an expert's plan, at one random time, with one random noise for each row.

        The mean over all H steps and D numbers of the squared difference between the velocity and noise - action; times
        are 0.001 + 0.999 Beta(1.5, 1) (pi0, arXiv:2410.24164, section IV; LeRobot's SmolVLA).

        Args:
            step: its stages have run.
            plan: `[B, H, A]`, the expert's actions in the environment's units.
        """
        action = self.actions.normalise(plan.float())
        action = F.pad(action, (0, self.room - action.shape[-1]))
        noise = torch.randn_like(action)
        beta = torch.distributions.Beta(action.new_tensor(1.5), action.new_tensor(1.0))
        time = 0.001 + 0.999 * beta.sample((len(action),))
        there = time[:, None, None]
        velocity = self.velocity(step)(there * noise + (1 - there) * action, time)
        return (velocity - (noise - action)).square().mean(dim=(1, 2))


class NoiseHead(nn.Module):
    """What bounds the noise of each number of a chunk at each time, from the prefix (ReinFlow, arXiv:2505.22094)."""

    def __init__(self, width: int, horizon: int, room: int):
        super().__init__()
        self.horizon, self.room = horizon, room
        self.layers = nn.Sequential(nn.Linear(width + 1, 256), nn.SiLU(), nn.Linear(256, horizon * room))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Numbers `[B, H, D]`, of any size, from `hidden` `[B, W]` and times `[B]`; see `FlowNoise.bounded`."""
        raw = self.layers(torch.cat([hidden, time[:, None].to(hidden.dtype)], dim=1))
        return raw.unflatten(1, (self.horizon, self.room))
