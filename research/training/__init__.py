"""One training run: rollout, update, freezing and its audit, evaluation."""
