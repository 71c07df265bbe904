"""The value head: which parameters it has, whatever they are called, and how the critic's gradient stays in it.

The parameters of the value head are found, not named: those that the value's gradient reaches and the log-probability's
does not. A value error that flows into a shared, pretrained trunk was measured to destroy its policy, so by default the
critic's gradient ends at the head's input: a forward pre-hook detaches it, and one backward pass of the summed losses
does the rest.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from agents.vla import Contract, contract_of, run_stages


@torch.enable_grad()
@torch.compiler.set_stance("force_eager")
def scores(
    contract: Contract, observations: TensorDictBase, calls: list | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and value of a decision at a few observations, with their graph.

    `calls`, which something else appends to, then holds what it got outside of the decision.
    """
    with torch.random.fork_rng():  # a run draws the same numbers, whether or not anyone looks
        step = run_stages(contract, observations)
        before = len(calls or ())
        with torch.no_grad():
            decided = contract.decide(step.copy(), False)
        if calls is not None:
            del calls[before:]
        return contract.score(step.update(decided.select(*contract.decision_keys)))


def parameters_behind(*outputs: Tensor) -> set[Tensor]:
    """The trainable leaves that the gradient of some outputs reaches, found by walking their graph.

    What a custom `autograd.Function` uses without taking it as an argument is not seen.
    """
    nodes, seen, found = [output.grad_fn for output in outputs], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


def find_value_head(model: nn.Module, observations: TensorDictBase) -> list[str]:
    """Dotted names of the modules, and of single parameters, that the value depends on and the policy does not.

    Frozen parameters are in no graph, and so in none of these.

    Args:
        model: the VLA, before freezing.
        observations: a few, as the environment offers them, `[B]`.
    """
    log_prob, entropy, value = scores(contract_of(model), observations)
    own = parameters_behind(value) - parameters_behind(log_prob, entropy)
    names: list[str] = []
    for name, module in model.named_modules():  # parents come first: whole modules before what they hold
        parameters = set(module.parameters())
        if name and parameters and parameters <= own:
            names.append(name)
            own -= parameters
    return names + [name for name, parameter in model.named_parameters() if parameter in own]


def detach_value_head(model: nn.Module, parameters: Collection[nn.Parameter], observations: TensorDictBase) -> bool:
    """Let the value's gradient end at the input of the module that holds the value head, and say whether it does.

    It is tried, and taken back where it would change a gradient: where the parameters do not lie in one module, where
    that module runs more than once a pass, or where the value depends on other parameters past it.

    Args:
        model: the VLA, frozen as it will be trained.
        parameters: the trainable parameters of the value head.
        observations: a few, as the environment offers them, `[B]`.
    """
    wanted, module = set(parameters), model
    for candidate in model.modules():  # parents come first: the last that holds them all is the smallest
        if wanted <= set(candidate.parameters()):
            module = candidate
    if not {p for p in module.parameters() if p.requires_grad} <= wanted:
        return False
    calls = []
    counting = module.register_forward_hook(lambda *_: calls.append(1))
    hook = module.register_forward_pre_hook(_detached, with_kwargs=True)
    *_, value = scores(contract_of(model), observations, calls)
    counting.remove()
    if parameters_behind(value) == wanted and len(calls) == 1:
        return True
    hook.remove()
    return False


def _detached(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    cut = lambda x: x.detach() if isinstance(x, Tensor) else x  # noqa: E731
    return tuple(map(cut, arguments)), {name: cut(value) for name, value in options.items()}
