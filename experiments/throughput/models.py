"""What `benchmark_throughput.py` runs: models by name, environments by name, and two that exist for it alone."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from agents.action_heads import GaussianHead
from agents.gpt_trunks import VisionEncoder
from agents.loading import load_vla_model
from agents.small_vla import Fusion, LanguageEncoder
from agents.vla import StagedVLA
from envs import make_env
from research.schema import HIDDEN, LANGUAGE, OBSERVATION, PROPRIO, RGB, encode_text

MODELS = {
    "small": ("agents.small_vla.SmallVLA", {}),
    "resnet18": ("throughput.models.ResNetVLA", {"vision_encoder": "resnet18"}),
    "resnet34": ("throughput.models.ResNetVLA", {"vision_encoder": "resnet34"}),
    "resnet50": ("throughput.models.ResNetVLA", {"vision_encoder": "resnet50"}),
    "gpt": ("agents.gpt_vla.GPTVLAModel", {"vision_encoder": "resnet50", "language_model": "gpt2-medium"}),
}
ENVIRONMENTS = ("tabletop", "standin")
MODALITIES = [RGB, PROPRIO, LANGUAGE]


def build_model(name: str, config: dict, action_dim: int, device: torch.device) -> nn.Module:
    """The named model with fresh weights, the same ones at every call; `config` wins over the model's own arguments."""
    model_class, arguments = MODELS[name]
    torch.manual_seed(0)
    return load_vla_model(None, model_class, {"action_dim": action_dim, **arguments, **config}, device).eval()


def build_env(name: str, num_envs: int, image_size: int, device: torch.device, seed: int = 0) -> EnvBase:
    """The named environment: rgb, proprioception and language, batch `[num_envs]`."""
    if name == "standin":
        return StandInEnv(num_envs, image_size, seed=seed, device=device)
    return make_env("tabletop", num_envs, {"image_size": image_size, "modalities": MODALITIES}, device, seed)


class ResNetVLA(StagedVLA):
    """A ResNet whose features are pooled to one token, and the rest of `SmallVLA` around it.

    Args:
        action_dim: A.
        vision_encoder: see `agents.gpt_vla.GPTVLAModel`.
        proprio_dim: P of `proprio` `[B, P]`.
        language_size: E.
        hidden_size: D of `hidden` `[B, D]`.
    """

    def __init__(
        self,
        action_dim: int,
        vision_encoder: str | dict = "resnet18",
        proprio_dim: int = 3,
        language_size: int = 64,
        hidden_size: int = 128,
    ):
        super().__init__()
        self.vision_encoder = VisionEncoder(vision_encoder, weights=None, tokens=1)
        self.language_encoder = LanguageEncoder(language_size)
        self.fusion = Fusion(self.vision_encoder.channels, language_size, proprio_dim, hidden_size, slots=1)
        self.action_head = GaussianHead(hidden_size, action_dim)
        self.value_head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), nn.Linear(128, 1))

    def stages(self) -> list[TensorDictModule]:
        features = ["vision_features", "language_features"]
        return [
            TensorDictModule(self.vision_encoder, in_keys=[(OBSERVATION, RGB)], out_keys=features[:1]),
            TensorDictModule(self.language_encoder, in_keys=[(OBSERVATION, LANGUAGE)], out_keys=features[1:]),
            TensorDictModule(self.fusion, in_keys=[*features, (OBSERVATION, PROPRIO)], out_keys=[HIDDEN]),
        ]

    def action_distribution(self, hidden: Tensor) -> Distribution:
        return self.action_head(hidden)

    def value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden).float()


class StandInEnv(EnvBase):
    """An environment that costs nothing: observations and rewards are drawn once and handed out in turn.

    Episodes all have the same length and end by truncation; they start staggered, so that some end at every step.

    Args:
        num_envs: N.
        image_size: pixels per side of `rgb`.
        episode_length: steps.
        pool: how many different observations each environment has.
        seed: of the pool.
        device: where observations lie.
    """

    batch_locked = True

    def __init__(
        self,
        num_envs: int,
        image_size: int = 64,
        episode_length: int = 40,
        pool: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        super().__init__(device=device, batch_size=[num_envs])
        self.image_size, self.episode_length, self.pool_size = image_size, episode_length, pool
        self._instructions = encode_text([f"put the red cube on plate {i}" for i in range(8)], 64)
        n, flag = num_envs, Categorical(2, (num_envs, 1), dtype=torch.bool, device=device)
        rgb = Bounded(0, 255, (n, image_size, image_size, 3), dtype=torch.uint8, device=device)
        proprio = Unbounded((n, 3), dtype=torch.float32, device=device)
        language = Bounded(0, 255, (n, 64), dtype=torch.int64, device=device)
        observation = Composite({RGB: rgb, PROPRIO: proprio, LANGUAGE: language}, shape=(n,), device=device)
        self.observation_spec = Composite({OBSERVATION: observation}, shape=(n,), device=device)
        self.action_spec = Bounded(-1.0, 1.0, (n, 3), dtype=torch.float32, device=device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,), device=device
        )
        self._age = torch.zeros(n, 1, dtype=torch.int64, device=self.device)
        self._never = torch.zeros(n, 1, dtype=torch.bool, device=self.device)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        g, n, size = torch.Generator().manual_seed(int(seed or 0)), self.batch_size[0], self.image_size
        self._turn, self._pool = 0, []
        for _ in range(self.pool_size):
            drawn = {
                RGB: torch.randint(0, 256, (n, size, size, 3), generator=g, dtype=torch.uint8),
                PROPRIO: 0.1 * torch.randn(n, 3, generator=g),
                LANGUAGE: self._instructions[torch.randint(0, 8, (n,), generator=g)],
            }
            observation = TensorDict(drawn, self.batch_size).to(self.device)
            self._pool.append((observation, torch.rand(n, 1, generator=g).to(self.device)))

    def _next(self) -> tuple[TensorDictBase, Tensor]:
        self._turn = (self._turn + 1) % self.pool_size
        observation, reward = self._pool[self._turn]
        return observation.copy(), reward

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._age = torch.arange(self.batch_size[0], device=self.device)[:, None] % self.episode_length
        else:
            self._age = torch.where(mask.view_as(self._age), 0, self._age)
        flags = {name: self._never.clone() for name in ("done", "terminated", "truncated")}
        return TensorDict({OBSERVATION: self._next()[0], **flags}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._age = self._age + 1
        observation, reward = self._next()
        ended = self._age >= self.episode_length
        flags = {"done": ended, "terminated": self._never.clone(), "truncated": ended.clone()}
        return TensorDict(
            {OBSERVATION: observation, "reward": reward.clone(), **flags}, self.batch_size, device=self.device
        )
