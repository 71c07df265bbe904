"""Stable-Baselines3's PPO on the very same network and environment, for `benchmark_throughput.py` (extra `bench`).

Its policy, buffers and loops are its own; what is replaced is what builds a network: the features extractor is the
model's trunk, the two heads are the model's heads. So a forward pass has the same FLOPs, once per collected step and
once per minibatch.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from research.config import PPOConfig
from research.schema import ACTION, OBSERVATION


class StableBaselines:
    """Stable-Baselines3's PPO.

    Args:
        env: batch `[N]`, or a vector environment of its own kind.
        model: the VLA, frozen as wanted.
        steps: T, steps per rollout.
        cfg: PPO's settings.
    """

    def __init__(self, env: EnvBase | VecEnv, model: nn.Module, steps: int, cfg: PPOConfig):
        vector = env if isinstance(env, VecEnv) else VectorEnv(env)
        self.ppo = PPO(
            SameNetworkPolicy,
            vector,
            learning_rate=cfg.learning_rate,
            n_steps=steps,
            batch_size=min(cfg.batch_size, steps * vector.num_envs),
            n_epochs=cfg.n_epochs,
            gamma=cfg.gamma,
            gae_lambda=cfg.gae_lambda,
            clip_range=cfg.clip_coef,
            ent_coef=cfg.ent_coef,
            vf_coef=cfg.vf_coef,
            max_grad_norm=cfg.max_grad_norm,
            policy_kwargs={"features_extractor_class": Trunk, "features_extractor_kwargs": {"model": model}},
            device=next(model.parameters()).device,
        )
        # What `PPO.learn` does before its loop, which is `collect_rollouts` and `train` by turns.
        _, self._callback = self.ppo._setup_learn(total_timesteps=1, callback=None)

    def collect(self) -> None:
        self.ppo.collect_rollouts(self.ppo.env, self._callback, self.ppo.rollout_buffer, self.ppo.n_steps)

    def update(self) -> None:
        self.ppo.train()

    def bytes_per_transition(self) -> float:
        buffer = self.ppo.rollout_buffer
        arrays = [*buffer.observations.values()]
        arrays += [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) / (buffer.buffer_size * buffer.n_envs)

    def close(self) -> None:
        """Close the environment."""
        self.ppo.env.close()


class Trunk(BaseFeaturesExtractor):
    """Observations as the environment has them -> `hidden` `[B, D]`."""

    def __init__(self, observation_space: spaces.Dict, model: nn.Module):
        super().__init__(observation_space, features_dim=model.action_head.mean[0].in_features)
        self.model = model

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        return self.model.encode(TensorDict(observations, batch_size=[len(observations["proprio"])]))


class ValueHead(nn.Module):
    """`hidden` `[B, D]` -> state value `[B, 1]`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.value(hidden)


class SameNetworkPolicy(ActorCriticPolicy):
    """Stable-Baselines3's actor-critic policy around the model's own trunk and heads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, net_arch=[], **kwargs)

    def _build(self, lr_schedule) -> None:
        self._build_mlp_extractor()  # of no layers: `hidden` comes out as it went in
        self.model = self.features_extractor.model
        self.value_net = ValueHead(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)

    def extract_features(self, obs: dict[str, Tensor], features_extractor: nn.Module | None = None) -> Tensor:
        return self.features_extractor(obs)  # the model normalises pixels and embeds bytes itself

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:
        return self.value_net(self.extract_features(obs))

    def _get_action_dist_from_latent(self, latent_pi: Tensor):
        distribution = self.model.action_distribution(latent_pi)
        mean, std = distribution.mean.flatten(1), distribution.stddev.flatten(1)  # of a chunk, one long action
        return self.action_dist.proba_distribution(mean, std.log())

    def set_training_mode(self, mode: bool) -> None:
        self.train(False)  # batch-norm keeps its statistics, as in the other loops


class VectorEnv(VecEnv):
    """A batched TorchRL environment as Stable-Baselines3 wants one."""

    def __init__(self, env: EnvBase):
        self.env = env
        zero = env.observation_spec[OBSERVATION].zero()
        observation_space = {}
        for key, value in zero.items():
            shape, dtype = tuple(value.shape[1:]), value.numpy(force=True).dtype
            low, high = (-np.inf, np.inf) if value.is_floating_point() else (0, 255)
            observation_space[key] = spaces.Box(low, high, shape, dtype)
        action_space = spaces.Box(-1.0, 1.0, tuple(env.action_spec.shape[1:]), np.float32)
        super().__init__(env.batch_size[0], spaces.Dict(observation_space), action_space)

    def reset(self) -> dict[str, np.ndarray]:
        self._now = self.env.reset()
        return _arrays(self._now.get(OBSERVATION))

    def step_async(self, actions: np.ndarray) -> None:
        self._now.set(ACTION, torch.from_numpy(actions).to(self.env.device))

    def step_wait(self):
        step, self._now = self.env.step_and_maybe_reset(self._now)
        after = step.get("next")
        done = after.get("done").squeeze(-1)
        cut = (after.get("truncated") & ~after.get("terminated")).squeeze(-1)
        infos = [{} for _ in range(self.num_envs)]
        for i in done.nonzero().squeeze(-1).tolist():
            infos[i] = {
                "terminal_observation": _arrays(after.get(OBSERVATION)[i]),
                "TimeLimit.truncated": bool(cut[i]),
            }
        reward = after.get("reward").squeeze(-1).numpy(force=True).copy()  # train() adds to it
        return _arrays(self._now.get(OBSERVATION)), reward, done.numpy(force=True), infos

    def close(self) -> None:
        if not self.env.is_closed:
            self.env.close()

    def get_attr(self, attr_name, indices=None) -> list:
        return [getattr(self.env, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs) -> list:
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)]

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        return [False] * self.num_envs


def _arrays(observations: TensorDictBase) -> dict[str, np.ndarray]:
    return {key: value.numpy(force=True) for key, value in observations.items()}
