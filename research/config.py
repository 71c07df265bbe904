"""The configuration of an experiment: every option that a JSON file may hold, with its default and its help text.

All dataclasses of the JSON layout are here, whatever they configure; a script's own options are in the script. How they
are read is `research/options.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from research.errors import UserError

# What policy.freeze takes by itself; which parts of a model each of them names is in training/freezing.py.
FREEZE_PRESETS = ("none", "vision", "language", "backbone", "lora", "residual")
# Entries of model_config that mean the same as a preset, whatever the model.
FREEZE_SWITCHES = {"freeze_vision_encoder": "vision", "freeze_language_model": "language"}


def _refuse_beyond(config: Any, **largest: int) -> None:
    """Refuse values of options beyond which a run would not begin, or not end."""
    for name, most in largest.items():
        if (value := getattr(config, name)) is not None and value > most:
            raise UserError(f"{name}: {value} is too large; at most {most:,}")


def path_problem(path: str) -> str | None:
    """Why no file system would take a path, or a name that is looked for as one; None where one may."""
    if len(path.encode(errors="replace")) > 2000 or any(len(p.encode(errors="replace")) > 255 for p in path.split("/")):
        return "is too long for a path: 2,000 bytes in all, 255 in each part of it"
    if any(c < " " or "\ud800" <= c <= "\udfff" for c in path):
        return f"{path!r} has characters that no path here has"
    return None


def _refuse_no_paths(config: Any, *options: str) -> None:
    for name in options:
        if problem := path_problem(getattr(config, name) or ""):
            raise UserError(f"{name}: {problem}")


@dataclass
class TrainerConfig:
    """The run: environment, seeds, sizes, evaluation, tracking."""

    kinds: ClassVar[dict] = {"env": ("env_config",)}
    either: ClassVar[tuple] = (("iterations", "max_env_steps"),)
    sections: ClassVar[dict] = {  # of the help, by the option that each begins with
        "exp_name": "run", "env": "environment", "buffer_size": "collection", "device": "device",
        "enable_eval": "evaluation", "use_wandb": "tracking",
    }  # fmt: skip

    exp_name: str = "ppo"
    """Name of the experiment; the run folder is <run_dir>/<exp_name>-<id>."""
    run_dir: str = "runs"
    """Folder that holds the run folders."""
    resume: str | None = None
    """Run folder or checkpoint to continue, from its own configuration; auto = the newest run of this name, if any."""
    seed: NonNegativeInt = 1
    """Seed of everything random."""
    iterations: PositiveInt = 250
    """Rollouts, each followed by one PPO update, unless max_env_steps is given; a flag for one of the two sets aside
    what a file says by the other, and a file what its base says."""
    max_env_steps: PositiveInt | None = None
    """Control steps over all environments: the run ends with the iteration that reaches them. Where actions are chunks,
    runs of one budget have equal numbers of env steps so, and not of iterations. null = iterations decides."""
    iterations_by_scope: dict[str, PositiveInt] = field(default_factory=dict)
    """Sweeps at equal wall time: iterations per freeze scope, as many as fit the time. The scope's is what iterations
    becomes, and learning rates fall to 0 at its end."""
    save_freq: NonNegativeInt = 20000
    """Environment steps between checkpoints; 0 = only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept, besides that of the best evaluation."""
    progress_bar: bool = True
    """Show a progress bar; where there is no terminal, a line a minute."""
    env: str = "tabletop"
    """Environment: tabletop, metaworld, maniskill, libero, gym:<id> for a Gymnasium environment, or gym_vec:<id> for
    one of many rows."""
    env_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment, free-form; --help.env=<environment> lists them."""
    num_envs: PositiveInt = 64
    """Environments that run side by side."""
    buffer_size: PositiveInt = 2048
    """Transitions per update over all environments; decisions, where actions are chunks."""
    buffer_type: Literal["standard", "vla"] = "standard"
    """standard: collect, then update; vla: collect in other processes while updating, corrected for stale weights."""
    num_collectors: PositiveInt = 1
    """Processes that collect (buffer_type vla); they share num_envs."""
    collector: Literal["local", "processes", "ray"] | None = None
    """Where is collected: in the main process (local; what buffer_type standard does), in other processes of this
    machine (processes), or on machines of a Ray cluster (ray), both for buffer_type vla. null = local or processes."""
    ray_address: str | None = None
    """Ray cluster that collector ray joins: auto (the one of this machine) or host:port; null = Ray is started here."""
    max_staleness: NonNegativeInt = 2
    """Updates that a transition's weights may lag behind (buffer_type vla); older ones are thrown away."""
    worker_timeout: PositiveFloat = 60.0
    """Seconds in which a process that collects (buffer_type vla) takes no step before it is ended, and the run with it,
    or it is replaced (collector ray); env_config.worker_timeout is the same for processes that simulate."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: PositiveInt | None = None
    """Threads that torch computes with; null = OMP_NUM_THREADS, or else the cores that are free at the start. A run
    repeats bit for bit on the same number."""
    autocast: Literal["off", "bf16"] = "off"
    """bf16: run the model's layers in bfloat16; log-probabilities, advantages and losses stay in float32."""
    compile: Literal["off", "on"] = "off"
    """on: torch.compile the model's stages, as CUDA graphs on a GPU; slow at first, needs a C++ compiler."""
    sharding: Literal["none", "full"] = "none"
    """full: weights, gradients and optimizer are divided among the processes of torchrun while they update (FSDP2);
    needs several of them."""
    enable_eval: bool = True
    """Evaluate on fixed initial states before, during and after training."""
    num_eval_envs: PositiveInt = 64
    """Environments that run side by side in an evaluation."""
    num_eval_episodes: PositiveInt = 256
    """Episodes, each from its own initial state, per evaluation."""
    eval_mode: Literal["mode", "sample"] = "mode"
    """mode: an evaluation asks the policy for its likeliest action (a flow draws what it denoises, and nothing on the
    way); sample: it draws, as in training."""
    max_eval_steps: PositiveInt = 1000
    """Control steps after which an evaluation episode that does not end by itself is cut off, without success; looked
    at after each decision."""
    eval_freq: NonNegativeInt = 20000
    """Environment steps between evaluations; 0 = only before and after training."""
    use_wandb: bool = True
    """Log to Weights & Biases; offline where no account is configured."""
    wandb_project_name: str = "vla-rl"
    """W&B project; inside a sweep the sweep's own project is used."""
    wandb_entity: str | None = None
    """W&B user or team; null = the account's own."""
    wandb_name: str | None = None
    """Name of the run on W&B; by default made from exp_name, freeze scope, learning rate and seed."""
    wandb_notes: str | None = None
    """Notes that W&B shows beside the run."""
    wandb_group: str | None = None
    """W&B group; by default made from environment, algorithm and variant."""
    wandb_tags: list[str] = field(default_factory=list)
    """W&B tags, besides the ones every run gets."""
    wandb_checkpoints: bool = True
    """Keep the newest and the best checkpoint on W&B while the run is online, and what it started from."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run folder, too (extra tensorboard)."""

    def __post_init__(self) -> None:
        _refuse_beyond(self, seed=2**32 - 1, threads=4096, num_envs=2**20, iterations=10**9, buffer_size=2**28)
        _refuse_beyond(self, num_collectors=1024, max_staleness=10**6, worker_timeout=10**6, keep_checkpoints=10**6)
        _refuse_beyond(self, num_eval_envs=2**20, num_eval_episodes=10**6, max_eval_steps=10**7)
        _refuse_no_paths(self, "env", "run_dir", "resume")
        if len(self.exp_name.encode()) > 200 or not self.exp_name.isprintable():
            raise UserError(
                f"exp_name: {self.exp_name[:200]!r} cannot be part of a folder's name: too long, or unprintable"
            )
        if not self.exp_name or Path(self.exp_name).name != self.exp_name:
            raise UserError(f"exp_name: {self.exp_name!r} cannot be part of a folder's name; leave out slashes")
        _refuse_beyond(self, max_env_steps=10**15)
        if self.num_envs % self.num_collectors:
            raise UserError(f"num_collectors: {self.num_collectors} does not divide num_envs = {self.num_envs}")
        if self.num_collectors > 1 and self.buffer_type == "standard":
            raise UserError(
                f"num_collectors: {self.num_collectors} processes collect with buffer_type = vla; with standard the "
                "main one does, set it to 1"
            )
        if self.collector is not None and (self.collector == "local") != (self.buffer_type == "standard"):
            fitting = "local" if self.buffer_type == "standard" else "processes or ray"
            raise UserError(
                f"collector: {self.collector} does not go with buffer_type = {self.buffer_type}, which is {fitting}; "
                "change one of the two, or leave collector out"
            )
        if self.ray_address is not None and self.collector != "ray":
            raise UserError(f"ray_address: is for collector = ray, but that is {self.collector}")

    @property
    def chunk(self) -> int:
        """Actions per decision; 1 where it is nothing that an environment takes, as it will say."""
        chunk = self.env_config.get("chunk", 1)
        return chunk if type(chunk) is int and chunk > 0 else 1

    @property
    def env_steps_planned(self) -> int:
        """Control steps of the whole run, if no decision ends early."""
        return self.max_env_steps or self.iterations * self.buffer_size * self.chunk


@dataclass
class VLAConfig:
    """The model: which class, built how, from which checkpoint."""

    kinds: ClassVar[dict] = {
        "model_class": (
            "model_path", "model_config", "strict", "strip_prefix", "add_prefix", "trust_checkpoint", "adapter_path",
        )
    }  # fmt: skip

    model_path: str | None = None
    """Checkpoint to start from: .pt, .pth, .safetensors, a folder of shards, or wandb:entity/project/name:alias; null =
    fresh weights."""
    model_class: str = "agents.small_vla.SmallVLA"
    """Dotted path of the model's class."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's class, free-form."""
    strict: bool = True
    """Refuse a checkpoint with missing or unexpected keys."""
    strip_prefix: str | None = None
    """Prefix to remove from the checkpoint's keys."""
    add_prefix: str | None = None
    """Prefix to put before the checkpoint's keys."""
    trust_checkpoint: bool = False
    """Unpickle arbitrary objects from the checkpoint: this can run code, so only for files you trust."""
    adapter_path: str | None = None
    """Folder of peft whose weights the adapters of policy.freeze=lora start from; model_path has what they adapt."""

    def __post_init__(self) -> None:
        _refuse_no_paths(self, "model_path", "model_class", "adapter_path")


@dataclass
class LoRAConfig:
    """Low-rank adapters, where policy.freeze has lora."""

    rank: PositiveInt = 8
    """Rank of every adapter."""
    alpha: PositiveFloat = 16.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: str | list[str] = "auto"
    """auto (what the model's `lora_targets` name, else linear and convolutional layers outside the heads), or a list of
    layer names, module paths and globs."""

    def __post_init__(self) -> None:
        _refuse_beyond(self, rank=2**16)


@dataclass
class ResidualConfig:
    """The network that is added to the frozen policy, where policy.freeze is residual."""

    units: PositiveInt = 512
    """Units of its one hidden layer."""

    def __post_init__(self) -> None:
        _refuse_beyond(self, units=2**16)


@dataclass
class ActionChunk:
    """Several actions per decision."""

    horizon: PositiveInt | None = None
    """Control steps that the model plans; null = those that are executed."""
    executed: PositiveInt | None = None
    """Control steps that are executed before the next look, the same as trainer.env_config.chunk; null = that one, or
    the horizon."""

    def __post_init__(self) -> None:
        _refuse_beyond(self, horizon=1000, executed=1000)
        if self.horizon is not None and self.executed is not None and self.executed > self.horizon:
            raise UserError(f"action_chunk.executed: {self.executed} is beyond action_chunk.horizon = {self.horizon}")


@dataclass
class PolicyConfig:
    """The policy: the model, what trains in it and how fast."""

    name: Literal["vla"] = "vla"
    """Kind of policy."""
    action_dim: PositiveInt | None = None
    """Numbers per action; null = the environment's, which it must equal."""
    action_chunk: ActionChunk = field(default_factory=ActionChunk)
    freeze: str | list[str] = "none"
    """none, vision, language, backbone (all but the heads), lora (backbone, with low-rank adapters in it), residual
    (all but the value head, and a small network adds to the actions), or a list of the others, part names, module paths
    and globs."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    learning_rates: dict[str, PositiveFloat] = field(default_factory=dict)
    """Learning rate per named part or module path; the others use algorithm.cfg.learning_rate."""
    learning_rate_by_scope: dict[str, PositiveFloat] = field(default_factory=dict)
    """Sweeps: reference learning rate per freeze scope. The scope's, times learning_rate_factor, is what
    algorithm.cfg.learning_rate becomes."""
    learning_rate_factor: PositiveFloat = 1.0
    """Sweeps: what multiplies the scope's reference learning rate."""
    critic_gradient: Literal["head", "trunk"] = "head"
    """How far the value loss reaches: only into the value head, or through the trunk too."""
    value_head: str | None = None
    """Name of the model's value-head part; null = found: what the value depends on and the log-probability does not."""
    ratio_level: Literal["chunk", "action", "token"] = "chunk"
    """What has a probability ratio that is clipped: the whole decision, each action of its chunk, or each number of
    each; the loss and train/approx_kl sum over them."""
    feature_reuse: Literal["auto", "off"] = "auto"
    """auto: keep the frozen parts' outputs in the rollout and never run those parts in the update."""
    feature_memory: NonNegativeFloat | None = None
    """GiB of a rollout for those outputs: kept are those that spare the most FLOPs per byte, the others are computed
    again in the update. null = all are kept."""
    vla_config: VLAConfig = field(default_factory=VLAConfig)

    def __post_init__(self) -> None:
        _refuse_beyond(self, action_dim=10**6)
        if isinstance(self.freeze, str) and self.freeze not in FREEZE_PRESETS:
            raise UserError(
                f"freeze: {self.freeze!r} is none of the presets {', '.join(FREEZE_PRESETS)}; "
                f"name parts of the model in a list, as in [{self.freeze}]"
            )
        scopes = [self.freeze] if isinstance(self.freeze, str) else self.freeze
        if "residual" in scopes and self.freeze != "residual":
            raise UserError(f"freeze: residual freezes all there is by itself; give it alone, not {self.freeze!r}")
        if self.vla_config.adapter_path is not None and "lora" not in scopes:
            raise UserError(f"vla_config.adapter_path: is for policy.freeze=lora, not {self.freeze!r}")
        self.freeze, self.vla_config.model_config = split_switches(self.freeze, self.vla_config.model_config)

    @property
    def scope(self) -> str:
        """What is frozen, as one name: a list is joined by +."""
        return self.freeze if isinstance(self.freeze, str) else "+".join(self.freeze)


@dataclass
class PolicyGradientConfig:
    """Gradient steps on a policy, whatever its advantages are."""

    value_warmup_iterations: ClassVar[int] = 0

    learning_rate: PositiveFloat = 1e-5
    """Learning rate of every part that policy.learning_rates does not name."""
    anneal_lr: bool = False
    """Let all learning rates fall linearly, to 0 at the last iteration."""
    lr_warmup_iterations: NonNegativeInt = 0
    """First iterations, over which all learning rates rise linearly."""
    n_epochs: PositiveInt = 4
    """Passes over each rollout."""
    batch_size: PositiveInt = 512
    """Most transitions per minibatch; a rollout is divided evenly."""
    micro_batch_size: PositiveInt | None = None
    """Transitions per forward and backward pass; gradients accumulate over a minibatch. null = all at once."""
    ent_coef: NonNegativeFloat = 0.001
    """Weight of the entropy bonus."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    target_kl: PositiveFloat | None = None
    """Stop an update before a step from where the policy has moved further than this (KL of a minibatch, in nats);
    null = never."""

    def __post_init__(self) -> None:
        _refuse_beyond(self, n_epochs=10**6)


@dataclass
class PPOConfig(PolicyGradientConfig):
    """The PPO update."""

    name: ClassVar[str] = "ppo"

    gamma: ClosedUnitInterval = 0.99
    """Discount per decision."""
    gae_lambda: ClosedUnitInterval = 0.95
    """Lambda of generalized advantage estimation."""
    clip_coef: PositiveFloat = 0.2
    """How far the probability ratio may leave 1."""
    vf_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    dual_clip: PositiveFloat | None = None
    """Bound the loss of a bad action at this many times its advantage, however likely it has become (3 in dual-clip
    PPO); above 1. null = unbounded."""
    clip_value: PositiveFloat | None = None
    """How far a value may leave the one it had while collecting before its loss stops falling; in units of the return
    (scaled, with normalize_reward). null = any distance."""
    huber_delta: PositiveFloat | None = None
    """Value errors from which the value loss is linear (Huber); below them it is half the squared error. null = the
    squared error."""
    normalize_advantage: bool = True
    """Give the advantages mean 0 and standard deviation 1."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of their discounted sum, and clip them at 10;
    rollout/return and evaluations have them as they are."""
    normalize_proprio: bool = False
    """Give each number of proprio mean 0 and standard deviation 1 by running statistics, and clip it at 10; for
    training from scratch, with a model that has a RunningNormalisation (StateMLP)."""
    value_warmup_iterations: NonNegativeInt = 0
    """First iterations that train only the value head; the policy stays bit-identical."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_coef > 1:
            raise UserError(f"clip_coef: {self.clip_coef:g} would let the ratio fall below 0, where none is; at most 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip: {self.dual_clip:g} would bound actions that are as likely as before; above 1")
        for name in ("clip_value", "huber_delta"):
            if getattr(self, name) is not None and not self.vf_coef:
                raise UserError(f"{name}: is of the value loss, which vf_coef = 0 leaves out; leave out one of the two")
        if self.normalize_proprio and self.value_warmup_iterations:
            raise UserError(
                "normalize_proprio: changes what the policy does in every iteration, and value_warmup_iterations = "
                f"{self.value_warmup_iterations} keeps it as it is; leave out one of the two"
            )


@dataclass
class GRPOConfig(PolicyGradientConfig):
    """The update of group-relative algorithms: no critic, advantages of an episode among others from the same state."""

    name: ClassVar[str] = "grpo"
    normalize_advantage: ClassVar[bool] = False  # of a minibatch: they are what `advantage` says

    advantage: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
    """grpo: return minus the group's mean, over its standard deviation; rloo: minus the mean of the others; dr_grpo:
    minus the group's mean."""
    group_size: PositiveInt = 8
    """Episodes from each initial state."""
    groups: PositiveInt = 16
    """Initial states of an iteration, besides those of which all episodes went alike."""
    most_draws: PositiveInt = 4
    """How many times as many initial states are tried, at most, where all episodes of many go alike."""
    clip_low: PositiveFloat = 0.2
    """How far below 1 the probability ratio may go."""
    clip_high: PositiveFloat = 0.2
    """How far above 1 it may go; larger than clip_low where unlikely actions should become likely sooner (DAPO)."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the policy at the start of the run."""
    max_steps: PositiveInt = 1000
    """Control steps after which an episode that does not end by itself is cut off, looked at after each decision; it
    has the return, and the success, that it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise UserError(f"group_size: {self.group_size} episode has nothing to be compared with; at least 2")
        if self.clip_low >= 1:
            raise UserError(f"clip_low: {self.clip_low:g} would let the ratio fall to 0, where none is; below 1")
        _refuse_beyond(self, group_size=10**6, groups=10**6, most_draws=10**4, max_steps=10**7)


@dataclass
class AlgorithmConfig:
    """The learning algorithm."""

    kinds: ClassVar[dict] = {"name": ("cfg",)}

    name: Literal["ppo", "grpo"] = "ppo"
    """Kind of algorithm; it decides what cfg holds."""
    cfg: PPOConfig | GRPOConfig = field(default_factory=PPOConfig)


@dataclass
class ExperimentConfig:
    """A reinforcement-learning run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    def __post_init__(self) -> None:
        policy, batch_size, buffer_size = self.policy, self.algorithm.cfg.batch_size, self.trainer.buffer_size
        self._settle_chunk()
        for option, table, kind in (
            ("policy.learning_rate_by_scope", policy.learning_rate_by_scope, "rate"),
            ("trainer.iterations_by_scope", self.trainer.iterations_by_scope, "number"),
        ):
            if table and policy.scope not in table:
                raise UserError(f"{option}: has no {kind} for the scope {policy.freeze!r}, only {', '.join(table)}")
        if self.trainer.iterations_by_scope and self.trainer.max_env_steps is not None:
            raise UserError("trainer.iterations_by_scope: trainer.max_env_steps ends runs, too; give one of the two")
        if not policy.learning_rate_by_scope and policy.learning_rate_factor != 1:
            raise UserError("policy.learning_rate_factor: multiplies policy.learning_rate_by_scope, which is not set")
        if self.algorithm.name == "ppo" and buffer_size % self.trainer.num_envs:
            raise UserError(
                f"trainer.buffer_size: {buffer_size} is not a multiple of num_envs = {self.trainer.num_envs}"
            )
        if self.algorithm.name == "ppo" and batch_size > buffer_size:
            raise UserError(
                f"algorithm.cfg.batch_size: {batch_size} is larger than trainer.buffer_size = {buffer_size}"
            )

    def _settle_chunk(self) -> None:
        """Say once how many actions a decision has: to the environment, which executes them, and to the model."""
        chunk, trainer = self.policy.action_chunk, self.trainer
        told = trainer.env_config.get("chunk")
        if None not in (told, chunk.executed) and told != chunk.executed:
            raise UserError(
                f"policy.action_chunk.executed: is {chunk.executed}, but trainer.env_config.chunk is {told!r}; they "
                "are the same thing, so give one of them"
            )
        if isinstance(told, int) and chunk.horizon is not None and told > chunk.horizon:
            raise UserError(
                f"trainer.env_config.chunk: {told!r} is beyond policy.action_chunk.horizon = {chunk.horizon}"
            )
        executed = chunk.executed or chunk.horizon or 1
        if told is None and executed > 1:
            trainer.env_config = {**trainer.env_config, "chunk": executed}

    def resolve(self, given: Mapping[str, str]) -> None:
        """Settle the learning rate and the length that follow from the freeze scope, unless others were given beside.

        Args:
            given: dotted key -> "base", "file" or "flag", of the values that were given.
        Raises:
            UserError: a learning rate (or iterations), and a table per scope that makes another one, were given in one
                place; or the rate by a flag, and the table in the file. (Flags that give a table win over a file's
                rate, and a file's over that of its base.)
        """
        policy, trainer = self.policy, self.trainer
        if policy.learning_rate_by_scope:
            rate = policy.learning_rate_by_scope[policy.scope] * policy.learning_rate_factor
            tables = ("policy.learning_rate_by_scope", "policy.learning_rate_factor")
            self._settle(given, "algorithm.cfg.learning_rate", self.algorithm.cfg, rate, tables)
        if trainer.iterations_by_scope:
            iterations = trainer.iterations_by_scope[policy.scope]
            self._settle(given, "trainer.iterations", trainer, iterations, ("trainer.iterations_by_scope",))

    def _settle(self, given: Mapping[str, str], option: str, group: Any, value: float, tables: Sequence[str]) -> None:
        """Set an option to what tables per scope make of it; see `resolve`."""
        name, places = option.rpartition(".")[2], (None, "base", "file", "flag")  # each wins over those before it
        by_scope = max(places.index(given.get(key)) for key in (*tables, "policy.freeze"))
        if option in given and getattr(group, name) != value and by_scope <= places.index(given[option]):
            raise UserError(
                f"{option}: is {getattr(group, name):g}, but by {' and '.join(tables)} it is {value:g}; give one of "
                f"the two (--{tables[0]}={{}} unsets the latter)"
            )
        setattr(group, name, value)


def split_switches(
    scope: str | Sequence[str], model_config: Mapping[str, Any]
) -> tuple[str | list[str], dict[str, Any]]:
    """Take `freeze_vision_encoder` and `freeze_language_model` out of a model's configuration and into the scope.

    Returns:
        the scope for `policy.freeze`, and the rest of the model's configuration.
    """
    if not isinstance(scope, str):  # one name for one scope, by which runs are compared
        scope = [name for name in dict.fromkeys(scope) if name != "none"] or "none"
    kept = {key: value for key, value in model_config.items() if key not in FREEZE_SWITCHES}
    wanted = [preset for switch, preset in FREEZE_SWITCHES.items() if model_config.get(switch)]
    if not wanted or scope in ("backbone", "residual"):
        return scope, kept
    if len(wanted) == 1 and scope in ("none", wanted[0]):
        return wanted[0], kept
    chosen = [scope] if isinstance(scope, str) else list(scope)
    return [pattern for pattern in dict.fromkeys([*chosen, *wanted]) if pattern != "none"], kept
