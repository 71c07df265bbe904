"""Collection: environment + policy -> rollout `[N, T]`, on TorchRL's collector.

What a rollout keeps of a step is what the update reads, and nothing else. Observations that only frozen stages read
are gone as soon as those have run, and next observations once they have been valued: those of the few states that no
later step values, at truncations and at its end, where the next rollout begins and takes over their frozen features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import set_exploration_type

from research.schema import (
    ENV_STEPS,
    INITIAL_STATE,
    OBSERVATION,
    SUCCESS,
    SUCCESS_NOW,
    with_text_as,
)
from research.training.algorithm import Policy, another_seed, env_steps_in
from research.training.collecting_policy import CollectingPolicy
from research.training.episodes import EpisodeStatistics
from research.training.parallel import ALONE, World
from research.training.turns import Turns

FINAL_VALUE = "final_value"  # under "next": the next state's value where no later step of the rollout holds it, else 0
KEPT_AFTER = ("reward", "done", "terminated", "truncated", SUCCESS, SUCCESS_NOW, ENV_STEPS)  # of what is under "next"
WORKER = "worker"  # which process collected, where several do


class RolloutCollector(Collector):
    """TorchRL's collector, whose rollouts keep what the update reads, and the values of final states.

    Those values are computed by the very policy that acts, when the last step has been taken. `rollout` replaces
    TorchRL's, whose options for single steps have no effect: policy and environment share a device.
    """

    def __init__(
        self, create_env_fn: EnvBase | Callable[[], EnvBase], policy: CollectingPolicy | None = None, **options
    ):
        # No `device`: on a GPU the collector would act with a copy of the policy, because the version is on the CPU,
        # and that copy gets no versions and takes no weights. Trajectory ids it would seek in what a step dropped.
        super().__init__(create_env_fn, policy, **{**options, "track_traj_ids": False})
        self._ahead: TensorDictBase | None = None  # frozen features of the states that the next rollout begins with
        self._task_id = [INITIAL_STATE] if len(getattr(self.env, "task_names", ())) > 1 else []  # it tells the task

    @torch.no_grad()
    def rollout(self) -> TensorDictBase:
        """Take T steps in every environment: `[N, T]`."""
        policy, turns, truncated, rollout, ahead = self.policy, Turns(self.env), [], None, self._ahead
        seen = {} if ahead is None else {part.start: ahead[part] for part in turns.parts}
        act = lambda part, now: policy(now, seen.pop(part.start, None))  # noqa: E731
        with set_exploration_type(self.exploration_type):
            for t, part, step in turns.play(self._carrier, act, self.frames_per_batch):  # T: TorchRL has divided by N
                after, kept = step.get("next"), with_text_as(torch.uint8, step.select(*policy.kept_keys))
                rows = (after.get("done") & ~after.get("terminated")).squeeze(-1).nonzero().squeeze(-1)
                if len(rows):
                    truncated.append((t, rows + part.start, after.get(OBSERVATION)[rows]))
                kept.set("next", after.select(*KEPT_AFTER, *self._task_id, strict=False))
                if rollout is None:  # written to step by step: put together at the end, it would be there three times
                    rollout = kept.new_empty(*self._carrier.batch_size, self.frames_per_batch)
                    whole = list(rollout.items(include_nested=True, leaves_only=True))
                for key, tensor in whole:
                    tensor[part, t] = kept.get(key)
                policy.env_steps += env_steps_in(kept)
        self._carrier, self._ahead, rollout = turns.now, None, rollout.refine_names(..., "time")
        rollout["next"].set(FINAL_VALUE, self._final_values(policy, truncated, rollout["next", "done"]))
        if policy.worker is not None:
            rollout.set(WORKER, torch.full(rollout.shape, policy.worker, dtype=torch.int16, device=rollout.device))
        return rollout

    def _final_values(
        self, policy: CollectingPolicy, truncated: list[tuple[int, Tensor, TensorDictBase]], done: Tensor
    ) -> Tensor:
        """`[N, T, 1]` from steps, rows and observations of truncations, and from where the environments are now."""
        values = torch.zeros_like(done, dtype=torch.float32)
        if truncated:
            observations = torch.cat([observation for _, _, observation in truncated])
            found = policy.values(TensorDict({OBSERVATION: observations}, observations.batch_size))
            for (t, rows, _), part in zip(truncated, found.split([len(r) for _, r, _ in truncated]), strict=True):
                values[rows, t] = part
        if done[:, -1].all():
            return values
        following, self._ahead = policy.look_ahead(self._carrier.select(OBSERVATION))
        values[:, -1] = torch.where(done[:, -1], values[:, -1], following)
        return values


class Rollouts:
    """Rollouts `[N, T]` collected by turns with the update.

    Args:
        env: batch `[N]`.
        policy: see `algorithm.Policy`.
        buffer_size: transitions per rollout, N * T.
        world: the processes that collect, each for itself; episodes are reported together.
        seed: of the run.
    Attributes:
        env_steps: control steps of the last rollout.
    """

    def __init__(self, env: EnvBase, policy: Policy, buffer_size: int, world: World = ALONE, seed: int = 0):
        self.env, self.policy, self.world, self.seed = env, CollectingPolicy(policy), world, seed
        self.env_steps = 0
        self.episodes = EpisodeStatistics(env.batch_size[0], env.device, getattr(env, "task_names", ()), world)
        self.collector = RolloutCollector(
            env,
            self.policy,
            frames_per_batch=buffer_size,
            total_frames=-1,
            trust_policy=True,
            use_buffers=False,
            auto_register_policy_transforms=False,
            return_same_td=True,  # every rollout is a new one
            no_cuda_sync=True,  # all is on one device
        )
        self._arriving: Iterator[TensorDictBase] | None = None

    def next(self) -> TensorDictBase:
        """Collect a rollout."""
        self._arriving = self._arriving or iter(self.collector)
        rollout = next(self._arriving)
        self.episodes.observe(rollout)
        self.env_steps = env_steps_in(rollout)
        return rollout

    def metrics(self) -> dict[str, float]:
        """Of the episodes that ended since this was last asked."""
        return self.episodes.metrics()

    def publish(self) -> None:
        """Say that the weights have changed."""
        self.policy.version += 1

    def state_dict(self) -> dict:
        """Where the environments and their episodes are."""
        ahead, environment = self.collector._ahead, self.env.state_dict()
        if not self.env.resumes_exactly:  # which may have turned out just now
            return {"environment": environment}
        return {
            "environment": environment,
            "carrier": self.collector._carrier.to_dict(),
            # Made of all rows at once: of fewer, a kernel may round otherwise.
            "ahead": None if ahead is None else ahead.to_dict(),
            "episodes": self.episodes.state_dict(),
        }

    def load_state_dict(self, state: dict | None, env_steps: int) -> bool:
        """Go on from there; False where the environment cannot, or there is no state, so that episodes start anew."""
        self.policy.env_steps = env_steps // self.world.size
        if state is None:
            self.env.set_seed(another_seed(self.seed, env_steps))
            return False
        self.env.load_state_dict(state.get("environment", {}))
        exactly = self.env.resumes_exactly and "carrier" in state
        if exactly:
            carrier = TensorDict.from_dict(state["carrier"], batch_size=self.env.batch_size)
            self.collector._carrier.update(carrier.to(self.env.device))
            ahead = state.get("ahead")  # checkpoints of before 0.3 have none
            self.collector._ahead = None
            if ahead is not None:
                ahead = TensorDict.from_dict(ahead, batch_size=self.env.batch_size)
                self.collector._ahead = ahead.to(self.env.device)
            self.episodes.load_state_dict(state["episodes"])
        return exactly

    def shutdown(self) -> None:
        """Close the environment."""
        self.collector.shutdown()
