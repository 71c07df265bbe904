"""What many runs tell: sweeps, the table of runs, statistics, comparison. Never imported by a training run."""
