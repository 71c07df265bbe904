"""Film what training changed: the same initial states with the policy that a run started from, and where it ended.

    python experiments/before_after.py runs/<run folder>                           # before_after.gif, states 0 to 3
    python experiments/before_after.py runs/<run folder> --states 1 4 8 --output=my.mp4

The start is made as the run made it: from the file that it names, or drawn anew from the run's seed. The first row is
before, the second after; a frame in green or red and a line of text say how each episode went. The
ending of --output is .gif, for a page that plays no videos, or .mp4.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import packages  # noqa: F401

import numpy as np
from assembling import choose_device, seed_everything, start_of
from building import load_trained, make_policy
from resuming import load_run
from torch import nn
from torchrl.envs import EnvBase

from envs import make_env
from research.config import ExperimentConfig, TrainerConfig
from research.errors import NonFiniteError, SimulatorFailed, UserError, one_line
from research.options import parse_config
from research.runs.folder import RunFolder
from research.runs.video import video_grid, write_gif, write_video
from research.training.audit import load_trained_state
from research.training.evaluation import Evaluation, evaluate

LARGEST_STATE = 2**32 - 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, or a checkpoint in it")
    parser.add_argument("--states", type=int, nargs="+", default=[0, 1, 2, 3], metavar="ID", help="initial states")
    parser.add_argument("--output", default="before_after.gif", help="file to write, .gif or .mp4")
    parser.add_argument("--fps", type=float, default=10.0, help="frames per second of the film, default 10")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="keep every Nth frame, and the last")
    parser.add_argument("--trust", action="store_true", help="run code that a run folder from elsewhere names")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        write = {".gif": write_gif, ".mp4": write_video}.get(Path(options.output).suffix)
        if write is None:
            raise UserError(f"--output: {options.output} should end in .gif or .mp4")
        if options.every < 1:
            raise UserError(f"--every: is {options.every}, should be at least 1")
        if not 0 < options.fps < float("inf"):
            raise UserError(f"--fps: is {options.fps}, should be above 0")
        episodes = film(options.run, options.states, options.trust)
        frames = side_by_side(*episodes)
        write(np.concatenate([frames[: -1 : options.every], frames[-1:]]), options.output, options.fps)
    except (UserError, NonFiniteError, SimulatorFailed) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    for when, result in zip(("before", "after"), episodes, strict=True):
        print(f"{when:<8}{result.summary()}")
    print(f"film in {options.output}")
    return 0


def film(checkpoint: str, states: Sequence[int], trusted: bool) -> tuple[Evaluation, Evaluation]:
    """Episodes from these states with the start of a run and with its checkpoint, each filmed.

    Raises:
        UserError: there is no such run, its start cannot be made here, no such states, or nothing to film.
        SimulatorFailed, NonFiniteError: as `evaluate`.
    """
    if wrong := [state for state in states if not 0 <= state <= LARGEST_STATE]:
        raise UserError(f"--states: {wrong[0]} is no initial state; they are numbered from 0 to {LARGEST_STATE}")
    folder = RunFolder.containing(checkpoint)
    if not folder.is_run:
        raise UserError(f"{checkpoint} is neither a run folder nor a checkpoint in one")
    config = parse_config(ExperimentConfig, [f"--config={folder.config}"])
    trainer = config.trainer
    trained = load_run(checkpoint, copy.deepcopy(config), trusted)  # which may need no start, and takes it out
    device = choose_device(trainer.device)
    start = start_of(config, device)
    start.env.close()
    model = start.built.model
    refuse_another_start(model, trained)
    env = env_to_film(trainer, states, device)
    results = []
    for weights in (None, trained):
        if weights is not None:
            load_trained(model, weights)
        policy = make_policy(config, model, start.few, start.action_shape, start.choices)
        seed_everything(trainer.seed)  # what draws its actions draws alike before and after
        results.append(evaluate(env, policy.act, states, len(states), trainer.max_eval_steps, mode=trainer.eval_mode))
    env.close()
    return results[0], results[1]


def refuse_another_start(model: nn.Module, trained: Mapping[str, Any]) -> None:
    """Refuse a start whose frozen weights are not those that the run had.

    Args:
        model: as the run started, it is thought.
        trained: a checkpoint of the run, with the hashes of what was frozen.
    Raises:
        UserError: so it is.
    """
    try:
        load_trained_state(model, {}, trained.get("audit", {}))
    except UserError as error:
        raise UserError(
            "the policy that the run started from cannot be made here, as its file, its code or what draws its weights "
            f"has changed: {error}"
        ) from error


def env_to_film(trainer: TrainerConfig, states: Sequence[int], device: Any) -> EnvBase:
    """A row for each of these initial states; refused where there is nothing to see."""
    env = make_env(trainer.env, len(states), trainer.env_config, device, seed=trainer.seed)
    if max(states) >= env.held_out:
        print(f"note: training draws initial states from {env.held_out} on; {max(states)} may be one of them")
    env.reset()
    if getattr(env, "render_frames", lambda size: None)(16) is None:
        env.close()
        raise UserError(f"trainer.env: {trainer.env} has nothing to film")
    return env


def side_by_side(before: Evaluation, after: Evaluation) -> np.ndarray:
    """A column for each episode, before above after; uint8 `[T, H, W, 3]`."""
    captions = [
        (f"{when}: {about}", outcome)
        for when, result in (("before", before), ("after", after))
        for about, outcome in result.captions
    ]
    success = before.filmed_success and [*before.filmed_success, *after.filmed_success]
    return video_grid([*before.frames, *after.frames], len(before.frames), success, captions=captions)


if __name__ == "__main__":
    sys.exit(main())
