"""Evaluation from fixed initial states: one row per episode, an interval for the success rate, frames for a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import binomtest
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from research.schema import (
    ACTION,
    ENV_STEPS,
    INITIAL_STATE,
    LANGUAGE,
    OBSERVATION,
    SUCCESS,
    SUCCESS_NOW,
    check_finite,
    check_finite_observation,
    decode_text,
)

EvalMode = Literal["mode", "sample"]


@dataclass
class Episode:
    """One evaluation episode, see `Evaluation.rows`.

    Attributes:
        success: whether the environment reported success at any step; None where it has no such notion. An episode
            that was cut off has none.
        success_at_end: whether it did at the last step: another thing where an environment goes on after success.
        cut_off: it did not end by itself within `max_eval_steps`.
        length: control steps.
        task: its task's name, where the environment has names for them.
    """

    initial_state: int
    instruction: str | None
    success: bool | None
    episode_return: float
    length: int
    success_at_end: bool | None = None
    cut_off: bool = False
    task: str | None = None


def success_by_task(episodes: Sequence[Episode]) -> dict[str, float]:
    """Success rate of every task, where there are several; of episodes of an environment that tells success."""
    tasks = sorted({e.task for e in episodes} - {None})
    if len(tasks) < 2:
        return {}
    return {task: float(np.mean([bool(e.success) for e in episodes if e.task == task])) for task in tasks}


def shares_of_tasks(task_names: Sequence[str], states: Sequence[int], option: str) -> str | None:
    """What to say where the tasks of an environment do not begin in equally many of these initial states.

    Args:
        task_names: the task of an id is `task_names[id % len(task_names)]` (`envs.simulator.Layout`).
        states: ids of an evaluation.
        option: which says how many they are.
    Returns:
        one line; None where all have as many, and where there are no tasks.
    """
    tasks = len(task_names)
    counts = np.bincount([state % tasks for state in states], minlength=tasks) if tasks > 1 else np.zeros(1)
    if counts.min() == counts.max():
        return None
    some = int((counts > 0).sum())
    among = f"of {some} of the {tasks} tasks" if some < tasks else f"{counts.min()} or {counts.max()} of each task"
    return (
        f"{option}: {len(states)} evaluation episodes are {among}, so that rates are not those of all "
        f"tasks alike; take a multiple of {tasks}"
    )


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
            metrics |= {f"eval/success_rate/{task}": rate for task, rate in success_by_task(self.episodes).items()}
        return metrics

    @property
    def filmed_success(self) -> list[bool] | None:
        """Success of the episodes that were filmed; None where the env has no such notion."""
        return [bool(e.success) for e in self.episodes[: len(self.frames)]] if self.has_success else None

    @property
    def captions(self) -> list[tuple[str, str]]:
        """What to write under each episode that was filmed: of what it is, and at its end how it went."""
        captions = []
        for episode in self.episodes[: len(self.frames)]:
            about = [episode.task, f"state {episode.initial_state}", episode.instruction]
            outcome = [] if episode.success is None else ["success" if episode.success else "failure"]
            outcome += [f"return {episode.episode_return:.2f}", f"{episode.length} steps"]
            captions.append((" · ".join(filter(None, about)), " · ".join(outcome)))
        return captions

    @property
    def shown(self) -> int:
        """Which filmed episode to show where there is place for one: the first that succeeded, else the first."""
        return next((i for i, success in enumerate(self.filmed_success or ()) if success), 0)

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
            tasks = "".join(f"; {task} {rate:.2f}" for task, rate in success_by_task(self.episodes).items())
            return f"{interval} success over {len(self.episodes)} episodes{of}{tasks}"
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
    on_end: Callable[[int], None] | None = None,
    mode: EvalMode = "mode",
) -> Evaluation:
    """One episode from each initial state.

    A row whose episode has ended takes the next state, so that none waits for the slowest of the others.

    Args:
        env: a batched environment that accepts `initial_state` ids at reset.
        policy: the module that acts.
        states: ids of the initial states.
        film: how many of the first episodes to record, through the env's `render_frames`.
        max_steps: control steps after which an episode that does not end by itself is cut off: it counts as a failure,
            whatever it did.
        on_end: called with the number of episodes done, whenever some have ended.
        mode: "mode" asks the policy for its mode; "sample" lets it draw as in training. What is drawn, even for the
            mode of a flow, is from a generator of its own.
    Returns:
        episodes in the order of `states`. The same weights and states give the same episodes, bit for bit on CPU.
    """
    kind = ExplorationType.DETERMINISTIC if mode == "mode" else ExplorationType.RANDOM
    with set_exploration_type(kind), torch.random.fork_rng():
        torch.manual_seed(0)
        rows = EpisodeRows(env, list(states), film, max_steps)
        while rows.running.any():
            rows.step(policy)
            if rows.finished_now and on_end is not None:
                on_end(len(rows.episodes))
    episodes = [rows.episodes[place] for place in range(len(states))]
    frames = [np.stack([frame.cpu().numpy() for frame in shot]) for shot in rows.shots if shot]
    return Evaluation(episodes, frames, getattr(env, "distinct_states", True))


class EpisodeRows:
    """The rows of an environment among which episodes from given states are shared: which each is in, how it goes.

    Args:
        env, states, film, max_steps: as for `evaluate`.
        record: called at every step with `running` bool `[N]`, whose rows count, the places `[N]` of their episodes
            in `states`, what the policy made of the step, and what that led to.
        more: called with the places in `states` of episodes that have just ended; returns states of further episodes,
            which follow those that wait already.
        collecting: for training, where an episode that is cut off keeps the success that it had.
    """

    def __init__(
        self,
        env: EnvBase,
        states: list[int],
        film: int,
        max_steps: int,
        record: Callable[[Tensor, Tensor, TensorDictBase, TensorDictBase], None] | None = None,
        more: Callable[[list[int]], Sequence[int]] | None = None,
        collecting: bool = False,
    ):
        self.record, self.more, self.collecting = record, more, collecting
        self.when = "while collecting" if collecting else "in evaluation"
        n, device = env.batch_size[0], env.device
        self.env, self.states, self.max_steps = env, states, max_steps
        self.task_names: Sequence[str] = getattr(env, "task_names", ())
        self.episodes: dict[int, Episode] = {}  # by their places in `states`
        self.places = list(range(min(n, len(states)))) + [len(states) - 1] * (n - len(states))  # of each row's episode
        self.running = torch.arange(n, device=device) < len(states)  # the others go on without being counted
        self.upcoming = min(n, len(states))
        self.total, self.length = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        self.success, self.success_at_end = torch.zeros(2, n, dtype=torch.bool, device=device)
        self.has_success = SUCCESS in env.observation_spec.keys()
        self.shots: list[list[Tensor]] = [[] for _ in range(min(film, len(states)))]
        self.filming = len(self.shots) > 0
        self.between = self.filming and getattr(env, "chunk", 1) > 1 and hasattr(env, "film_between")
        if self.between:
            env.film_between(min(n, len(self.shots)))
        self.texts: list[str | None] = [None] * n
        self.finished_now = False
        self.now = env.reset(TensorDict({INITIAL_STATE: self._ids()}, batch_size=[n], device=device))
        self._read_texts(range(n))

    def _ids(self) -> Tensor:
        return torch.tensor([self.states[place] for place in self.places], device=self.env.device)[:, None]

    def _read_texts(self, rows: Sequence[int]) -> None:
        if LANGUAGE in (observation := self.now.get(OBSERVATION)).keys():
            texts = decode_text(observation.get(LANGUAGE)[list(rows)])
            for row, text in zip(rows, texts, strict=True):
                self.texts[row] = text

    def step(self, policy: TensorDictModuleBase) -> None:
        """One decision in every row; rows whose episode is over begin the next."""
        self._film()
        check_finite_observation(self.now.get(OBSERVATION), self.when)
        acted = policy(self.now)
        check_finite([("action", acted.get(ACTION))], self.when)
        after = self.env.step(acted).get("next")
        check_finite([("reward", after.get("reward"))], self.when)
        if self.record is not None:
            self.record(self.running, torch.tensor(self.places, device=self.env.device), acted, after)
        self._film_between()
        running, done = self.running, after.get("done").squeeze(-1)
        self.total += torch.where(running, after.get("reward").squeeze(-1), 0.0)
        taken = after.get(ENV_STEPS, None)
        self.length += running if taken is None else torch.where(running, taken.squeeze(-1), 0)
        if self.has_success:
            reported = after.get(SUCCESS).squeeze(-1)
            self.success |= running & reported
            self.success_at_end |= running & done & after.get(SUCCESS_NOW, reported[:, None]).squeeze(-1)
        over = running & (done | (self.length >= self.max_steps))
        self.finished_now = bool(over.any())
        self.now = after
        starts = done
        if self.finished_now:
            self._film_ends(over)
            self._end_episodes(over.nonzero()[:, 0].tolist(), done)
            starts = done | self._take_next()
        if starts.any():
            self._start(starts)

    def _end_episodes(self, rows: list[int], done: Tensor) -> None:
        """Note how the episodes of these rows went, and hear of more."""
        for row in rows:
            place, cut_off = self.places[row], not bool(done[row])
            successes = [
                bool(flags[row]) and (self.collecting or not cut_off) if self.has_success else None
                for flags in (self.success, self.success_at_end)
            ]
            state = self.states[place]
            task = self.task_names[state % len(self.task_names)] if self.task_names else None
            self.episodes[place] = Episode(
                state, self.texts[row], successes[0], float(self.total[row]), int(self.length[row]), successes[1],
                cut_off, task,
            )  # fmt: skip
        self.running[rows] = False
        for counted in (self.total, self.length, self.success, self.success_at_end):
            counted[rows] = 0
        if self.more is not None:
            self.states += self.more([self.places[row] for row in rows])

    def _take_next(self) -> Tensor:
        """Give free rows the next states, while there are any; returns the rows that have one now, bool `[N]`."""
        taken = torch.zeros_like(self.running)
        for row in (~self.running).nonzero()[: len(self.states) - self.upcoming, 0].tolist():
            self.places[row], self.upcoming = self.upcoming, self.upcoming + 1
            taken[row] = True
        self.running |= taken
        return taken

    def _start(self, rows: Tensor) -> None:
        """Reset rows, bool `[N]`: to the states of their episodes; any state does where nothing is left to do."""
        asked = {"_reset": rows[:, None], INITIAL_STATE: self._ids()}
        self.now = self.env.reset(self.now.exclude("reward").update(asked))
        self._read_texts(rows.nonzero()[:, 0].tolist())

    def _film(self) -> None:
        """Record the rows whose episodes are among the first, while there are any."""
        shots = self._filmed()
        frames = self.env.render_frames() if shots else None
        self.filming = frames is not None  # there may be nothing to see in this environment
        for row, shot in shots.items() if self.filming else ():
            shot.append(frames[row])

    def _film_ends(self, over: Tensor) -> None:
        """Record what the last step of an episode has led to, in rows bool `[N]`."""
        shots = {row: shot for row, shot in self._filmed().items() if over[row]}
        frames = self.env.render_frames() if shots else None
        for row, shot in shots.items():
            shot.append(frames[row])

    def _film_between(self) -> None:
        between = self.env.frames_between() if self.between and self.filming else ()
        for row, shot in self._filmed().items() if between else ():  # films of what is observed have none
            shot += list(between[row])

    def _filmed(self) -> dict[int, list[Tensor]]:
        """The rows that are filmed now, each with the frames of its episode."""
        if not self.filming:
            return {}
        running = self.running.tolist()
        return {r: self.shots[p] for r, p in enumerate(self.places) if running[r] and p < len(self.shots)}
