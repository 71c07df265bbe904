"""Stages of a model: run in a row, in a precision, compiled or not; and what can be told of one by looking at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from research.schema import LANGUAGE, OBSERVATION

log = logging.getLogger(__name__)


class Direct(TensorDictModule):
    """A `TensorDictModule` without what its call costs in Python: the one way past TorchRL's modules.

    Calling one looks up keys, checks, and (tensordict 0.14.3) looks for packages to import; stages are called at every
    collected step and in every minibatch, the loss's modules in every minibatch. Measured on one core around an
    identity: 0.054 ms a call against 0.007 ms here, where a step of 64 environments with the small model takes 7 ms
    and a minibatch of its heads 3.3 ms. `ProbabilisticActor.get_dist` also walks through all modules of the model:
    0.15 ms with the small one, more with a larger one, hence `agents.loss_modules.ScoringActor`.
    """

    def forward(self, step: TensorDictBase) -> TensorDictBase:
        outputs = self.module(*[step.get(key) for key in self.in_keys])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, output in zip(self.out_keys, outputs, strict=True):
            step.set(key, output)
        return step


def run_stage(stage: TensorDictModuleBase, step: TensorDictBase) -> TensorDictBase:
    """`stage(step)`; a plain `TensorDictModule` as `Direct`."""
    return Direct.forward(stage, step) if type(stage) is TensorDictModule else stage(step)


class StageSequence(TensorDictModuleBase):
    """Some of a model's stages in a row, possibly none.

    Args:
        model: whose stages they are; held whole, so that its other parts come along.
        stages: the modules to run, in order.
        precision: in which they run.
        graphs: they run as CUDA graphs: what they wrote is copied, as the next run writes to the same memory.
    """

    def __init__(
        self, model: nn.Module, stages: Sequence[TensorDictModuleBase], precision: Precision, graphs: bool = False
    ):
        super().__init__()
        self.model, self.stages, self._precision, self._graphs = model, list(stages), precision, graphs
        written, reads = set(), []
        for stage in self.stages:
            reads += [key for key in stage.in_keys if key not in written and key not in reads]
            written.update(stage.out_keys)
        self.in_keys, self.out_keys = reads, [key for stage in self.stages for key in stage.out_keys]

    def forward(self, step: TensorDictBase) -> TensorDictBase:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self._precision():
            for stage in self.stages:
                step = run_stage(stage, step)
        if self._graphs:
            step.update({key: step.get(key).clone() for key in self.out_keys})
        return step


class Precision:
    """Autocast around the model's own computations: `with precision():`.

    Args:
        model: where its parameters lie decides the device type.
        autocast: "off" or "bf16".
    """

    def __init__(self, model: nn.Module, autocast: str):
        self.model = model
        self.dtype = {"off": None, "bf16": torch.bfloat16}[autocast]
        capability = torch.backends.cpu.get_cpu_capability()
        if self.dtype is not None and self.device_type == "cpu" and not capability.startswith("AVX512"):
            # Measured with AVX2: matrix products 70 times slower than in float32.
            log.warning("trainer.autocast: this CPU (%s) has no bfloat16 instructions, bf16 will be slower", capability)

    @property
    def device_type(self) -> str:
        """Where the model lies by now."""
        return next(self.model.parameters()).device.type

    def __call__(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


# --------------------------------------------------------------------------------------------------------- compiling

# What mode="reduce-overhead" means, for fixed sizes, and rounding to bfloat16 wherever eager code does: compiled for
# collection and for training, the same layers are fused differently, and the ratio would not start at 1.
GRAPHS = {"options": {"triton.cudagraphs": True, "emulate_precision_casts": True}, "dynamic": False}


def compile_model(contract: Any, stages: Sequence[TensorDictModuleBase], graphs: bool) -> None:
    """Compile a model's stages, or, of a model that has none, its methods in an adapter of `agents/vla.py`."""
    for stage in stages:
        compile_stage(stage, graphs and not reads_instruction(stage))  # of instructions the number varies
    if not stages and hasattr(contract, "evaluate"):
        contract.act, contract.evaluate = Compiled(contract.act, graphs), Compiled(contract.evaluate, graphs)


def compile_stage(stage: TensorDictModuleBase, graphs: bool) -> None:
    """`torch.compile` what a stage runs: a module in place, a method or function by its compiled form."""
    module = getattr(stage, "module", stage)
    if isinstance(module, nn.Module):
        module.compile(**(GRAPHS if graphs else {}))
    else:
        stage.module = Compiled(module, graphs, fresh=False)


class Compiled:
    """A method or function, compiled at its first call. A deep copy, or what arrives in another process, compiles anew.

    (What `torch.compile` returns holds on to the object whose method it was, also in a copy of that object: workers
    would then act with the weights of the model that was copied.)

    Args:
        method: what to compile; it returns a tensor or a tuple of tensors.
        graphs: compile to CUDA graphs.
        fresh: copy what it returns, where that lies in a graph's memory, to which the next run writes.
    """

    def __init__(self, method: Callable, graphs: bool, fresh: bool = True):
        self.method, self.graphs, self.fresh = method, graphs, fresh
        self._compiled: Callable | None = None

    def __call__(self, *arguments, **options) -> Tensor | tuple[Tensor, ...]:
        if self._compiled is None:
            self._compiled = torch.compile(self.method, **(GRAPHS if self.graphs else {}))
        if not (self.graphs and self.fresh):
            return self._compiled(*arguments, **options)
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in self._compiled(*arguments, **options))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_compiled": None}


# ----------------------------------------------------------------------------------------- what a stage is, by its look


def stage_name(model: nn.Module, stage: TensorDictModuleBase) -> str:
    """The name of the model's part that a stage runs, or else the keys it writes."""
    inner = getattr(stage, "module", stage)
    names = [name for name, module in model.named_modules() if module is inner and name]
    return names[0] if names else "+".join(map(str, stage.out_keys))


def module_of(stage: TensorDictModuleBase) -> nn.Module:
    """The module that a stage runs, or whose method it runs; a function's stage itself."""
    inner = getattr(stage, "module", stage)
    inner = inner.method if isinstance(inner, Compiled) else inner
    owner = getattr(inner, "__self__", inner)
    return owner if isinstance(owner, nn.Module) else stage


def reads_instruction(stage: TensorDictModuleBase) -> bool:
    """Whether the instruction is all that a stage reads."""
    return stage.in_keys == [(OBSERVATION, LANGUAGE)]


def is_shared(stage: TensorDictModuleBase) -> bool:
    """Whether rows with the same instruction get the same from a stage: it reads nothing else, and does nothing odd."""
    return reads_instruction(stage) and not is_random(stage) and not mixes_rows(stage)


def trains(stage: TensorDictModuleBase) -> bool:
    """Whether a stage changes as a run goes on: by training, or following what it sees.

    Or may change: nobody can see which weights a function uses.
    """
    follows = any(getattr(m, "follows", False) for m in module_of(stage).modules())
    return is_opaque(stage) or follows or any(p.requires_grad for p in _parameters(stage))


def _parameters(stage: TensorDictModuleBase) -> Iterator[nn.Parameter]:
    """A stage's parameters; those of the whole model where the stage is one of the model's methods."""
    return module_of(stage).parameters()


def is_opaque(stage: TensorDictModuleBase) -> bool:
    """A plain function may use any weights."""
    module = getattr(stage, "module", stage)
    return not isinstance(module, nn.Module) and not isinstance(getattr(module, "__self__", None), nn.Module)


def is_random(stage: TensorDictModuleBase) -> bool:
    """A module says so itself (`stochastic = True`, as an augmentation does), or is a dropout that is on."""
    dropout = nn.modules.dropout._DropoutNd
    return any(
        getattr(m, "stochastic", False) or (isinstance(m, dropout) and m.training and m.p > 0) for m in stage.modules()
    )


def mixes_rows(stage: TensorDictModuleBase) -> bool:
    """A batch norm that is on: what it makes of a row depends on the other rows."""
    return any(isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in stage.modules())
