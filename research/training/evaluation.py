"""Evaluation from fixed initial states: one row per episode, an interval for the success rate, frames for a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from research.schema import (
    ACTION,
    INITIAL_STATE,
    LANGUAGE,
    OBSERVATION,
    SUCCESS,
    check_finite,
    check_finite_observation,
    decode_text,
)


@dataclass
class Episode:
    """One evaluation episode, see `Evaluation.rows`.

    Attributes:
        success: whether the environment reported success at any step; None where it has no such notion. An episode
            that was cut off has none.
        success_at_end: whether it did at the last step: another thing where an environment goes on after success.
        cut_off: it did not end by itself within `max_eval_steps`.
    """

    initial_state: int
    instruction: str | None
    success: bool | None
    episode_return: float
    length: int
    success_at_end: bool | None = None
    cut_off: bool = False


@dataclass
class Evaluation:
    """Episodes in the order of their initial states, and frames uint8 `[T_i, H, W, 3]` of the first few."""

    episodes: list[Episode]
    frames: list[np.ndarray]
    distinct: bool = True
    """Whether the initial states differ; if not, the interval is that of a single episode."""

    @property
    def has_success(self) -> bool:
        return self.episodes[0].success is not None

    def rows(self, **tags: Any) -> list[dict[str, Any]]:
        """The episodes as rows of `episodes.jsonl`: their fields, after `tags` (global_step, seed, split) on each."""
        return [{**tags, **asdict(episode)} for episode in self.episodes]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], distinct: bool) -> Evaluation:
        """An evaluation, without frames, from its rows of `episodes.jsonl`."""
        names = [field.name for field in fields(Episode)]
        return cls([Episode(**{n: row[n] for n in names if n in row}) for row in rows], [], distinct)

    def metrics(self) -> dict[str, float]:
        """`eval/*` metrics; the interval is Wilson's, 95 %."""
        metrics = {
            "eval/return": float(np.mean([e.episode_return for e in self.episodes])),
            "eval/episode_length": float(np.mean([e.length for e in self.episodes])),
        }
        if self.has_success:
            successes = sum(e.success for e in self.episodes)
            rate = successes / len(self.episodes)
            states = len(self.episodes) if self.distinct else 1
            low, high = wilson_interval(round(rate * states), states)
            metrics |= {"eval/success_rate": rate, "eval/success_low": low, "eval/success_high": high}
            if any(e.success_at_end is not None and e.success_at_end != e.success for e in self.episodes):
                metrics["eval/success_at_end"] = sum(bool(e.success_at_end) for e in self.episodes) / len(self.episodes)
        return metrics

    @property
    def filmed_success(self) -> list[bool] | None:
        """Success of the episodes that were filmed; None where the env has no such notion."""
        return [bool(e.success) for e in self.episodes[: len(self.frames)]] if self.has_success else None

    @property
    def score(self) -> float:
        """What makes one evaluation better than another: success, or else return."""
        metrics = self.metrics()
        return metrics.get("eval/success_rate", metrics["eval/return"])

    def summary(self) -> str:
        """For a person: "0.563 [0.501, 0.622] success over 256 episodes"."""
        m = self.metrics()
        if self.has_success:
            interval = f"{m['eval/success_rate']:.3f} [{m['eval/success_low']:.3f}, {m['eval/success_high']:.3f}]"
            of = "" if self.distinct else ", all from one initial state"
            return f"{interval} success over {len(self.episodes)} episodes{of}"
        return f"return {m['eval/return']:.3f} over {len(self.episodes)} episodes"


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    states: Sequence[int],
    film: int = 0,
    max_steps: int = 1000,
    on_wave: Callable[[int], None] | None = None,
) -> Evaluation:
    """One deterministic episode from each initial state.

    Args:
        env: a batched environment that accepts `initial_state` ids at reset.
        policy: the module that acts; asked for its mode.
        states: ids of the initial states.
        max_steps: where an episode that does not end by itself is cut off: it counts as a failure, whatever it did.
        film: how many of the first episodes to record, through the env's `render_frames`.
        on_wave: called with the number of episodes done, after every batch of them.
    Returns:
        episodes in the order of `states`. The same weights and states give the same episodes, bit for bit on CPU.
    """
    n, episodes, frames = env.batch_size[0], [], []
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.random.fork_rng():
        torch.manual_seed(0)  # for a policy that can only sample
        for first in range(0, len(states), n):
            wave = list(states[first : first + n])
            filmed = max(0, min(film - first, len(wave)))
            rows, recorded = _run_wave(env, policy, wave, filmed, max_steps)
            episodes += rows
            frames += recorded
            if on_wave is not None:
                on_wave(len(episodes))
    return Evaluation(episodes, frames, getattr(env, "distinct_states", True))


def _run_wave(env: EnvBase, policy: TensorDictModuleBase, wave: list[int], film: int, max_steps: int):
    n, device = env.batch_size[0], env.device
    ids = torch.tensor(wave + [wave[-1]] * (n - len(wave)), device=device)[:, None]  # a short wave is filled up
    step = env.reset(TensorDict({INITIAL_STATE: ids}, batch_size=[n], device=device))
    observation = step.get(OBSERVATION)
    texts = decode_text(observation.get(LANGUAGE)) if LANGUAGE in observation.keys() else [None] * n
    running = torch.ones(n, dtype=torch.bool, device=device)
    total, length = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    success, success_at_end = torch.zeros(2, n, dtype=torch.bool, device=device)
    has_success = SUCCESS in env.observation_spec.keys()
    shots: list[list[Tensor]] = [[] for _ in range(film)]
    for _ in range(max_steps):
        if not running[: len(wave)].any():
            break
        _film(env, shots, running)
        check_finite_observation(step.get(OBSERVATION), "in evaluation")
        step = policy(step)
        check_finite([("action", step.get(ACTION))], "in evaluation")
        # Finished environments are reset and go on; what they do no longer counts.
        step, following = env.step_and_maybe_reset(step)
        after = step.get("next")
        check_finite([("reward", after.get("reward"))], "in evaluation")
        total += torch.where(running, after.get("reward").squeeze(-1), 0.0)
        length += running
        done = after.get("done").squeeze(-1)
        if has_success:
            reported = running & after.get(SUCCESS).squeeze(-1)
            success |= reported
            success_at_end |= reported & done
        running &= ~done
        step = following
    rows = []
    for i, (state, text) in enumerate(zip(wave, texts, strict=False)):
        cut_off = bool(running[i])
        successes = [bool(flags[i]) and not cut_off if has_success else None for flags in (success, success_at_end)]
        rows.append(Episode(state, text, successes[0], float(total[i]), int(length[i]), successes[1], cut_off))
    return rows, [np.stack([s.cpu().numpy() for s in shot]) for shot in shots if shot]


def _film(env: EnvBase, shots: list[list[Tensor]], running: Tensor) -> None:
    if not shots or not running[: len(shots)].any():
        return
    frames = env.render_frames()
    if frames is None:  # nothing to see in this environment
        return
    for i, shot in enumerate(shots):
        if running[i]:
            shot.append(frames[i])
