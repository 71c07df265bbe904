"""Evaluate a checkpoint from fixed, held-out initial states.

    python experiments/evaluate_vla.py                                            # the shipped checkpoint
    python experiments/evaluate_vla.py --split all                                # how it generalises
    python experiments/evaluate_vla.py --checkpoint=runs/<run folder>             # where a training run ended
    python experiments/evaluate_vla.py --checkpoint=weights.safetensors --config=my.json --trainer.num_eval_episodes=64

A run folder, or a checkpoint in it, brings its own configuration; bare weights take it from --config, by default
experiments/configs/pick_place.json. Flags win over both. Writes episodes.jsonl, summary.json (the metrics of the first
split, of every split under "splits", and what was evaluated under "evaluated") and a video grid per split. An initial
state has the same id in every split.
A run folder from elsewhere that names code outside of this project asks for --trust.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import answering  # noqa: F401

import torch
from assembling import choose_device
from building import load_trained, make_model, make_policy
from configuration import DEFAULT_CONFIG, EvaluationConfig, split_flag
from resuming import load_run

from envs import make_env, splits_of
from research.config import TrainerConfig
from research.errors import NonFiniteError, SimulatorFailed, UserError
from research.option_parser import split_questions
from research.options import parse_config
from research.progress_bar import ProgressBar
from research.runs.folder import RunFolder, append_rows, write_json
from research.runs.video import video_grid, write_video
from research.schema import OBSERVATION
from research.training.evaluation import Evaluation, evaluate, shares_of_tasks
from research.training.host_memory import keep_freed_memory
from research.training.threads import choose_threads


def main(argv: list[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (NonFiniteError, SimulatorFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(argv: list[str]) -> int:
    argv, trusted = split_flag(argv, "--trust")
    config, trained = parse_config(EvaluationConfig, split_questions(argv)[0], start=DEFAULT_CONFIG), None
    if config.checkpoint and (run := RunFolder.containing(config.checkpoint)).is_run:
        config = parse_config(EvaluationConfig, [f"--config={run.config}", *argv], __doc__)
        trained = load_run(config.checkpoint, config, trusted)
    else:
        config = parse_config(EvaluationConfig, argv, __doc__, DEFAULT_CONFIG)
    if config.checkpoint and trained is None:
        config.policy.vla_config.model_path = config.checkpoint
    if config.film < 0 or config.first_state < 0:
        raise UserError("film and first_state are at least 0")
    trainer, output = config.trainer, Path(config.output)
    if RunFolder(output).is_run:
        raise UserError(f"output: {output} is a training run's own folder, with its evaluations; name a folder in it")

    device = choose_device(trainer.device)
    torch.set_num_threads(choose_threads(trainer.threads)[0])  # those of the run, where it is one: the same results
    keep_freed_memory()
    num_envs = min(trainer.num_eval_envs, trainer.num_eval_episodes)
    envs = {
        split: make_env(trainer.env, num_envs, options, device, seed=trainer.seed)
        for split, options in options_of_splits(trainer, config.split).items()
    }
    first = next(iter(envs.values()))
    observations, action_shape = first.observation_spec[OBSERVATION].zero()[:2], first.action_spec.shape[1:]
    # Frozen as in training, where frozen stages run at other batch shapes and layers may have adapters.
    choices, action_map = getattr(first, "action_choices", None), getattr(first, "action_map", None)
    model = make_model(config, observations, action_shape, device, trained is not None, choices, action_map).model
    if trained is not None:
        load_trained(model, trained)
    policy = make_policy(config, model, observations, action_shape, choices)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write to {output}: {error.strerror}") from error

    states = range(config.first_state, config.first_state + trainer.num_eval_episodes)
    if states.stop > first.held_out:
        print(f"note: training draws initial states from {first.held_out} on; those evaluated end at {states.stop - 1}")
    if unequal := shares_of_tasks(getattr(first, "task_names", ()), states, "trainer.num_eval_episodes"):
        print(f"note: {unequal}")
    written = RunFolder(output).episodes, RunFolder(output).summary, *output.glob("evaluation*.mp4")
    for old in written:  # none of them speaks of the others' episodes
        old.unlink(missing_ok=True)
    metrics = {}
    for split, env in envs.items():
        with ProgressBar(total=len(states), unit="episode", desc=split, disable=not trainer.progress_bar) as bar:
            progress = lambda done: bar.update(done - bar.n)  # noqa: E731
            result = evaluate(env, policy.act, states, config.film, trainer.max_eval_steps, progress, trainer.eval_mode)
        env.close()
        print(f"{split:<10}{result.summary()}" if split else result.summary())
        metrics[split] = result.metrics()
        append_rows(RunFolder(output).episodes, result.rows(**({"split": split} if split else {})))
        write_film(result, output / ("evaluation.mp4" if len(envs) == 1 else f"evaluation_{split}.mp4"))
    facts = {"checkpoint": config.checkpoint or config.policy.vla_config.model_path, **next(iter(metrics.values()))}
    if None not in metrics:
        facts["splits"] = metrics
    facts["evaluated"] = what_was_evaluated(trainer, trained)
    write_json(RunFolder(output).summary, facts)
    print(f"episodes, summary{' and video' if result.frames else ''} in {output}/")
    return 0


def what_was_evaluated(trainer: TrainerConfig, trained: dict[str, Any] | None) -> dict[str, Any]:
    """What `compare_runs.py` asks of evaluations: the question, and the checkpoint, None for weights of no run."""
    facts = {name: getattr(trainer, name) for name in ("env", "env_config", "eval_mode", "max_eval_steps")}
    checkpoint = {"env_steps": None, "weights_sha256": None}
    if trained is not None:
        checkpoint["env_steps"] = trained.get("progress", trained).get("global_step")
        checkpoint["weights_sha256"] = trained["sha256"]
    return facts | checkpoint


def options_of_splits(trainer: TrainerConfig, wanted: str | None) -> dict[str | None, dict]:
    """The environment's options for each split to evaluate; {None: options} for an environment without splits."""
    known = splits_of(trainer.env)
    if wanted is None:
        return {trainer.env_config.get("split", "train") if known else None: trainer.env_config}
    if not known:
        raise UserError(f"split: the environment {trainer.env} has no splits; leave out --split")
    if wanted not in ("all", *known):
        raise UserError(f"split: {wanted!r} is not one of all, {', '.join(known)}")
    return {split: trainer.env_config | {"split": split} for split in (known if wanted == "all" else (wanted,))}


def write_film(result: Evaluation, path: Path) -> None:
    """Write the filmed episodes as a grid, framed in green or red; nothing if none were filmed."""
    if result.frames:
        grid = video_grid(result.frames, columns=4, success=result.filmed_success, captions=result.captions)
        write_video(grid, path, fps=10)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
