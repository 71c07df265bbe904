"""How much memory is free, and the refusal to build a model whose weights alone take more."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from research.errors import UserError

LOOKED_AT_FROM = 2**30  # bytes of weights that are there before anybody asks how many it will be
GROUP = Path("/sys/fs/cgroup")  # of a container: its limit, and what is used of it


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process could still take on a device: what is free, within its own limits; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [_available(), _left_to_container(), _left_to_process()]
    return min((limit for limit in limits if limit is not None), default=None)


def _available() -> int | None:
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _left_to_container() -> int | None:
    try:
        most, now = ((GROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return int(most) - int(now) if most.isdecimal() else None


def _left_to_process() -> int | None:
    """Of its address space, where `ulimit -v` bounds it."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    now = _kibibytes(Path("/proc/self/status"), "VmSize")
    return None if most == resource.RLIM_INFINITY or now is None else most - now


def _kibibytes(file: Path, name: str) -> int | None:
    """The bytes that a line "name: n kB" tells; None where there is no such file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


@contextmanager
def refuse_too_large(name: str, on_meta: Callable[[], nn.Module], look_from: int | None = None) -> Iterator[None]:
    """Within, refuse to go on constructing a model on the CPU once it is sure that its weights do not fit.

    Small models cost nothing: the whole is counted only when weights of `look_from` bytes are there.

    Args:
        name: of the model, for the message.
        on_meta: constructs it without memory.
        look_from: bytes; None: `LOOKED_AT_FROM`.
    Raises:
        UserError: they do not fit; says how large they are, and how much is free.
    """
    free, there, looked = free_bytes(torch.device("cpu")), 0, False

    def look(module: nn.Module, parameter_name: str, parameter: nn.Parameter | None) -> None:
        nonlocal there, looked
        if looked or parameter is None or parameter.is_meta or is_lazy(parameter):
            return
        there += parameter.numel() * parameter.element_size()
        if there < (LOOKED_AT_FROM if look_from is None else look_from):
            return
        looked = True
        try:
            size = sum(p.numel() * p.element_size() for p in on_meta().parameters() if not is_lazy(p))
        except UserError:  # its constructor reads values, so that nobody can tell beforehand
            return
        if free is not None and size > free:
            raise UserError(
                f"model_config: the weights of {name} take {in_gib(size)}, and {in_gib(free)} of memory are free; set "
                "smaller sizes, or take a larger machine (--dry_run says what a run needs, without building the model)"
            )

    hook = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        hook.remove()


def in_gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:,.1f} GiB"
