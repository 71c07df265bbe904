"""The options of imitation, which the command line and the files of `bc_vla.py` hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from research.errors import UserError

ActionStats = Literal["environment", "none", "min_max", "quantiles"]


@dataclass
class CloningConfig:
    """The gradient steps of behaviour cloning."""

    epochs: PositiveInt = 8
    """Passes over the data, at most."""
    steps: PositiveInt | None = None
    """Gradient steps, at most, in place of epochs."""
    batch_size: PositiveInt = 128
    """Samples per gradient step."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of AdamW: of all steps, or the highest of a cycle."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    """constant, or one_cycle: up to the learning rate in the first tenth of the steps, then down to nothing; of
    imitation, and of pointing before it."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of AdamW."""
    loss: Literal["head", "smooth_l1"] = "head"
    """head: the model's own (squared error, cross-entropy of tokens, flow matching); or smooth_l1 between plan and
    actions."""
    value_weight: NonNegativeFloat = 0.5
    """Weight of the value regression beside the imitation loss."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient; a larger one is scaled down; 0 = any."""
    proprio_noise: NonNegativeFloat = 0.0
    """Standard deviation of noise on the proprioception, new at each step, in its own units."""
    gamma: ClosedUnitInterval = 0.97
    """Discount, per decision, of the returns that the value head learns."""


@dataclass
class LeRobotConfig:
    """How a LeRobot data set is read."""

    keys: dict[str, str] = field(default_factory=dict)
    """Feature -> observation key; null = observation.state is proprio, pictures are rgb and then rgb_<camera>."""
    image_size: PositiveInt | None = None
    """Pixels a side to which pictures are scaled, whatever their proportions; null = as they are."""
    every: PositiveInt = 1
    """Control steps from one sample to the next."""
    instruction_length: PositiveInt = 64
    """Bytes reserved for the instruction."""
    action_stats: ActionStats = "environment"
    """What brings actions to [-1, 1]: the environment's own bounds, which they were recorded in (without one: none);
    none, as they are there already; min_max or quantiles (1st and 99th) of the data, which the output's JSON has."""


@dataclass
class BCConfig(CloningConfig):
    """Imitation of an expert."""

    kinds: ClassVar[dict] = {"env": ("env_config",), "model_class": ("model_config", "model_path")}

    env: str = "tabletop"
    """Environment: its expert is imitated, and there the model is evaluated."""
    env_config: dict[str, Any] = field(
        default_factory=lambda: {"task": "pick_place", "modalities": ["rgb", "proprio", "language"]}
    )
    """Settings of the environment, free-form."""
    model_class: str = "agents.small_vla.SmallVLA"
    """Dotted path of the model's class."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's class, free-form."""
    model_path: str | None = None
    """Checkpoint to start from, as of policy.vla_config.model_path; null = fresh weights."""
    freeze: str | list[str] = "none"
    """Parts whose weights stay, as of policy.freeze; what they make of the data is computed once."""
    horizon: PositiveInt | None = None
    """Control steps that the model plans; null = those that it executes."""
    executed: PositiveInt = 1
    """Control steps that it executes before the next look: the environment's chunk."""
    seed: NonNegativeInt = 0
    """Seed of the data, the weights and the order of the minibatches."""
    demonstrations: str | None = None
    """Folder of a LeRobot data set to imitate; null = the environment's expert."""
    lerobot: LeRobotConfig = field(default_factory=LeRobotConfig)
    episodes: PositiveInt = 40
    """Episodes of each task that the expert plays, where the environment's simulators are stepped one by one."""
    first_state: NonNegativeInt = 6000
    """Id of the first of their initial states."""
    only_successful: bool = True
    """In episodes, and of a data set that says so: imitate none that failed."""
    samples: PositiveInt = 24000
    """Transitions to imitate, where the environment steps its rows together (tabletop)."""
    noise: NonNegativeFloat = 0.3
    """Standard deviation of the noise on the expert's motion: of each control step, or of each decision in episodes."""
    noise_probability: ClosedUnitInterval = 0.5
    """In episodes: probability that a decision is noisy at all."""
    wander: NonNegativeInt = 4
    """In half of the episodes: largest number of decisions at the start of which all motion is random."""
    gripper_noise: ClosedUnitInterval = 0.02
    """In tabletop: probability that the expert's gripper does the opposite of what it should."""
    stop_at: ClosedUnitInterval = 0.55
    """Success at which imitation stops, over states that neither training nor evaluation uses; 1 = never."""
    watch_every: PositiveInt = 25
    """Gradient steps from one look at that success to the next."""
    watch_episodes: PositiveInt = 128
    """How many such states."""
    pointing_steps: NonNegativeInt = 5000
    """Gradient steps on pointing at what the instruction names, on fresh scenes; 0 for a model that cannot point."""
    num_envs: PositiveInt = 128
    """Environments that run side by side."""
    eval_episodes: NonNegativeInt = 256
    """Held-out initial states for the final evaluation, 0 to this; 0 = no environment is made, which needs
    demonstrations of a data set."""
    max_eval_steps: PositiveInt = 1000
    """Control steps after which an episode is cut off, and has failed: of the final evaluation, and of what stops."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1; auto is the GPU if there is one."""
    output: str = "runs/imitation/tabletop_pick_place.pt"
    """Checkpoint to write; a .json of the same name goes beside it. The shipped one is in experiments/checkpoints/."""

    def __post_init__(self):
        if "chunk" in self.env_config:
            raise UserError("env_config.chunk: give it as executed, which the model and the environment are both told")
        if self.horizon is not None and self.horizon < self.executed:
            raise UserError(f"horizon: {self.horizon} steps are planned and executed = {self.executed} are executed")
        if {"lora", "residual"} & {*([self.freeze] if isinstance(self.freeze, str) else self.freeze)}:
            raise UserError(
                "freeze: adapters are made for reinforcement learning, and residuals; name the parts whose weights stay"
            )
        if self.demonstrations is None and not self.eval_episodes:
            raise UserError("eval_episodes: 0 makes no environment, whose expert is imitated; give demonstrations")
