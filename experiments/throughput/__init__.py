"""The parts of the throughput benchmarks: rows, the loops compared with, models, profiles.

`model.py` and `processes.py` are scripts by themselves: those behind docs/scaling.md.
"""
