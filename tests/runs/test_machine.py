"""The hardware of a run: what it is called, and that it is no name of a machine."""

import platform

import torch

from research.runs.machine import machine


def test_a_processor_is_named_by_its_architecture_and_instructions_and_not_by_its_host():
    found = machine(torch.device("cpu"))
    assert found == f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    assert platform.node() not in found
