"""Stages: in bfloat16, compiled, and those that are methods or functions."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from worlds import (
    gradients_of,
    rollout_batch,
    small_model,
)

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from agents.stages import compile_stage, module_of


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_without_it_is_warned_of(monkeypatch, caplog, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    VLAPolicy(small_model(), autocast="bf16")
    assert ("bf16 will be slower" in caplog.text) == warned
    caplog.clear()
    VLAPolicy(small_model())
    assert caplog.text == ""


class MethodStage(SmallVLA):
    """Its trunk is a method, or a function, that uses weights of which the stage does not know."""

    function = False

    def stages(self):
        look = (lambda rgb, text, p: self.look(rgb, text, p)) if self.function else self.look
        keys = [("observation", key) for key in ("rgb", "language", "proprio")]
        return [TensorDictModule(look, in_keys=keys, out_keys=["hidden"])]

    def look(self, rgb, language, proprio):
        return self.fusion(self.vision_encoder(rgb), self.language_encoder(language), proprio)


@pytest.mark.slow
@pytest.mark.parametrize("function", [False, True])
def test_a_stage_that_is_a_method_or_function_can_be_compiled(function):
    gradients = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = MethodStage(3, token_size=8, hidden_size=32).eval()
        model.function = function
        policy = VLAPolicy(model, compile=compile)
        gradients.append(gradients_of(policy, rollout_batch(policy)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_whose_method_a_stage_is(compiled):
    model = MethodStage(3, token_size=8, hidden_size=32)
    stage = model.stages()[0]
    if compiled:
        compile_stage(stage, graphs=False)
    assert module_of(stage) is model


@pytest.mark.parametrize("function", [False, True])
def test_a_stage_that_is_a_method_or_function_trains(function):
    """It holds no parameters of its own; taking it for frozen would silently train nothing but the heads."""
    torch.manual_seed(0)
    model = MethodStage(3, token_size=8, hidden_size=32).eval()
    model.function = function
    policy = VLAPolicy(model)
    assert policy.frozen_stages == []
    assert len(policy.blocked_stages) == function
    gradients_of(policy, rollout_batch(policy))
    assert all(p.grad is not None for p in model.fusion.parameters())
