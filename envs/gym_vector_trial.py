"""What a Gymnasium vector environment's first episodes tell, as `envs.gym_trial` does for a single environment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.failures import blame, describe, warn_once
from envs.gym_info import look_up, never_reported, reported_key
from envs.gym_spaces import read_source
from envs.gym_trial import (
    PROBED_IDS,
    PROBED_S,
    PROBED_STEPS,
    all_alike,
    not_reproducible,
    reward_not_reproducible,
    rewards_differ,
)
from research.errors import UserError


class VectorTrial:
    """The part of `envs.gym_vector.GymVectorEnv` that tries itself out while it is made."""

    def _try_out(self, ids_reproducible: bool) -> None:
        """Refuse rows that cannot be started one by one, and ids that do not decide the state."""
        n = self.batch_size[0]
        seeds = list(range(n))
        observation, info = self._first_reset(seeds)
        self._read_texts(info, np.arange(n))
        parts = [read_source(observation, part, self.name) for key in self.recipe.sources.values() for part in key]
        self._tensor_device = next((part.device for part in parts if isinstance(part, Tensor)), None)
        first = self._observe(observation)
        with blame(f"{self.name}: step()"):
            observation, reward, *_ = self.vector.step(self._native(torch.zeros(n, self._actions.size)))
            reward = self._own(reward, torch.float64).reshape(n)
        if n > 1:
            self._check_masks(self._observe(observation))
            others = {key: value[1:] for key, value in first.items()}
        else:
            others = self._started([1])  # something else before the same seed again
        again = self._started(seeds)
        if ids_reproducible:
            if changed := _first_difference(first, again):
                raise not_reproducible(self.name, changed)
            with blame(f"{self.name}: step()"):
                _, second, *_ = self.vector.step(self._native(torch.zeros(n, self._actions.size)))
                second = self._own(second, torch.float64).reshape(n)
            for one, other in zip(reward.tolist(), second.tolist(), strict=True):
                if rewards_differ(one, other):
                    raise reward_not_reproducible(self.name, one, other)
            changed = _first_difference(first, {key: v.flip(0) for key, v in self._started(seeds[::-1]).items()})
            if changed:
                raise self._refusal(
                    f"does not start a row from its own seed alone: {changed!r} differs when the same seeds start "
                    "other rows, so that initial states have no ids"
                )
        self.distinct_states = _first_difference(others, {k: v[:1].expand_as(others[k]) for k, v in first.items()})
        self.distinct_states = self.distinct_states is not None
        if not self.distinct_states:
            warn_once(all_alike(self.name))

    def _started(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        with blame(f"{self.name}: reset(seed=[...])"):
            observation, info = self.vector.reset(seed=list(seeds))
        self._read_texts(info, np.arange(len(seeds)))
        return self._observe(observation)

    def _find_success(self) -> None:
        """Complete the recipe by what reports success, as `envs.gym_trial` does for a single environment.

        Where an episode ends, it is tried whether its row is left alone; Gymnasium's own loop does so.
        """
        n, name, generator = self.batch_size[0], self.name, np.random.default_rng(0)
        tried, found = self.recipe.spec.vector_entry_point is None, self.recipe.success_return is not None
        if tried and found:
            return
        terminations_tried = False
        states = iter(np.resize(PROBED_IDS, 2 * n * PROBED_STEPS).tolist())
        self._reset_rows(np.arange(n), [next(states) for _ in range(n)])
        until, steps, episodes, ended = time.monotonic() + PROBED_S, 0, 0, None
        while episodes < len(PROBED_IDS) and steps < PROBED_STEPS and time.monotonic() < until:
            actions = torch.from_numpy(self._actions.sample(generator, (n,)))
            with blame(f"{name}: step()"):
                *_, terminated, truncated, info = self.vector.step(self._native(actions))
                truncated = self._own(truncated, torch.bool).reshape(n)
                done = self._own(terminated, torch.bool).reshape(n) | truncated
            steps += 1
            key = self.recipe.success_key or reported_key(info)
            if not found and key is not None and look_up(info, key) is not None:
                self.recipe, found = replace(self.recipe, success_key=key, success_seen=True), True
                self._reported_success(info)  # refuses what is no success
                if tried:
                    return
            if done.any():
                rows, ended = done.nonzero()[:, 0].cpu().numpy(), info
                episodes += len(rows)
                if not tried and (truncated.any() or not terminations_tried):
                    self._check_ended(done, truncated)
                    tried, terminations_tried, rows = bool(truncated.any()), True, np.arange(n)
                if tried and found:
                    return
                self._reset_rows(rows, [next(states) for _ in rows])
        if found:
            return
        if self.recipe.success_key is not None and ended is not None:
            raise never_reported(name, self.recipe.success_key, ended)

    def _check_ended(self, done: Tensor, truncated: Tensor) -> None:
        """Step once more: a row whose time was up, bool `[N]`, and whose episode goes on has begun anew by itself.

        One that was left alone ends again, or refuses to be stepped. What ended for another reason (`done`) may go on
        nevertheless, if it moves out of the state that ended it: that is said. All rows have to start afterwards.
        """
        n = self.batch_size[0]
        try:
            *_, one, other, _ = self.vector.step(self._native(torch.zeros(n, self._actions.size)))
            again = self._own(one, torch.bool).reshape(n) | self._own(other, torch.bool).reshape(n)
        except Exception:  # whatever it says to that, it did not begin anew
            again = done
        if (truncated & ~again).any():
            raise UserError(
                f"trainer.env: {self.name} resets its rows by itself, though its metadata say AutoresetMode.DISABLED: "
                "a row that was truncated went on at the next step; it has to leave such rows alone until "
                "reset(options={'reset_mask': ...}) names them"
            )
        if (done & ~again).any():
            warn_once(
                f"{self.name}: a row that was terminated went on at the next step; if it had been reset by then, what "
                "is seen at the ends of episodes is wrong"
            )

    def _first_reset(self, seeds: list[int]) -> tuple[Any, dict[str, Any]]:
        try:
            return self.vector.reset(seed=seeds)
        except Exception as error:
            with blame(f"{self.name}: reset(seed=0)"):
                self.vector.reset(seed=0)  # raises what has nothing to do with several seeds
            raise self._refusal(
                f"cannot start every row from a seed of its own: reset(seed=[...]) {describe(error)}"
            ) from error

    def _check_masks(self, before: dict[str, Tensor]) -> None:
        """Start row 0 again; the other rows have to stay as they were before."""
        n, what = self.batch_size[0], "cannot reset some rows and leave the others as they are"
        mask = np.arange(n) == 0
        try:
            observation, _ = self.vector.reset(seed=[n, *[None] * (n - 1)], options={"reset_mask": mask})
        except Exception as error:
            raise self._refusal(f"{what}: reset(options={{'reset_mask': ...}}) {describe(error)}") from error
        after = self._observe(observation)
        changed = _first_difference({k: v[1:] for k, v in before.items()}, {k: v[1:] for k, v in after.items()})
        if changed:
            raise self._refusal(f"{what}: {changed!r} changed in rows that options['reset_mask'] leaves out")

    def _refusal(self, problem: str) -> UserError:
        single = f"; gym:{self.name.partition(':')[2]} steps single environments instead"
        return UserError(f"trainer.env: {self.name} {problem}{single if self.recipe.spec.entry_point else ''}")


def _first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """The first observation key whose values differ by more than rounding, if there is one."""
    for key, value in one.items():
        same = torch.allclose if value.is_floating_point() else torch.equal
        if not (same(value, other[key], equal_nan=True) if same is torch.allclose else same(value, other[key])):
            return key
    return None
