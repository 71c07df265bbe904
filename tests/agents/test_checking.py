"""A model that does not keep to the contract is refused, with what was expected and what was got."""

from __future__ import annotations

import io
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal
from worlds import Fused, ThreeMethods, small_model

from agents.checking import check_policy
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from envs.tabletop import TabletopEnv
from research.errors import UserError


@pytest.mark.slow
def test_checking_a_policy_compiles_nothing():
    torch._dynamo.reset()
    policy = VLAPolicy(small_model(), compile=True)
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    check_policy(policy, observations(), (3,))
    assert compiled["unique_graphs"] == before
    with torch.no_grad():
        policy.act(TensorDict({"observation": observations()}, [2]))
    assert compiled["unique_graphs"] > before


def observations() -> TensorDict:
    return TabletopEnv(2).reset()["observation"]


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("forward", lambda o: torch.zeros(2, 4), r"forward \(the action\): expected a float tensor \[2, 3\].*\[2, 4\]"),
        ("forward", lambda o: torch.zeros(2, 3, dtype=torch.int64), r"expected a float tensor.*int64"),
        ("forward", lambda o: None, "got NoneType"),
        ("get_value", lambda o: torch.zeros(2), r"get_value: expected a float tensor \[2, 1\].*\[2\]"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2, 3), torch.zeros(2)), r"\(log_prob\).*\[2\].*\[2, 3\]"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2), torch.zeros(1)), r"\(entropy\)"),
        ("evaluate_actions", lambda o, a: torch.zeros(2), r"should return \(log_prob, entropy\)"),
        ("evaluate_actions", lambda o, a: (torch.zeros(2), torch.zeros(2)), "no trainable parameter"),
        ("forward", lambda o: o["touch"], "forward failed on the environment's observations"),
    ],
)
def test_wrong_shapes_and_dtypes_say_expected_and_got(method, result, message):
    model = ThreeMethods(small_model())
    check_policy(VLAPolicy(model), observations(), (3,))
    setattr(model, method, result)
    with pytest.raises(UserError, match=message) as caught:
        check_policy(VLAPolicy(model), observations(), (3,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [ThreeMethods, Fused, lambda staged: staged])
def test_what_a_model_raises_is_told_with_its_line_and_what_it_was_given(make):
    model = make(small_model())
    for name in ("forward", "act", "action_distribution"):
        setattr(model, name, lambda *given, **options: nn.Linear(5, 3)(torch.zeros(2, 4)))
    with pytest.raises(UserError, match="mat1 and mat2") as caught:
        check_policy(VLAPolicy(model), observations(), (3,))
    message = str(caught.value)
    assert re.search(r"\(test_checking.py, line \d+\); it was given ", message), "not a line of torch's"
    assert re.search(r"\brgb uint8 \[2, 64, 64, 3\]", message) and re.search(r"\bproprio float32 \[2, 3\]", message)


class Unmarked(nn.Module):
    """A staged model by its methods alone, whose distribution has a probability per number: no `Independent`."""

    def __init__(self):
        super().__init__()
        self.trunk, self.mean, self.value = nn.Linear(3, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def stages(self):
        return [TensorDictModule(self.trunk, in_keys=[("observation", "proprio")], out_keys=["hidden"])]

    def action_distribution(self, hidden):
        return Normal(self.mean(hidden), 1.0)


class Marked(Unmarked):
    def action_distribution(self, hidden):
        return Independent(super().action_distribution(hidden), 1)


def test_a_staged_model_is_tried_out_though_it_derives_from_nothing():
    check_policy(VLAPolicy(Marked()), observations(), (3,))
    with pytest.raises(
        UserError, match=r"^Unmarked.action_distribution \(action_log_prob\): .* \[2\], got .* \[2, 3\]"
    ):
        check_policy(VLAPolicy(Unmarked()), observations(), (3,))


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        (
            "act",
            lambda o, deterministic: (torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1)),
            r"act \(action\).*\[2, 3\].*\[2, 1\]",
        ),
        ("act", lambda o: None, "act failed on the environment's observations: TypeError"),
        (
            "act",
            lambda o, deterministic: (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1)),
            r"act \(action_log",
        ),
        ("evaluate", lambda o, a: (torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 1)), r"evaluate \(entropy\)"),
        ("evaluate", lambda o, a: (torch.zeros(2), torch.zeros(2)), "evaluate should return"),
        ("get_value", lambda o: torch.zeros(2), r"get_value: expected a float tensor \[2, 1\]"),
    ],
)
def test_the_fused_methods_are_tried_out(method, result, message):
    model = Fused(small_model())
    check_policy(VLAPolicy(model), observations(), (3,))
    setattr(model, method, result)
    with pytest.raises(UserError, match=message) as caught:
        check_policy(VLAPolicy(model), observations(), (3,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrap", [ThreeMethods, Fused])
def test_a_model_that_writes_into_its_observations_is_refused_and_one_that_replaces_them_is_not(wrap):
    class Writes(wrap):
        def get_value(self, seen):
            seen["proprio"].mul_(2)
            return super().get_value(seen)

    class Replaces(wrap):
        def get_value(self, seen):
            seen["proprio"] = seen["proprio"] * 2
            return super().get_value(seen)

    with pytest.raises(UserError, match="^Writes writes into proprio, which the rollout keeps"):
        check_policy(VLAPolicy(Writes(small_model())), observations(), (3,))
    policy, seen = VLAPolicy(Replaces(small_model())), observations()
    check_policy(policy, seen, (3,))
    step = TensorDict({"observation": seen}, [2])
    policy.act(step)
    assert step["observation", "proprio"] is seen["proprio"]


def test_stages_get_no_strings():
    model = small_model()
    model.language_format = "strings"
    with pytest.raises(UserError, match="^SmallVLA.language_format: stages read the instruction as bytes"):
        check_policy(VLAPolicy(model), observations(), (3,))


class Remembering(nn.Identity):
    """A part whose state is more than its weights."""

    def __init__(self, state: object):
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state


def test_extra_state_that_no_checkpoint_gives_back_is_refused():
    model = small_model()
    model.memory = Remembering({"version": 1, "seen": [torch.ones(2)]})
    check_policy(VLAPolicy(model), observations(), (3,))
    for state in (io.BytesIO(b"1"), lambda: 1):
        model.memory = Remembering(state)
        with pytest.raises(UserError, match=r"SmallVLA.state_dict: memory._extra_state holds what no .*; let get_"):
            check_policy(VLAPolicy(model), observations(), (3,))


def test_a_modality_the_environment_lacks_is_named():
    with pytest.raises(UserError, match="reads depth, but the environment offers"):
        step = TabletopEnv(2, modalities=["rgb", "proprio"]).reset()
        check_policy(VLAPolicy(SmallVLA(3, modalities=["rgb", "depth"])), step["observation"], (3,))


@pytest.mark.parametrize("wrap", [lambda model: model, ThreeMethods])
def test_a_model_that_does_not_draw_choices_is_refused_where_the_environment_takes_them(wrap):
    for head, choices in (("gaussian", [4, 4, 4]), ("tokens", [4, 4, 4])):
        with pytest.raises(
            UserError, match=r"whole numbers from 0 to \[3, 3, 3\], got .*action_choices .*CategoricalHead"
        ):
            check_policy(VLAPolicy(wrap(small_model(head))), observations(), (3,), choices)
    model = SmallVLA(3, token_size=8, hidden_size=32, action_choices=[9, 2, 3]).eval()
    check_policy(VLAPolicy(wrap(model)), observations(), (3,), [9, 2, 3])
    with torch.no_grad():
        model.action_head.logits[-1].bias.view(3, 9)[0, 8] = 99.0
    with pytest.raises(UserError, match=r"from 0 to \[4, 1, 2\], got 8"):
        check_policy(VLAPolicy(wrap(model)), observations(), (3,), [5, 2, 3])
