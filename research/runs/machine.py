"""What a run was made on, as hardware: numbers of speed mean nothing without it, and the machine's name is nobody's."""

from __future__ import annotations

import platform

import torch


def machine(device: torch.device) -> str:
    """Name of the GPU, or the processor's architecture and the widest instructions that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
