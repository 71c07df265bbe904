"""How far a run has come: what is due when, and that it survives a checkpoint."""

from __future__ import annotations

import math

from research.training.algorithm import Progress


def test_what_is_due_every_so_many_env_steps():
    progress, crossed = Progress(iterations=5), []
    while not progress.finished:
        progress.advance(30)
        crossed.append((progress.env_steps, progress.crossed(50)))
    assert crossed == [(30, False), (60, True), (90, False), (120, True), (150, True)]
    assert not progress.crossed(0)  # never
    assert progress.iteration == 5


def test_it_is_saved_and_restored_as_one_thing():
    progress = Progress(iterations=9, iteration=2, env_steps=64, before={"eval/return": 1.0}, best=0.5)
    again = Progress(iterations=20)
    assert again.best == -math.inf
    again.load_state_dict(progress.state_dict())
    assert again == Progress(iterations=20, iteration=2, env_steps=64, before={"eval/return": 1.0}, best=0.5)
    again.advance(64)
    assert again.crossed(128) and not again.finished
