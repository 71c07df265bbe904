"""Fine-tune a pretrained VLA by group-relative advantages, without a critic: GRPO, RLOO or Dr. GRPO.

    python experiments/grpo_vla.py                                     # the shipped checkpoint on pick_place
    python experiments/grpo_vla.py --algorithm.cfg.advantage=rloo --trainer.seed=2
    python experiments/grpo_vla.py --config my.json                    # your model, your environment; flags win
    python experiments/grpo_vla.py --config my.json --dry_run          # what that would need; nothing is trained
    torchrun --nproc-per-node 2 experiments/grpo_vla.py                # the same run in two processes

Without --config it starts from experiments/configs/pick_place_grpo.json; models, environments, freezing, evaluation,
tracking and resuming are those of ppo_vla.py. An iteration is algorithm.cfg.groups initial states with
algorithm.cfg.group_size episodes from each; trainer.buffer_size is not read.
"""

from __future__ import annotations

import sys

import answering  # noqa: F401

from assembling import Assembly
from configuration import GRPO_CONFIG
from starting import run_script
from training_run import FILMED, TrainingRun

from research.training.utilisation import Stopwatch


def main(argv: list[str] | None = None) -> int:
    return run_script("grpo", learn, __doc__, argv, GRPO_CONFIG)


def learn(parts: Assembly, run: TrainingRun) -> None:
    trainer, progress, episodes, algorithm = run.trainer, run.progress, parts.rollouts, parts.algorithm
    run.begin()
    while not (progress.finished or run.interrupted()):
        run.hold()
        watch = Stopwatch()
        decisions = episodes.next()  # [M]: of whole episodes, in groups
        batch, metrics = algorithm.prepare(decisions)  # [M], with advantages
        run.check_ratio(batch, metrics)  # before the first update: it should be 1
        watch.collected()
        metrics |= algorithm.update(batch, progress)
        episodes.publish()
        progress.advance(parts.world.total(episodes.env_steps))  # of groups that were left out, too
        run.log(metrics | episodes.metrics(), len(batch), *watch.seconds())
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
