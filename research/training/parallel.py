"""Several processes as one run (`torchrun --nproc-per-node N experiments/ppo_vla.py`); for one process nothing of it.

Each process, or rank, has its share of the environments and the whole model; sizes in the configuration are those of
all ranks together. Gradients, moments of advantages and metrics are of the whole batch, so that all ranks take the same
steps. Rank 0 tracks, prints and writes checkpoints. PyTorch's own process group does the work: gloo for the CPU, NCCL
for GPUs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from research.errors import UserError, one_line

BUCKET = 2**24  # numbers that are reduced at once: a copy of them is all the memory that averaging takes
TIMEOUT = timedelta(hours=1)  # of one rank waiting for another: an evaluation, a checkpoint or a compilation
Value = TypeVar("Value")


class PeerEnded(UserError):
    """Another process of this run has ended, and says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Args:
        rank: this one's number, from 0.
        size: how many there are.
        device: what it computes on, as `trainer.device`; None: what that says.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, tracks and writes."""
        return self.rank == 0

    def divide(self, count: int, option: str) -> int:
        """A rank's share of `count`.

        Raises:
            UserError: it cannot be divided; names the option.
        """
        if count % self.size:
            raise UserError(f"{option}: {count} cannot be divided among {self.size} processes")
        return count // self.size

    def own_seed(self, seed: int) -> int:
        """This rank's seed, of a run's: that of another rank is none that a user gives next to it."""
        return (seed + 1_000_003 * self.rank) % 2**32  # NumPy takes none above

    def shares(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's of some items, in a row; those of all ranks, one after the other, are the items."""
        ends = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[ends[0] : ends[1]]

    # ---- what all ranks do together: each of them has to call it, in the same order

    def start_alike(self, model: nn.Module) -> None:
        """Give all ranks the weights and buffers of rank 0."""
        if self.size > 1:
            with _together():
                for entry in model.state_dict().values():
                    if isinstance(entry, Tensor):  # what else modules keep there, all ranks have made alike
                        self._take_over(entry)

    @staticmethod
    def _take_over(tensor: Tensor) -> None:
        # In a row and as bytes: gloo writes past the end of an expanded buffer and knows few dtypes, and NCCL takes no
        # axes in another order.
        sent = tensor.contiguous()
        dist.broadcast(sent.flatten().view(torch.uint8), src=0)
        if sent is not tensor and not torch.equal(sent, tensor):
            tensor.copy_(sent)

    def average_gradients(self, parameters: Sequence[nn.Parameter], measured: Tensor) -> Tensor:
        """Replace gradients by their means over the ranks; returns the mean of `measured` `[M]`.

        A parameter without a gradient in any rank keeps none, so that an optimizer passes it by.
        """
        if self.size == 1:
            return measured
        having = measured.new_tensor([p.grad is not None for p in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told, having, *means = self._means([measured, having, *gradients])
        for parameter, ranks, mean in zip(parameters, having.tolist(), means, strict=True):
            parameter.grad = mean if ranks else None
        return told

    def _means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over the ranks, in as few messages as buckets are needed."""
        means: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _together():
                dist.all_reduce(flat)
            parts = flat.div_(self.size).split([tensor.numel() for tensor in bucket])
            means += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        return means

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (unbiased) standard deviation of the numbers of all ranks."""
        return self.moments_of_each([x])[1][0]

    def moments_of_each(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        """Of several tensors: how many numbers all ranks have, and their moments; in one message."""
        if self.size == 1:
            return [x.numel() for x in tensors], [(x.mean(), x.std()) for x in tensors]
        wide = [x.double() for x in tensors]
        sums = self.sum(torch.stack([torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()]) for x in wide]))
        count, total, squares = sums.unbind(dim=1)
        deviation = ((squares - total.square() / count).clamp(min=0) / (count - 1)).sqrt()
        told = zip((total / count).to(tensors[0].dtype), deviation.to(tensors[0].dtype), strict=True)
        return [int(n) for n in count.tolist()], list(told)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all ranks."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def total(self, count: int) -> int:
        """The sum of a number over the ranks."""
        return int(self.sum(torch.tensor(count)))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: what one of them asks for, all do."""
        return int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def _reduced(self, x: Tensor, op: dist.ReduceOp) -> Tensor:
        if self.size == 1:
            return x
        x = x.clone()
        with _together():
            dist.all_reduce(x, op)
        return x

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _together():
                dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the exchange; all ranks have to come to it."""
        if self.size > 1:
            dist.destroy_process_group()

    def leaders(self, value: Value) -> Value:
        """The value that rank 0 has."""
        return self.gather(value)[0] if self.size > 1 else value


ALONE = World()


def join(device: str) -> World:
    """Become a rank, where torchrun has started this process.

    Ranks but the first print nothing on stdout, and warn of nothing.

    Args:
        device: `trainer.device`; on GPUs each rank of a machine takes its own.
    Raises:
        UserError: a machine has fewer GPUs than processes, or the processes do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return ALONE
    if device.partition(":")[2]:
        raise UserError(f"trainer.device: {device!r} is one GPU, and torchrun has started {size} processes; say cuda")
    if device != "cpu" and torch.cuda.is_available():
        own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= there:
            raise UserError(
                f"trainer.device: each process takes a GPU of its own, and this machine has {there}; start as many by "
                "torchrun --nproc-per-node, or say cpu"
            )
        device = f"cuda:{own}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"WORLD_SIZE is {size}, but the processes of the run do not find each other ({one_line(error)[:120]}); "
                "start the script by torchrun, or unset WORLD_SIZE"
            ) from error
    world = World(dist.get_rank(), dist.get_world_size(), device)
    if not world.leads:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        logging.disable(logging.WARNING)
    return world


def let_rank_0_speak() -> None:
    """Wait a moment before saying what ended this process: where rank 0 says the same, torchrun ends this one now."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type in a row, `BUCKET` numbers at most if they are not single ones."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _together() -> Iterator[None]:
    """Say in one line that another rank is gone, which is what a failed exchange means."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise PeerEnded(f"another process of this run has ended ({str(error).splitlines()[0][:80]})") from error
