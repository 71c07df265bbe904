"""The main job: fine-tune a pretrained VLA with PPO.

    python experiments/ppo_vla.py                                           # the shipped checkpoint on pick_place
    python experiments/ppo_vla.py --config my.json                          # your model, your environment
    python experiments/ppo_vla.py --policy.freeze=vision --algorithm.cfg.learning_rate=1e-04 --trainer.seed=2

Without --config it starts from experiments/configs/pick_place.json; flags win over the file. Ctrl-C finishes the
iteration, writes a checkpoint that --trainer.resume=<run folder> continues exactly, and sums up.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torchrl.envs import EnvBase
from tqdm import tqdm

from agents.loading import import_model_class, load_vla_model
from agents.policy import VLAPolicy, check_policy
from envs import make_env
from research.config import ExperimentConfig, TrainerConfig, flatten, parse_config, to_dict
from research.runs.checkpoint import load_checkpoint, restore_rng, run_folder_of, save_checkpoint
from research.runs.reporting import describe, last_checkpoint, postfix, summarise
from research.runs.tracking import Tracker, create_run_folder, resolve_wandb_mode
from research.runs.video import video_grid, write_video
from research.schema import OBSERVATION, FrozenWeightsChanged, NonFiniteError, UserError, check_observation
from research.training.asynchronous import AsynchronousRollouts
from research.training.audit import FreezeAudit
from research.training.evaluation import Evaluation, evaluate, write_episodes
from research.training.freezing import freeze, parameter_groups, split_switches
from research.training.interruption import Interruption
from research.training.ppo import PPO, make_gae, make_loss, value_head_parameters
from research.training.rollout import EpisodeStatistics, Rollouts
from research.training.utilisation import Utilisation, matmul_flops_per_second

HERE = Path(__file__).resolve().parent
DEFAULT_CONFIG = HERE / "configs" / "pick_place.json"
FILMED = 12  # evaluation episodes in a video


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return train(parse_config(ExperimentConfig, with_default_config(argv), __doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: ExperimentConfig) -> int:
    trainer, cfg = config.trainer, config.algorithm.cfg
    device = choose_device(trainer.device)
    torch.manual_seed(trainer.seed)
    resumed = load_checkpoint(Path(trainer.resume)) if trainer.resume else None

    # Environment, model, policy: everything that can be refused is refused here, before anything heavy starts.
    env = make_env(trainer.env, trainer.num_envs, trainer.env_config, device, trainer.seed)
    observations = env.observation_spec[OBSERVATION].zero()
    check_observation(observations, f"env {trainer.env!r}")
    action_dim = env.action_spec.shape[-1]
    if config.policy.action_dim != action_dim:
        raise UserError(
            f"policy.action_dim is {config.policy.action_dim}, but {trainer.env} takes {action_dim} numbers"
        )
    model, scope = load_model(config, device)
    freeze(model, scope, heads=("action_head", config.policy.value_head), lora=config.policy.lora)
    audit = FreezeAudit(model)
    model.eval()  # no dropout and fixed batch statistics: the policy that is trained is the one that acted
    policy = VLAPolicy(model, config.policy.feature_reuse, autocast=trainer.autocast, compile=trainer.compile == "on")
    check_policy(policy, observations[: min(2, trainer.num_envs)], action_dim)
    groups = parameter_groups(model, cfg.learning_rate, config.policy.learning_rates)
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    to_head = config.policy.critic_gradient == "head"
    alone = to_head or cfg.value_warmup_iterations  # then the value head must be known from the rest
    value_head = value_head_parameters(model, config.policy.value_head) if alone else None
    ppo = PPO(model, make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value_head, critic_to_head=to_head)
    statistics = EpisodeStatistics(trainer.num_envs, device)
    mode, reason = resolve_wandb_mode(trainer.use_wandb)
    folder = run_folder_of(trainer.resume) if resumed else create_run_folder(trainer.run_dir, trainer.exp_name)
    restarted = not resumed and (folder / "metrics.jsonl").exists()  # by the agent of a sweep, after an interruption
    if restarted and (folder / "checkpoints" / "last.pt").exists():
        resumed, restarted = load_checkpoint(folder), False
    elif restarted:
        (folder / "episodes.jsonl").unlink(missing_ok=True)
    num_eval_envs = min(trainer.num_eval_envs, trainer.num_eval_episodes)
    eval_env = make_env(trainer.env, num_eval_envs, trainer.env_config, device, trainer.seed)

    iteration, step, before, best = 0, 0, None, float("-inf")
    if resumed:
        model.load_state_dict(resumed["model_state_dict"])
        audit.load_state_dict(resumed["audit"])
        optimizer.load_state_dict(resumed["optimizer"])
        statistics.load_state_dict(resumed["statistics"])
        iteration, step = resumed["iteration"], resumed["global_step"]
        before, best = resumed["before"], resumed["best"]
    if trainer.buffer_type == "standard":
        rollouts = Rollouts(env, policy, trainer.buffer_size, make_gae(cfg), env_steps=step)
    else:
        env.close()
        rollouts = AsynchronousRollouts(
            partial(make_worker_env, trainer, device), policy, trainer.num_collectors,
            trainer.buffer_size, cfg, trainer.max_staleness, trainer.seed, env_steps=step,
        )  # fmt: skip
    if resumed:
        if not rollouts.load_state_dict(resumed["rollouts"]):
            print("episodes cannot be restored and start anew: the run goes on, but not bit for bit")
        restore_rng(resumed)

    scope_name = scope if isinstance(scope, str) else "+".join(scope)
    tracker = Tracker(
        folder,
        to_dict(config),
        flatten(config) | {"scope": scope_name, "learning_rate": cfg.learning_rate},  # W&B's panels take no dotted keys
        project=trainer.wandb_project_name,
        group=trainer.wandb_group or f"{trainer.env}-{config.algorithm.name}-{scope_name}",
        mode=mode,
        reason=reason,
        tags=[f"freeze:{scope_name}"[:64], *trainer.wandb_tags],
        resume_id=folder.name.rsplit("-", 1)[-1] if resumed else None,
        resume_step=step if resumed else -1 if restarted else None,
    )

    def evaluate_now(film: int) -> Evaluation:
        result = evaluate(eval_env, policy.act, range(trainer.num_eval_episodes), film, trainer.max_eval_steps)
        tracker.log(result.metrics() | audit.drift(), step)
        write_episodes(folder / "episodes.jsonl", result.episodes, global_step=step, seed=trainer.seed)
        if result.frames:
            path = folder / "videos" / f"eval_{step:09d}.mp4"
            write_video(video_grid(result.frames, columns=4, success=result.filmed_success), path, fps=10)
            tracker.log_video("eval/video", path, step)
        return result

    def save(name: str = "last.pt") -> None:
        audit.check(f"at env step {step}")
        save_checkpoint(
            folder / "checkpoints" / name,
            model_state_dict=model.state_dict(),
            optimizer=optimizer.state_dict(),
            statistics=statistics.state_dict(),
            iteration=iteration,
            global_step=step,
            before=before,
            best=best,
            rollouts=rollouts.state_dict(),
            audit=audit.state_dict(),
            config=to_dict(config),
        )

    code, result = 0, None
    with tracker, Interruption() as interruption, ExitStack() as at_exit:
        at_exit.callback(rollouts.shutdown)  # workers that outlive an error would hold up the exit
        print(describe(policy, observations, folder, device), flush=True)
        peak = matmul_flops_per_second(torch.float32 if trainer.autocast == "off" else torch.bfloat16, device)
        rows = min(8, cfg.micro_batch_size or cfg.batch_size)
        utilisation = Utilisation(*policy.flops(observations[:1], rows), peak)
        try:
            audit.check("at the start" if not resumed else "where the run was resumed")
            if trainer.enable_eval and not resumed:
                result = evaluate_now(film=FILMED)
                before = result.metrics()
                print(f"before: {result.summary()}", flush=True)
            bar = tqdm(
                total=trainer.iterations * trainer.buffer_size, initial=step, unit="step", unit_scale=True,
                disable=not trainer.progress_bar, dynamic_ncols=True,
            )  # fmt: skip
            while iteration < trainer.iterations and not interruption.code:
                start = time.perf_counter()
                rollout = rollouts.next()  # [N, T]
                batch, metrics = rollouts.prepare(rollout)  # [N * T], with advantages
                collected = time.perf_counter()
                ppo.set_progress(iteration, trainer.iterations)
                warming_up = iteration < cfg.value_warmup_iterations
                metrics |= ppo.update(batch, value_only=warming_up)
                rollouts.publish()
                metrics |= statistics.update(rollout)
                end = time.perf_counter()

                iteration, previous, step = iteration + 1, step, step + trainer.buffer_size
                metrics |= {"time/collect_s": collected - start, "time/update_s": end - collected}
                metrics["time/env_steps_per_second"] = trainer.buffer_size / (end - start)
                if not warming_up:
                    metrics["time/mfu"] = utilisation.of(trainer.buffer_size, metrics["train/epochs"], end - start)
                tracker.log(metrics, step)
                bar.set_postfix(postfix(metrics, result))
                bar.update(trainer.buffer_size)
                last = iteration == trainer.iterations
                if trainer.enable_eval and not last and crossed(previous, step, trainer.eval_freq):
                    result = evaluate_now(film=0)
                    if result.score > best:
                        best = result.score
                        save("best.pt")
                if last or crossed(previous, step, trainer.save_freq):
                    save()
            bar.close()
            code = interruption.code
            if code:
                save()
            elif trainer.enable_eval:
                result = evaluate_now(film=FILMED)
            audit.check("at the end")
        except (NonFiniteError, FrozenWeightsChanged) as error:
            print(f"error: {error}; stopped at env step {step}, {last_checkpoint(folder)}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print(f"stopped at once at env step {step}; {last_checkpoint(folder)}", file=sys.stderr)
            code = 130
        summarise(tracker, folder, step, before, result, {"exit_code": code, **audit.summary()})
        if tracker.stopped and code > 128:
            code = 0  # what its sweep asked for is no failure; an agent gives up after a few of those
        elif code == 143 and tracker.run:
            tracker.run.mark_preempting()  # the sweep queues this run again
        tracker.finish(code)
    eval_env.close()
    return code


def with_default_config(argv: list[str]) -> list[str]:
    """Arguments that start from the main job's configuration unless they name one of their own."""
    names_one = any(word == "--config" or word.startswith("--config=") for word in argv)
    return argv if names_one else [f"--config={DEFAULT_CONFIG}", *argv]


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"trainer.device: unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device is 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    return device


def load_model(
    config: ExperimentConfig, device: torch.device, expect_fresh: bool = False
) -> tuple[torch.nn.Module, str | list[str]]:
    """The configured model and what to freeze; a relative path is looked up from here, then from `experiments/`."""
    vla = config.policy.vla_config
    if vla.model_path and not Path(vla.model_path).exists() and (HERE / vla.model_path).exists():
        vla.model_path = str(HERE / vla.model_path)
    model_config, scope = split_switches(import_model_class(vla.model_class), vla.model_config, config.policy.freeze)
    model = load_vla_model(
        vla.model_path,
        vla.model_class,
        model_config,
        device,
        strict=vla.strict,
        strip_prefix=vla.strip_prefix,
        add_prefix=vla.add_prefix,
        trust_checkpoint=vla.trust_checkpoint,
        expect_fresh=expect_fresh,
    )
    return model, scope


def make_worker_env(trainer: TrainerConfig, device: torch.device, worker: int) -> EnvBase:
    """One worker's share of the environments (buffer_type vla); its seed comes from the collector."""
    return make_env(trainer.env, trainer.num_envs // trainer.num_collectors, trainer.env_config, device, worker)


def crossed(previous: int, step: int, every: int) -> bool:
    return every > 0 and previous // every != step // every


if __name__ == "__main__":
    sys.exit(main())
