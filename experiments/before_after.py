"""Film what training changed: the same initial states with the policy that a run started from, and where it ended.

    python experiments/before_after.py runs/<run folder>                           # before_after.gif, states 0 to 3
    python experiments/before_after.py runs/<run folder> --states 1 4 8 --output=my.mp4

The first row is before, the second after; a frame in green or red and a line of text say how each episode went. The
ending of --output is .gif, for a page that plays no videos, or .mp4.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import packages  # noqa: F401

import numpy as np
import torch
from assembling import choose_device
from building import load_trained, make_model, make_policy
from resuming import load_run

from envs import make_env
from research.config import ExperimentConfig
from research.errors import UserError, one_line
from research.options import parse_config
from research.runs.folder import RunFolder
from research.runs.video import video_grid, write_gif, write_video
from research.schema import OBSERVATION
from research.training.evaluation import Evaluation, evaluate


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
        episodes = film(options.run, options.states, options.trust)
        frames = side_by_side(*episodes)
        write(np.concatenate([frames[: -1 : options.every], frames[-1:]]), options.output, options.fps)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    for when, result in zip(("before", "after"), episodes, strict=True):
        print(f"{when:<8}{result.summary()}")
    print(f"film in {options.output}")
    return 0


def film(checkpoint: str, states: list[int], trusted: bool) -> tuple[Evaluation, Evaluation]:
    """Episodes from these states with the start of a run and with its checkpoint, each filmed."""
    folder = RunFolder.containing(checkpoint)
    if not folder.is_run:
        raise UserError(f"{checkpoint} is neither a run folder nor a checkpoint in one")
    config = parse_config(ExperimentConfig, [f"--config={folder.config}"])
    trainer, trained = config.trainer, load_run(checkpoint, config, trusted)
    device = choose_device(trainer.device)
    env = make_env(trainer.env, len(states), trainer.env_config, device, seed=trainer.seed)
    observations, action_shape = env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[1:]
    choices = getattr(env, "action_choices", None)
    model = make_model(config, observations, action_shape, device, choices=choices).model
    results = []
    for weights in (None, trained):
        if weights is not None:
            load_trained(model, weights)
        policy = make_policy(config, model, observations, action_shape, choices)
        results.append(evaluate(env, policy.act, states, len(states), trainer.max_eval_steps, mode=trainer.eval_mode))
    env.close()
    if not results[0].frames:
        raise UserError(f"trainer.env: {trainer.env} has nothing to film")
    return results[0], results[1]


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
    torch.manual_seed(0)
    sys.exit(main())
