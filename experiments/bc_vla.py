"""Imitation: train a VLA on an expert's demonstrations, and regress its value head on the returns that were seen.

    python experiments/bc_vla.py                                  # as the checkpoint of the repository was made
    python experiments/bc_vla.py --stop_at=1 --output=my.pt       # imitates to the end: a better one
    python experiments/bc_vla.py --config experiments/configs/metaworld_bc.json
    python experiments/bc_vla.py --config my.json --demonstrations=path/to/a/lerobot/dataset --model_path=pretrained.pt
    python experiments/bc_vla.py --config my.json --dry_run       # what that would need; nothing is trained

Demonstrations are the environment's own, where it has an expert, or those of a LeRobot data set. The environment's
expert acts with noise, so that the data shows how to recover; what is imitated is what it would have done without.

By default, first the model learns to point at what an instruction names, on many scenes without actions, as the
vision-language models within large VLAs have; then it imitates the expert, and stops half-way: reinforcement learning
is to do the rest. (Success jumps to nine tenths within a few hundred steps, so it is watched, on states of its own.)

Ids of initial states below 10000 (LIBERO: below 10 times its tasks) are never drawn in training. Of these, evaluation
takes those from 0 on, what watches imitation those from 5000 on, and an expert that plays whole episodes those from
`first_state` on.

Writes the weights, and beside them the configuration and the success that was measured, and its episodes as .jsonl. A
model whose encoders come from elsewhere is written as .safetensors, without those that did not change.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import answering  # noqa: F401

import torch
from assembling import choose_device
from building import constructor_arguments, refuse_otherwise, what_follows, where_it_is, with_files
from configuration import split_flag
from dry_run import dry_run_imitation
from ends import said
from tensordict import TensorDict
from torch import nn
from torchrl.envs import EnvBase

from agents.checking import check_policy
from agents.loading import load_vla_model
from agents.normalisation import tell_action_map
from agents.policy import VLAPolicy
from agents.provided_weights import save_trained
from envs import make_env
from envs.demonstrating import Disturbance
from envs.vector import VectorEnv
from research.action_map import ActionMap
from research.errors import NonFiniteError, SimulatorFailed, UserError
from research.imitation.cloning import (
    can_imitate,
    check_loss,
    clone,
    normalise,
    planned_steps,
    with_frozen_features,
)
from research.imitation.config import BCConfig
from research.imitation.demonstrations import check_fits, count_by_task, count_samples, only_successful, samples_of
from research.imitation.experts import check_states, collect_rollout
from research.imitation.lerobot import read_dataset, scale_actions
from research.imitation.pointing import check_can_point, learn_to_point
from research.options import parse_config, to_dict
from research.progress_bar import ProgressBar
from research.runs.folder import replace_file, replace_rows, replacing
from research.schema import OBSERVATION, Demonstration
from research.training.evaluation import evaluate, shares_of_tasks
from research.training.freezing import freeze
from research.training.host_memory import keep_freed_memory

WATCHED_STATES = 5000  # and those after it


def open_env(config: BCConfig, num_envs: int, executed: int = 1, seed: int = 0) -> EnvBase:
    chunk = {"chunk": executed} if executed > 1 else {}
    try:
        return make_env(config.env, num_envs, config.env_config | chunk, config.device, seed=seed)
    except UserError as error:  # which knows the options by their names in a training run
        raise UserError(re.sub(r"\btrainer\.(?=env|num_envs|seed)", "", str(error))) from error


def collect(env: EnvBase, config: BCConfig, horizon: int) -> tuple[TensorDict, dict[str, Any]]:
    """What the environment's expert does, as samples, and facts about it."""
    if isinstance(env, VectorEnv):
        return prepare(record_demonstrations(env, config), config, horizon)
    source = open_env(config, config.num_envs, seed=config.seed)
    options = config.noise, config.gripper_noise, horizon, config.executed, config.gamma
    return collect_rollout(source, config.samples, *options), {}


def record_demonstrations(env: VectorEnv, config: BCConfig) -> list[Demonstration]:
    """Whole episodes of the expert, as many of each task."""
    count = config.episodes * max(1, len(env.task_names))
    states = range(config.first_state, config.first_state + count)
    watched = {"watch_episodes": watched_states(config)} if config.stop_at < 1 else {}
    check_states(states, {"eval_episodes": range(config.eval_episodes), **watched}, env.held_out)
    disturbance = Disturbance(config.noise, config.noise_probability, config.wander)
    with ProgressBar(total=count, desc="demonstrations", unit="episode") as bar:
        progress = lambda done: bar.update(done - bar.n)  # noqa: E731
        return env.demonstrate(states, config.executed, disturbance, config.seed, progress)


def prepare(demonstrations: list[Demonstration], config: BCConfig, horizon: int) -> tuple[TensorDict, dict[str, Any]]:
    """Whole episodes as samples, and how many there are of each task."""
    kept = only_successful(demonstrations) if config.only_successful else demonstrations
    data = samples_of(kept, horizon, config.executed, config.gamma).to(config.device)
    return data, {"demonstrations": count_by_task(demonstrations)}


def action_shape_of(config: BCConfig, action_dim: int) -> tuple[int, ...]:
    return (action_dim,) if config.executed == 1 else (config.executed, action_dim)


def build_model(
    config: BCConfig,
    observations: TensorDict,
    action_dim: int,
    choices: Any = None,
    action_map: ActionMap | None = None,
    load: Callable = load_vla_model,
) -> nn.Module:
    """The model as it starts; what follows from the observations need not be said."""
    named, shape = constructor_arguments(config.model_class), action_shape_of(config, action_dim)
    refuse_otherwise("model_config", config.model_config, observations, shape)
    told = what_follows(observations, shape, choices, named, config.horizon) | with_files(config.model_config)
    torch.manual_seed(config.seed)
    model = load(where_it_is(config.model_path), config.model_class, told, config.device, expect_fresh=True)
    tell_action_map(model, action_map)
    if not can_imitate(model):
        raise UserError(
            "model_class: imitation needs stages, and action_distribution or imitation_loss, which "
            f"{config.model_class} lacks"
        )
    if config.freeze != "none":
        try:
            freeze(model, config.freeze)
        except UserError as error:  # which knows the option by its name in a training run
            raise UserError(str(error).removeprefix("policy.")) from error
    if getattr(model, "provided_weights", {}) and Path(config.output).suffix != ".safetensors":
        raise UserError(
            f"output: {config.output} should end in .safetensors, the format in which the encoders that "
            f"{type(model).__name__} is given are left out"
        )
    return model


def watched_states(config: BCConfig) -> range:
    return range(WATCHED_STATES, WATCHED_STATES + config.watch_episodes)


def stop_when_good_enough(env: EnvBase | None, policy: VLAPolicy, config: BCConfig) -> Callable[[int, float], bool]:
    """What `clone` asks after each step: whether the policy succeeds often enough, over states of its own."""
    if env is None or config.stop_at == 1:
        return lambda step, loss: False
    if not isinstance(env, VectorEnv):
        env = open_env(config, min(config.watch_episodes, config.num_envs), config.executed)

    measured = True

    def stop(step: int, loss: float) -> bool:
        nonlocal measured
        if step % config.watch_every or not measured:
            return False
        metrics = evaluate(env, policy.act, watched_states(config), max_steps=config.max_eval_steps).metrics()
        if not (measured := "eval/success_rate" in metrics):
            ProgressBar.write(f"stop_at: {config.env} has no success, which would end imitation; it goes on to its end")
            return False
        success = metrics["eval/success_rate"]
        ProgressBar.write(f"step {step}: imitation loss {loss:.4f}, success {success:.2f}")
        return success >= config.stop_at

    return stop


def check_output(output: Path) -> None:
    """Refuse, before anything is computed, a file that could not be written, and make its folder."""
    if output.suffix in (".json", ".jsonl") or output.is_dir() or not output.name:
        raise UserError(f"output: {output} should be a file of weights, .pt or .safetensors; its facts go beside it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"output: {output} cannot be written: {said(error)}") from error


def main(argv: list[str] | None = None) -> int:
    argv, dry = split_flag(sys.argv[1:] if argv is None else argv, "--dry_run")
    config = parse_config(BCConfig, argv, __doc__)
    config = replace(config, device=str(choose_device(config.device, "device")))
    start = time.monotonic()
    keep_freed_memory()
    recorded, facts, env = [], {}, None
    if config.demonstrations:
        recorded = read_dataset(Path(config.demonstrations), config.lerobot)
        observations, action_dim = samples_of(recorded[:1], 1, 1, 1.0)[OBSERVATION], recorded[0].actions.shape[1]
    if config.eval_episodes:
        env = open_env(config, min(64, config.num_envs, config.eval_episodes), config.executed)
        offered, offered_dim = env.observation_spec[OBSERVATION].zero(), env.action_spec.shape[-1]
        if recorded:
            check_fits(observations, action_dim, offered, offered_dim)
        observations, action_dim = offered, offered_dim
    if not recorded and not getattr(env, "has_expert", False):
        raise UserError(f"env: {config.env} has no scripted expert to imitate")
    action_map = getattr(env, "action_map", None)
    if recorded:
        recorded, facts = scale_actions(recorded, config.lerobot.action_stats, action_map)
    build = partial(build_model, config, observations, action_dim, getattr(env, "action_choices", None), action_map)
    if dry:
        unknown = 0 if isinstance(env, VectorEnv) else config.samples  # before the expert has played nobody knows
        samples, shape = count_samples(recorded) or unknown, action_shape_of(config, action_dim)
        return dry_run_imitation(build, config, config.freeze, samples, observations, shape, config.device)
    check_output(Path(config.output))
    model = build()
    policy = VLAPolicy(model)
    action_shape = action_shape_of(config, action_dim)
    horizon = planned_steps(model, action_shape)
    check_loss(policy, observations[:2], (horizon, action_dim), config.loss)
    if config.pointing_steps:
        check_can_point(model, open_env(config, 2, seed=config.seed + 1) if env is None else env)
    data, more = prepare(recorded, config, horizon) if recorded else collect(env, config, horizon)
    check_policy(policy, data[OBSERVATION][:2], action_shape)
    if not config.model_path:  # which has statistics
        normalise(model, data)
    if config.pointing_steps:
        scenes = open_env(config, config.batch_size, seed=config.seed + 1)
        learn_to_point(model, scenes, config.pointing_steps, config.learning_rate, config.schedule)
    data = with_frozen_features(policy, data)
    unequal = shares_of_tasks(getattr(env, "task_names", ()), range(config.eval_episodes), "eval_episodes")
    if unequal:
        print(f"note: {unequal}")
    interrupted = False
    try:
        clone(model, policy.rest, data, config, stop_when_good_enough(env, policy, config))
    except KeyboardInterrupt:
        interrupted = True
        print("stopped: the weights are written as they are, and not evaluated")
    settings = to_dict(config) | {"output": Path(config.output).name}  # not where on this machine
    facts |= {"config": settings, "samples": len(data), **more}
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write(model, Path(config.output), settings, facts)  # what was learned is there, whatever becomes of its evaluation
    episodes: list[dict[str, Any]] = []
    for mode, prefix in (("mode", "eval"), ("sample", "eval_sample")) if env is not None and not interrupted else ():
        result = evaluate(env, policy.act, range(config.eval_episodes), max_steps=config.max_eval_steps, mode=mode)
        print(f"{mode}: {result.summary()}")
        facts |= {name.replace("eval", prefix, 1): value for name, value in result.metrics().items()}
        episodes += result.rows(mode=mode)
    write_facts(Path(config.output), facts | {"seconds": round(time.monotonic() - start, 1)})
    if episodes:
        replace_rows(Path(config.output).with_suffix(".jsonl"), episodes)
    print(f"{time.monotonic() - start:.0f} s; weights in {config.output}")
    return 130 if interrupted else 0


def write(model: nn.Module, output: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """The weights, and beside them the facts, to which it adds hashes of what the weights leave out."""
    try:
        with replacing(output, "wb") as file:
            if output.suffix == ".safetensors":
                facts["provided_weights"] = save_trained(model, Path(file.name))
            else:
                torch.save({"model_state_dict": model.state_dict(), "config": settings}, file)
        write_facts(output, facts)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written: {said(error)}") from error


def write_facts(output: Path, facts: dict[str, Any]) -> None:
    replace_file(output.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, NonFiniteError, SimulatorFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("stopped before there was anything to write", file=sys.stderr)
        sys.exit(130)
