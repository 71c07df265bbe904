"""Evaluate a checkpoint from fixed, held-out initial states.

    python experiments/evaluate_vla.py                                            # the shipped checkpoint
    python experiments/evaluate_vla.py --checkpoint=runs/<run folder>             # where a training run ended
    python experiments/evaluate_vla.py --checkpoint=weights.safetensors --config=my.json --trainer.num_eval_episodes=64

A run folder, or a checkpoint in it, brings its own configuration; bare weights take it from --config, by default
experiments/configs/pick_place.json. Flags win over both. Writes episodes.jsonl, summary.json and a video grid.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from ppo_vla import choose_device, load_model, with_default_config
from tqdm import tqdm

from agents.policy import VLAPolicy, check_policy
from envs import make_env
from research.config import ExperimentConfig, parse_config
from research.evaluation import evaluate, write_episodes
from research.freezing import freeze
from research.schema import OBSERVATION, UserError
from research.video import video_grid, write_video


@dataclass
class EvaluationConfig(ExperimentConfig):
    """An evaluation: the configuration of a training run, and where to read and write."""

    checkpoint: str | None = None
    """Run folder, training checkpoint or weights; none = policy.vla_config.model_path of the configuration."""
    output: str = "evaluation"
    """Folder for episodes.jsonl, summary.json and evaluation.mp4."""
    first_state: int = 0
    """Id of the first initial state; below 10000 no training run has seen it."""
    film: int = 16
    """Episodes in the video; 0 = none."""


def main(argv: list[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(argv: list[str]) -> int:
    config = parse_config(EvaluationConfig, with_default_config(argv), __doc__)
    vla = config.policy.vla_config
    if config.checkpoint and (own := run_folder_of(Path(config.checkpoint))):
        config = parse_config(EvaluationConfig, [f"--config={own / 'config.json'}", *argv], __doc__)
        path = Path(config.checkpoint)
        vla = config.policy.vla_config
        vla.model_path = str(path / "checkpoints" / "last.pt" if path.is_dir() else path)
        vla.strip_prefix = vla.add_prefix = None  # they were for the weights that the run started from
    elif config.checkpoint:
        vla.model_path = config.checkpoint
    if config.film < 0 or config.first_state < 0:
        raise UserError("film and first_state are at least 0")
    trainer, output = config.trainer, Path(config.output)

    device = choose_device(trainer.device)
    num_envs = min(trainer.num_eval_envs, trainer.num_eval_episodes)
    env = make_env(trainer.env, num_envs, trainer.env_config, device, seed=trainer.seed)
    model, scope = load_model(config, device)
    model.eval()
    freeze(model, scope, lora=config.policy.lora)  # as in training, where frozen stages run at other batch shapes
    policy = VLAPolicy(model, config.policy.feature_reuse)
    check_policy(policy, env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[-1])
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write to {output}: {error.strerror}") from error

    states = range(config.first_state, config.first_state + trainer.num_eval_episodes)
    with tqdm(total=len(states), unit="episode", disable=not trainer.progress_bar) as bar:
        progress = lambda done: bar.update(done - bar.n)  # noqa: E731
        result = evaluate(env, policy.act, states, config.film, trainer.max_eval_steps, progress)
    (output / "episodes.jsonl").unlink(missing_ok=True)
    write_episodes(output / "episodes.jsonl", result.episodes)
    facts = {"checkpoint": vla.model_path, **result.metrics()}
    (output / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(result.summary())
    if result.frames:
        success = [bool(e.success) for e in result.episodes[: len(result.frames)]] if result.has_success else None
        write_video(video_grid(result.frames, columns=4, success=success), output / "evaluation.mp4", fps=10)
    print(f"episodes, summary{' and video' if result.frames else ''} in {output}/")
    env.close()
    return 0


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a path is, or lies in as a checkpoint; None for bare weights."""
    folder = path if path.is_dir() else path.parent.parent
    return folder if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir() else None


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
