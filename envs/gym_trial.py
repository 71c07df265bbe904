"""What one Gymnasium environment tells about all of its kind, by being tried out before many are made.

Whether an id decides the state, which entry of info reports success, whether a saved state is all of it: none of this
is assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.chunks import execute
from envs.failures import blame, refused, warn_once
from envs.gym_info import as_success, look_up, never_reported, reported_key
from envs.gym_spaces import check_one_text, map_observations
from envs.gym_state import is_mujoco, objects_in, unsaved
from envs.mujoco_rendering import choose_gl
from research.errors import SimulatorFailed, UserError
from research.schema import RGB, base_modality

if TYPE_CHECKING:
    from envs.gym import GymnasiumSimulator, Recipe

PROBED_IDS = range(0, 8 * 53, 53)  # of episodes that are played to their ends; spread, as half of all may never succeed
PROBED_STEPS, PROBED_S = 1000, 5.0
_BEFORE, _AFTER = 3, 11  # steps before a state is saved, and those that have to come out the same after it
_SLOW_S = 0.1  # a step that takes longer is tried as few times as possible


def try_out(
    make: Callable[..., GymnasiumSimulator], recipe: Recipe, keys: Mapping[str, Any] | None, ids_reproducible: bool
) -> tuple[Recipe, bool]:
    """Complete a recipe by what one environment tells about all of them, and say whether ids differ in their states.

    Args:
        make: a simulator of a recipe; `check=True` lets Gymnasium check what the environment returns.
        recipe: which environment, and how to read it.
        keys: where observations come from (see `envs.gym.make_gym_env`).
        ids_reproducible: refuse an environment that starts the same id from another state.
    Raises:
        UserError: whatever is wrong with the environment, or what it raised.
    """
    with refused():
        simulator = make(recipe, check=True)
        try:
            if simulator.layout.films and is_mujoco(simulator.env):
                asked_by = "env_kwargs.render_mode" if recipe.render is None else "render"
                recipe = replace(recipe, gl=choose_gl(f"trainer.env_config.{asked_by}"))
            sources = map_observations(simulator.env.observation_space, keys, recipe.name, recipe.depth_unit)
            if recipe.render is not None and RGB in sources:
                raise UserError("trainer.env_config: rgb comes from render or from keys, not from both; set keys")
            check_one_text(sources, recipe.instruction is not None or recipe.instruction_key is not None)
            simulator.read_as(replace(recipe, sources=sources))
            simulator.reset(0)
            if not simulator.observe():
                raise UserError(
                    f"trainer.env_config: nothing of {recipe.name} is observed; set keys, render or instruction"
                )
            if simulator.layout.films:
                simulator.frame()  # a missing renderer shows now, not at the first evaluation
            simulator.read_as(_find_success(simulator))
            distinct = _try_ids(simulator, ids_reproducible)
        finally:
            simulator.close()
        recipe = simulator.recipe
        recipe, problem = _try_saving(make, recipe)
    if problem is not None:
        warn_once(cannot_be_saved(recipe.name, problem))
    return replace(recipe, saves=problem is None), distinct


def _find_success(simulator: GymnasiumSimulator) -> Recipe:
    """The recipe with what reports success, found by playing episodes to their ends.

    Success may be reported on last steps only, or only where there is one.

    Raises:
        UserError: what is reported is no success, or a key that was named is not there when an episode ends.
    """
    recipe, env, generator = simulator.recipe, simulator.env, np.random.default_rng(0)
    if recipe.success_return is not None:
        return recipe
    steps, until, ended = 0, time.monotonic() + PROBED_S, None
    for state in PROBED_IDS:
        with blame(f"{recipe.name}: reset(seed={state})"):
            env.reset(seed=state)
        done = False
        while not done and steps < PROBED_STEPS and time.monotonic() < until:
            with blame(f"{recipe.name}: step()"):
                *_, terminated, truncated, info = env.step(simulator.actions(simulator.actions.sample(generator)))
                done = bool(terminated or truncated)
            steps += 1
            key = recipe.success_key or reported_key(info)
            if key is not None and (value := look_up(info, key)) is not None:
                as_success(value, recipe.name, key)
                return replace(recipe, success_key=key, success_seen=True)
            ended = info if done else ended
    if recipe.success_key is not None and ended is not None:
        raise never_reported(recipe.name, recipe.success_key, ended)
    return recipe


def _try_ids(simulator: GymnasiumSimulator, reproducible: bool) -> bool:
    """Refuse an environment whose ids do not decide the state, and say whether different ids differ in anything seen.

    Id 0 is started a second time, with other episodes and a step between: what an environment keeps from one episode to
    the next, or draws from elsewhere than its own generator, shows then, in what is observed or in the step's reward.
    """
    name, rest = simulator.recipe.name, np.zeros(simulator.layout.action_dim, dtype=np.float32)
    starts, rewards = [], []
    for state in (0, 1, 2, 0):
        simulator.reset(state)
        starts.append(_copied(simulator.observe()))
        rewards.append(float(simulator.step(rest)["reward"][0]))
    first, *others, again = starts
    if reproducible and (key := _difference(first, again)):
        raise not_reproducible(name, key)
    if reproducible and rewards_differ(rewards[0], rewards[-1]):
        raise reward_not_reproducible(name, rewards[0], rewards[-1])
    distinct = any(_difference(first, other) for other in others)
    if not distinct:
        warn_once(all_alike(name))
    return distinct


def not_reproducible(name: str, key: str) -> UserError:
    """An id does not decide the state; `key` is the observation that showed it."""
    return UserError(
        f"trainer.env: {name} starts the same initial-state id from another state the second time ({key!r} "
        "differs), so that no two evaluations begin alike: let it draw from its own np_random only, and forget "
        "what was before; or say trainer.env_config.ids_reproducible: false"
    )


def rewards_differ(one: float, other: float) -> bool:
    """Whether two rewards differ by more than rounding; a running scale moves by little, of rewards that are small."""
    return not np.isclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True)


def reward_not_reproducible(name: str, one: float, other: float) -> UserError:
    """The same action in the state of the same id was given these two rewards."""
    return UserError(
        f"trainer.env: {name} gives the same action in the state of the same id a reward of {one:.6g} and, the second "
        f"time, of {other:.6g}, so that no two evaluations measure alike: let it forget what was before (scaled by a "
        "running deviation, as NormalizeReward does, rewards are by algorithm.cfg.normalize_reward instead); or say "
        "trainer.env_config.ids_reproducible: false"
    )


def all_alike(name: str) -> str:
    """What is said of an environment whose ids are all the same state."""
    return f"{name} starts every initial-state id from the same state: an evaluation is of one state"


def cannot_be_saved(name: str, problem: str) -> str:
    """What is said of an environment whose episodes end with the run."""
    return f"{name} cannot be saved ({problem}): a run that is resumed starts its episodes anew"


def _try_saving(make: Callable[..., GymnasiumSimulator], recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with the objects that are saved, and why a state does not bring the environment back, if it does not.

    It is brought back in itself, and in another instance.
    """
    simulator = make(recipe)
    try:
        simulator.reset(0)
        recipe = replace(recipe, objects=objects_in(simulator.env))
        simulator.read_as(recipe)
        actions = simulator.actions.sample(np.random.default_rng(0), (_BEFORE + _AFTER,))
        simulator.reset(PROBED_IDS[1])
        start = time.monotonic()
        _play(simulator, actions[:_BEFORE])
        if time.monotonic() - start > _BEFORE * _SLOW_S:
            actions = actions[: _BEFORE + 2]
        lost = unsaved(simulator.env, recipe.objects)
        state = None if lost else simulator.save()
        expected = _play(simulator, actions[_BEFORE:])
        if lost := lost or unsaved(simulator.env, recipe.objects):
            return recipe, f"what these attributes hold is not seen: {', '.join(lost)}"
        if problem := _try_loading(simulator, state, actions[_BEFORE:], expected):
            return recipe, problem
    finally:
        simulator.close()
    other = make(recipe)
    try:
        return recipe, _try_loading(other, state, actions[_BEFORE:], expected)
    finally:
        other.close()


def _try_loading(
    simulator: GymnasiumSimulator, state: bytes, actions: np.ndarray, expected: list[dict[str, np.ndarray]]
) -> str | None:
    try:
        simulator.load(state)
        found = _play(simulator, actions)
    except SimulatorFailed as error:
        return str(error)
    for one, other in zip(expected, found, strict=False):
        if key := next((key for key in one if not _same(key, one[key], other[key])), None):
            return f"{key!r} differs after its attributes, generators and MuJoCo's state were brought back"
    return None


def _play(simulator: GymnasiumSimulator, actions: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What actions `[T, A]` lead to, through the ends of episodes."""
    seen = []
    for action in actions:
        seen.append(_copied(execute(simulator, action)))
        if seen[-1]["terminated"] or seen[-1]["truncated"]:
            simulator.reset(1)
            seen[-1] |= {f"{key} of the next episode": v for key, v in _copied(simulator.observe()).items()}
    return seen


def _copied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: np.array(value) for key, value in arrays.items()}


def _same(key: str, one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, except for pictures, which renderers do not draw so."""
    if base_modality(key) == RGB:
        return _difference({key: one}, {key: other}) is None
    return np.array_equal(one, other, equal_nan=True)


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> str | None:
    """The first observation that differs by more than rounding, pictures by more than a renderer's noise."""
    for key, value in one.items():
        apart = np.abs(value.astype(np.float64) - other[key].astype(np.float64))
        rounding = 1.0 if base_modality(key) == RGB else 1e-5 * max(1.0, float(np.abs(value).max(initial=0.0)))
        if apart.size and (apart.mean() if base_modality(key) == RGB else apart.max()) > rounding:
            return key
    return None
