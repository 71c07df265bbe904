"""From a run folder or a checkpoint to a run that goes on: what may change, what is refused, and what is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assembling import Assembly, seed_everything
from building import load_trained

from envs import foreign_code
from research.config import ExperimentConfig, TrainerConfig, path_problem, split_switches
from research.errors import UserError, describe_error
from research.options import flatten_dict, to_dict
from research.own_packages import OWN_PACKAGES
from research.runs.checkpoint import holds_all_weights, load_checkpoint, restore_rng
from research.runs.folder import RunFolder, read_rows, replace_rows
from research.runs.origin import is_ours
from research.training.algorithm import Progress, another_seed
from research.training.parallel import World

FIXED = (  # what a run keeps for life
    "trainer.env", "trainer.env_config", "trainer.num_envs", "trainer.buffer_size", "trainer.buffer_type",
    "trainer.seed", "policy.freeze", "policy.lora", "policy.residual", "policy.vla_config.adapter_path",
    "policy.vla_config.model_class", "policy.vla_config.model_config", "policy.action_chunk", "algorithm.name",
)  # fmt: skip
UNTOLD = (
    "trainer.resume",
    "trainer.run_dir",
    "trainer.progress_bar",
    "trainer.threads",
    "policy.vla_config.model_path",
)


# ---- which run


def newest_run(trainer: TrainerConfig) -> RunFolder | None:
    """The run folder of this experiment's name whose checkpoint is the newest, if there is one."""
    folders = [RunFolder(path) for path in Path(trainer.run_dir).glob("*")]
    started = [folder for folder in folders if folder.exp_name == trainer.exp_name and folder.last_checkpoint]
    return max(started, key=lambda folder: folder.last_checkpoint.stat().st_mtime, default=None)


def run_of_checkpoint(path: str | Path) -> RunFolder:
    """The run folder that is resumed, and written to: itself, or that of a checkpoint in its `checkpoints/`.

    Raises:
        UserError: there is no such thing, or the checkpoint lies elsewhere, so that nobody knows its run.
    """
    if problem := path_problem(str(path)):
        raise UserError(f"trainer.resume: {problem}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"trainer.resume: there is no {path}; give a run folder, or a checkpoint in one")
    folder = RunFolder.containing(path)
    if not folder.is_run or (path.resolve() != folder.path.resolve() and path.parent != folder.checkpoints):
        raise UserError(
            f"trainer.resume: {path} is neither a run folder nor a checkpoint in one (config.json, checkpoints/); to "
            "start a new run from its weights, give it as policy.vla_config.model_path"
        )
    return folder


def refuse_foreign_code(folder: RunFolder, config: ExperimentConfig, trusted: bool) -> None:
    """Refuse to import what a run folder names, where neither this account wrote it nor the user trusts it.

    Raises:
        UserError: names the code.
    """
    vla = config.policy.vla_config
    named = {"policy.vla_config.model_class": vla.model_class, "trainer.env": foreign_code(config.trainer.env)}
    foreign = {key: code for key, code in named.items() if code and code.split(".")[0] not in OWN_PACKAGES}
    if vla.trust_checkpoint:
        foreign["policy.vla_config.trust_checkpoint"] = "true"
    if foreign and not trusted and not is_ours(folder):
        what = ", ".join(f"{key} = {code}" for key, code in foreign.items())
        raise UserError(
            f"{folder.config} was not written here, or was changed since, and would run code: {what}; look at it, and "
            "say --trust if you trust it"
        )


# ---- what changes


def load_resumed(config: ExperimentConfig) -> dict | None:
    """The checkpoint of `trainer.resume`, or None; says what the run does otherwise than before.

    Raises:
        UserError: there is none, or something that a run cannot change was changed.
    """
    if not config.trainer.resume:
        return None
    run_of_checkpoint(config.trainer.resume)
    state = load_checkpoint(config.trainer.resume)
    progress = Progress(config.trainer.iterations, max_env_steps=config.trainer.max_env_steps)
    with _refusing_misfits(state):
        progress.load_state_dict(state.get("progress", state))
        lines = changes_of_resuming(state["config"], config, progress)
    for line in lines:
        print(line)
    return state


def load_run(checkpoint: str, config: ExperimentConfig, trusted: bool) -> dict:
    """A checkpoint of a run, for whoever needs the policy alone; `config` is the run's, and takes what it needs of it.

    Raises:
        UserError: as `load_checkpoint`, or the run names code from elsewhere.
    """
    refuse_foreign_code(RunFolder.containing(checkpoint), config, trusted)
    state = load_checkpoint(checkpoint)
    if holds_all_weights(state):
        config.policy.vla_config.model_path = None
    return state


def changes_of_resuming(stored: Mapping[str, Any], config: ExperimentConfig, progress: Progress) -> list[str]:
    """What a resumed run does otherwise than it was started with, a line each.

    Args:
        stored: the configuration in the checkpoint, nested.
        config: the one that the run goes on with.
        progress: how far it has come.
    Raises:
        UserError: something that a run cannot change, or a shorter run than what it has done.
    """
    now, policy = to_dict(config), stored["policy"]
    # Earlier runs kept switches of the model beside the scope.
    freeze, model_config = split_switches(policy["freeze"], policy["vla_config"]["model_config"])
    vla = {**policy["vla_config"], "model_config": model_config}
    stored = {**stored, "policy": {**policy, "freeze": freeze, "vla_config": vla}}
    for key in FIXED:
        was, is_now = _entry(stored, key), _entry(now, key)
        if was is not None and was != is_now:
            raise UserError(
                f"{key}: the run to resume has {was!r}, not {is_now!r}; a run keeps it for life, so leave it out, or "
                "start a new run"
            )
    trainer, iteration, taken = config.trainer, progress.iteration, progress.env_steps
    if trainer.max_env_steps is None and trainer.iterations < iteration:
        raise UserError(
            f"trainer.iterations: is {trainer.iterations}, but the run to resume has done {iteration} already"
        )
    shortened = trainer.max_env_steps not in (None, _entry(stored, "trainer.max_env_steps"))
    if shortened and trainer.max_env_steps < taken:
        raise UserError(
            f"trainer.max_env_steps: is {trainer.max_env_steps}, but the run to resume has taken {taken} already"
        )
    before, after = flatten_dict(stored), flatten_dict(now)
    told = [k for k in before if k in after and before[k] != after[k] and not k.startswith(UNTOLD)]
    lines = [f"resumed with {key} = {after[key]!r} (was {before[key]!r})" for key in told]
    if not {"trainer.iterations", "trainer.max_env_steps"}.isdisjoint(told) and config.algorithm.cfg.anneal_lr:
        end = (
            f"iteration {trainer.iterations}" if trainer.max_env_steps is None else f"env step {trainer.max_env_steps}"
        )
        here = f"iteration {iteration}" if trainer.max_env_steps is None else f"env step {taken}"
        lines.append(f"learning rates now fall to 0 at {end}, from what they would be at {here} of so long a run")
    return lines


def _entry(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested dicts; None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


# ---- what is put back


@contextmanager
def _refusing_misfits(state: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever a checkpoint of another version, or of something else, makes fail into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"trainer.resume: {state['source']} does not fit this run: {describe_error(error)}") from error


def restore(state: Mapping[str, Any], parts: Assembly, progress: Progress) -> None:
    """Put a run's parts where a checkpoint was taken.

    Raises:
        UserError: the checkpoint is not of these parts; nothing was written yet.
    """
    with _refusing_misfits(state):
        load_trained(parts.policy.model, state)
        parts.audit.load_state_dict(state["audit"])
        if (reference := getattr(parts.algorithm, "reference", None)) is not None:
            reference.begin_from(parts.audit.start)
        _check_groups(state, parts)
        parts.algorithm.load_state_dict(state["optimizer"])
        progress.load_state_dict(state.get("progress", state))  # earlier runs kept its entries at the top
        own = _of_rank(state, parts.world)
        if own is None:  # with the seeds of the start, episodes and draws would be those of the start
            seed = another_seed(state["config"]["trainer"]["seed"], progress.env_steps)
            seed_everything(parts.world.own_seed(seed))
            exactly = parts.rollouts.load_state_dict(None, progress.env_steps)
        else:
            episodes = {"episodes": state["statistics"]} if "statistics" in state else {}
            exactly = parts.rollouts.load_state_dict(episodes | own["rollouts"], progress.env_steps)
            restore_rng(own)
    if not exactly:
        if (scaling := getattr(parts.algorithm, "reward_scaling", None)) is not None:
            scaling.begin_anew()
        print("episodes cannot be restored and start anew: the run goes on, but not bit for bit")


def _check_groups(state: Mapping[str, Any], parts: Assembly) -> None:
    """Refuse learning rates that are of other parts than before: the optimizer has a state for each group of them."""
    was, now = (
        [group["name"] for group in of["param_groups"]] for of in (state["optimizer"], parts.algorithm.state_dict())
    )
    if was != now:
        raise UserError(
            f"policy.learning_rates: the run to resume has rates for {', '.join(was)}, not for {', '.join(now)}; name "
            "the same parts (the rates may differ)"
        )


def _of_rank(state: Mapping[str, Any], world: World) -> Mapping[str, Any] | None:
    """Environments and generators of this process; none where the run had another number of processes."""
    if "ranks" not in state and world.size == 1:
        return state
    ranks = state.get("ranks", ())
    if len(ranks) == world.size:
        return ranks[world.rank]
    print(f"the checkpoint has the environments of {len(ranks) or 1} processes, and the run goes on with {world.size}")
    return None


def evaluation_at(folder: RunFolder, step: int, episodes: int) -> list[dict[str, Any]]:
    """The rows of the evaluation at an env step, one per episode; none where it was not made, or is torn.

    Args:
        folder: of the run that is resumed.
        step: `global_step` that it goes on from.
        episodes: how many an evaluation had.
    """
    metrics = read_rows(folder.metrics) if folder.metrics.exists() else []
    here = [row for row in _episodes_until(folder, step) if row["global_step"] == step]
    # Episodes are written before the metrics of their evaluation.
    made = any(row["global_step"] == step and "eval/return" in row for row in metrics)
    return here if made and len(here) == episodes else []


def drop_rows_after(folder: RunFolder, step: int, with_evaluation: bool) -> None:
    """Drop what a run wrote after an env step, which it writes again; `with_evaluation`: also of the one at that step.

    Its metrics after the step are the tracker's to drop.
    """
    if with_evaluation and folder.metrics.exists():
        metrics = read_rows(folder.metrics)
        replace_rows(folder.metrics, [r for r in metrics if r["global_step"] != step or "eval/return" not in r])
    kept = _episodes_until(folder, step)
    replace_rows(folder.episodes, [row for row in kept if row["global_step"] < step or not with_evaluation])


def _episodes_until(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    rows = read_rows(folder.episodes, torn_anywhere=True) if folder.episodes.exists() else []
    # A killed run went on, and wrote them again: of two rows of one episode the later one counts.
    return list({(r["global_step"], r["initial_state"]): r for r in rows if r["global_step"] <= step}.values())
