"""What every experiment is made of: schema, config, rollout, PPO, evaluation, tracking, checkpoints.

Knows no model and no simulator: it sees TensorDicts, TorchRL environments and actor / critic modules.
"""
