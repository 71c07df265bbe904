"""The main job: fine-tune a pretrained VLA with PPO.

    python experiments/ppo_vla.py                                      # the shipped checkpoint on pick_place
    python experiments/ppo_vla.py --config my.json --trainer.seed=2    # your model, your environment; flags win
    python experiments/ppo_vla.py --config my.json --dry_run           # what that would need; nothing is trained
    torchrun --nproc-per-node 2 experiments/ppo_vla.py                 # the same run in two processes

Without --config it starts from experiments/configs/pick_place.json. Ctrl-C finishes the iteration and writes a
checkpoint that --trainer.resume=<run folder> continues exactly. Code of a run folder from elsewhere asks for --trust.
"""

from __future__ import annotations

import sys

import answering  # noqa: F401

from assembling import Assembly
from starting import run_script
from training_run import FILMED, TrainingRun

from research.training.utilisation import Stopwatch


def main(argv: list[str] | None = None) -> int:
    return run_script("ppo", learn, __doc__, argv)


def learn(parts: Assembly, run: TrainingRun) -> None:
    trainer, progress, rollouts, algorithm = run.trainer, run.progress, parts.rollouts, parts.algorithm
    run.begin()
    while not (progress.finished or run.interrupted()):
        run.hold()
        watch = Stopwatch()
        rollout = rollouts.next()  # [N, T]
        batch, metrics = algorithm.prepare(rollout)  # [N * T], with advantages
        run.check_ratio(batch, metrics)  # before the first update: it should be 1
        watch.collected()
        metrics |= algorithm.update(batch, progress)
        rollouts.publish()
        progress.advance(parts.world.total(rollouts.env_steps))  # of what was thrown away, too
        run.log(metrics | rollouts.metrics(), rollout.numel(), *watch.seconds())
        if trainer.enable_eval and not progress.finished and progress.crossed(trainer.eval_freq):
            run.evaluate()
        if progress.finished or progress.crossed(trainer.save_freq):
            run.save()
    if run.interrupted():
        run.save()
    elif trainer.enable_eval:
        run.evaluate(film=FILMED)
    parts.audit.check("at the end")


if __name__ == "__main__":
    sys.exit(main())
