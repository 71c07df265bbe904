"""What a run is told to need is what it takes."""

from __future__ import annotations

import memory_tables
import pytest
import torch
from accounting import kept_bytes, model_of_shapes, needs_of_run, offered_by, parts_of
from accounting_imitation import needs_of_imitation, sample_of
from building import make_model
from torch.utils._python_dispatch import _disable_current_modes
from worlds import ROOT, small_model

from agents.live_bytes import LiveBytes, bytes_of
from agents.loading import import_model_class
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from envs import make_env
from envs.tabletop import TabletopEnv
from research.config import ExperimentConfig
from research.errors import UserError
from research.imitation.cloning import clone
from research.imitation.config import CloningConfig
from research.options import parse_config
from research.schema import OBSERVATION
from research.training.freezing import freeze
from research.training.rollout import Rollouts

CPU = torch.device("cpu")
CONFIGS = ROOT / "experiments" / "configs"


def configured(name: str, *flags: str) -> ExperimentConfig:
    return parse_config(ExperimentConfig, ["--config", str(CONFIGS / f"{name}.json"), "--trainer.device=cpu", *flags])


def needs(config: ExperimentConfig):
    return needs_of_run(config, offered_by(config.trainer.env, config.trainer.env_config, CPU, 1), CPU)


def test_a_residual_is_told_as_a_run_has_it():
    config = configured("pick_place", "--policy.freeze=residual", "--policy.residual.units=16")
    told = needs(config)
    trained = {part.name: part.trained for part in told.parts if part.trained}
    # Two layers and a deviation of three numbers; and the value head, of 128 units.
    assert trained == {"residual": 128 * 16 + 16 + 16 * 3 + 3 + 3, "value_head": 128 * 128 + 128 + 128 + 1}
    assert told.kept["observations"] == 0 and told.kept["features of frozen parts"] == 4 * (128 + 3 + 3)
    assert told.frozen_stages[-1] == "pretrained_mean+pretrained_std"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pick_place, none", "pick_place, backbone", "pi0_tiny, backbone", "smolvla_tiny, vision", "openvla_tiny, lora"],
)
def test_bytes_of_an_update_are_those_that_torch_allocates(name):
    smaller = ["--trainer.num_envs=8", "--trainer.buffer_size=64", "--algorithm.cfg.batch_size=32"]
    config = parse_config(ExperimentConfig, [*memory_tables.CHECKED[name], *smaller])
    if config.algorithm.cfg.micro_batch_size:
        config.algorithm.cfg.micro_batch_size = 8
    told, measured, passes, allocated = memory_tables.told_and_measured(config)
    assert told == pytest.approx(measured, rel=0.05)
    assert passes == pytest.approx(allocated, rel=0.05)


@pytest.mark.parametrize("scope", ["vision", "backbone"])
def test_a_rollout_keeps_the_bytes_that_are_told(scope):
    sizes = ["--trainer.num_envs=4", "--trainer.buffer_size=16", "--algorithm.cfg.batch_size=16"]
    config = configured("pi0_tiny", f"--policy.freeze={scope}", *sizes)
    told = needs(config)
    env = make_env("tabletop", 4, config.trainer.env_config, CPU, 1)
    few = env.observation_spec[OBSERVATION].zero()[:2]
    model = make_model(config, few, env.action_spec.shape[1:], CPU, expect_fresh=True).model
    policy = VLAPolicy(model)
    rollout = Rollouts(env, policy, 16).next()
    later = 2 * 4  # the advantage and the value's target
    assert bytes_of(rollout.values(True, True)) / 16 + later == sum(told.kept.values())
    names = {"vision": ["patches"], "backbone": ["patches", "prefix_kv+prefix_seen+prefix_hidden"]}
    assert told.frozen_stages == policy.frozen_stages == names[scope]
    assert told.kept["decisions"] == 4 * 2 * 4 * 8 + 8  # a step of denoising, [2, H, D], and its place


class Unwatched(TabletopEnv):
    """What the simulator itself allocates is not counted."""

    def _step(self, step):
        with _disable_current_modes():
            return super()._step(step)

    def _reset(self, step=None, **options):
        with _disable_current_modes():
            return super()._reset(step, **options)


def test_while_a_rollout_is_collected_it_is_there_once():
    sizes = ["--trainer.num_envs=2", "--trainer.buffer_size=256", "--algorithm.cfg.batch_size=64"]
    told = needs(configured("pick_place", "--policy.freeze=vision", *sizes))
    model = SmallVLA(3).eval()
    freeze(model, "vision")
    rollouts = Rollouts(Unwatched(2, "pick_place", max_steps=1000), VLAPolicy(model), 256)  # no end to value
    rollouts.next()
    with LiveBytes([*model.parameters()]) as live:
        rollouts.next()
    there = told.memory["weights"] + told.memory["optimizer"]
    assert told.collecting - there == pytest.approx(live.peak(), rel=0.15)


def test_micro_batches_shrink_activations_and_leave_the_rest():
    sizes = ["--trainer.buffer_size=512", "--algorithm.cfg.batch_size=256", "--policy.freeze=vision"]
    small, large = (needs(configured("pick_place", *sizes, f"--algorithm.cfg.micro_batch_size={m}")) for m in (16, 64))
    assert small.memory["activations"] == pytest.approx(large.memory["activations"] / 4, rel=0.2)
    for kind in ("weights", "gradients", "optimizer", "rollout", "minibatch"):
        assert small.memory[kind] == large.memory[kind], kind
    assert small.updating < large.updating and small.micro == 16


def test_what_imitation_takes_is_what_is_told():
    observations = TabletopEnv(4, "pick_place").observation_spec[OBSERVATION].zero()
    cloning = CloningConfig(batch_size=64, steps=2)
    model = small_model()
    freeze(model, "vision")
    policy = VLAPolicy(model)
    sample = sample_of(policy, observations, (3,), CPU)
    data = sample[torch.zeros(64, dtype=torch.int64)]
    data[OBSERVATION, "language"][:, 0] = torch.arange(64)  # as many instructions as it reckons with
    with LiveBytes([*model.parameters(), *data.values(True, True)]) as live:
        clone(model, policy.rest, data, cloning)
    options = {"action_dim": 3, "token_size": 8, "hidden_size": 32}
    shapes = model_of_shapes(None, "agents.small_vla.SmallVLA", options)
    freeze(shapes, "vision")
    told = needs_of_imitation(shapes, "vision", cloning, 1000, observations, (3,), CPU)
    assert told.updating - told.memory["weights"] - told.memory["data"] == pytest.approx(live.peak(), rel=0.05)
    assert told.memory["data"] == 1000 * bytes_of(data.values(True, True)) / 64
    assert told.kept == kept_bytes(policy, data) and told.collecting == 0


def test_parts_of_seven_billion_parameters_take_no_memory():
    arguments = configured("openvla").policy.vla_config.model_config
    model = model_of_shapes(None, "agents.openvla.OpenVLA", {"action_dim": 7, **arguments})
    parts = {part.name: part.parameters for part in parts_of(model)}
    assert sum(parts.values()) - parts["value_head"] == 7_541_237_184  # the public checkpoint's, vocabulary 32,064
    freeze(model, "vision", heads=model.heads)
    assert {part.name for part in parts_of(model) if part.trained} == {"projector", "language_model", "value_head"}
    assert all(p.is_meta for p in model.parameters())


def test_absent_files_are_told_and_sizes_taken_from_the_configuration(caplog):
    arguments = {"action_dim": 3, **configured("smolvla").policy.vla_config.model_config}
    assert model_of_shapes(None, "agents.smolvla.SmolVLA", arguments).sizes.chunk_size == 50
    assert "not there: checkpoints/SmolVLM2-500M-Video-Instruct, checkpoints/smolvla_base" in caplog.text
    del arguments["config"]
    with pytest.raises(UserError, match="set pretrained to a folder, or config to the sizes"):
        model_of_shapes(None, "agents.smolvla.SmolVLA", arguments)


@pytest.mark.parametrize("name", ["pi0_tiny", "smolvla_tiny"])
def test_of_a_checkpoint_that_is_there_only_the_sizes_are_read(name, tmp_path):
    vla = configured(name).policy.vla_config
    model = import_model_class(vla.model_class)(action_dim=3, **vla.model_config)
    model.export(tmp_path / "there")
    shapes = model_of_shapes(None, vla.model_class, {"action_dim": 3, "pretrained": str(tmp_path / "there")})
    assert all(p.is_meta for p in shapes.parameters())
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]
