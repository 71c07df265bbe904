"""What tests of collection elsewhere share, whoever collects: environments that go wrong, and proofs of versions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from worlds import reach_env

from agents.policy import VLAPolicy
from envs.tabletop import TabletopEnv
from research.errors import SimulatorFailed, UserError
from research.training.asynchronous import AsynchronousRollouts
from research.training.collecting_policy import POLICY_VERSION
from research.training.rollout import WORKER


def env_whose_second_worker(worker: int, does: Callable[[], None]) -> TabletopEnv:
    """An environment that does something else in the place of its 21st step, in worker 1."""
    env = reach_env(worker)
    step, taken = env._step, []

    def stepped(tensordict):
        taken.append(1)
        if worker == 1 and len(taken) > 20:
            does()
        return step(tensordict)

    env._step = stepped
    return env


def explode() -> None:
    raise SimulatorFailed("physics exploded")


def hang() -> None:
    time.sleep(3600)


breaking_env, hanging_env = (partial(env_whose_second_worker, does=does) for does in (explode, hang))


def absent_env(worker: int):
    raise UserError("trainer.env: no such thing")


def working_env(worker: int, seconds: float) -> TabletopEnv:
    """An environment whose step takes so much of a core's time."""
    env = reach_env(worker)
    step = env._step

    def stepped(tensordict):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return step(tensordict)

    env._step = stepped
    return env


class Delivering:
    """Workers that deliver parts of two rows and three control steps, of weights of a version each."""

    def __init__(self, make_env, policy, count, share, steps, seed, timeout):
        self.seeds, self.parts = [seed], []

    def receive(self):
        return self.parts.pop(0), False

    def part(self, worker: int, version: int, states: list[int]) -> TensorDict:
        """Episodes from even states succeed."""
        shape, whole = [2, 3], torch.zeros(2, 3, 1, dtype=torch.bool)
        done = whole.clone()
        done[:, -1] = True
        after = {
            "reward": torch.zeros(2, 3, 1), "done": done, "terminated": done.clone(), "truncated": whole,
            "initial_state": torch.tensor(states)[:, None, None].expand(2, 3, 1),
        }  # fmt: skip
        after["success"] = done & (after["initial_state"] % 2 == 0)
        told = {WORKER: torch.full(shape, worker), POLICY_VERSION: torch.full(shape, version)}
        return TensorDict({**told, "next": TensorDict(after, shape)}, shape)

    def post(self, policy):
        pass

    def reseed(self, seed):
        self.seeds.append(seed)

    def metrics(self):
        return {"rollout/workers_replaced": 1.0}


def prove_versions(asynchronous: AsynchronousRollouts, policy: VLAPolicy) -> None:
    """What a transition says of the weights that acted is true: under them its action is as likely as it says."""
    weights = {0: copy.deepcopy(policy.actor)}
    rollout = asynchronous.next()
    assert rollout.shape == (8, 6) and (rollout["policy_version"] == 0).all()
    assert "observation" not in rollout["next"].keys()
    # Two workers, two streams of episodes and of noise.
    assert not torch.equal(rollout["state_value"][:4, 0], rollout["state_value"][4:, 0])
    assert not torch.equal(rollout["action"][:4, 0], rollout["action"][4:, 0])
    seen = set()
    for version in (1, 2, 3):
        with torch.no_grad():
            for p in asynchronous.policy.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        weights[version] = copy.deepcopy(policy.actor)
        asynchronous.publish()
        rollout = asynchronous.next()
        for v in rollout["policy_version"].unique().tolist():
            seen.add(v)
            rows = (rollout["policy_version"] == v).reshape(-1)
            part = rollout.reshape(-1)[rows]
            for other, actor in weights.items():
                score = actor.get_dist(part.select(*policy.kept_keys, "action")).log_prob(part["action"])
                error = (score - part["action_log_prob"]).abs().max().item()
                assert (error < 1e-4) == (other == v), (v, other, error)
    assert max(seen) >= 2  # they keep up
