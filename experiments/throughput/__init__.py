"""The parts of `benchmark_throughput.py`: rows, the loops it compares with, models, profiles."""
