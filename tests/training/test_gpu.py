"""On a GPU: the same tables and gradients as on the CPU, CUDA graphs that overwrite nothing, and the main job."""

from __future__ import annotations

import copy

import ppo_vla
import pytest
import torch
from worlds import WRAP, gae, gradients_of, run_folder, small_model, value_head, write_config

from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from envs.tabletop import SPLITS, TabletopEnv
from research.config import PPOConfig
from research.runs.tracking import read_metrics
from research.training.algorithm import Progress
from research.training.evaluation import evaluate
from research.training.freezing import freeze, parameter_groups
from research.training.loss import make_loss
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MODALITIES = ["rgb", "proprio", "language"]
SCOPES = ["none", "vision", "language", "backbone"]
CFG = PPOConfig(n_epochs=2, batch_size=64)


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def policy_on_gpu(scope: str = "none", interface: str = "staged", **options) -> VLAPolicy:
    model = small_model().cuda()
    freeze(model, scope)
    return VLAPolicy(WRAP[interface](model), **options)


def rollouts_on_gpu(policy: VLAPolicy, num_envs: int = 16, steps: int = 8) -> Rollouts:
    torch.manual_seed(1)
    env = TabletopEnv(num_envs, max_steps=5, modalities=MODALITIES, device="cuda")
    return Rollouts(env, policy, num_envs * steps)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["pick_place", "push"])
def test_tables_are_those_on_the_cpu(task, split):
    envs = [TabletopEnv(8, task, "milestones", max_steps=6, split=split, device=d) for d in ("cpu", "cuda")]
    steps = [env.reset() for env in envs]
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        action = 2 * torch.rand(8, 3, generator=g) - 1
        pairs = [env.step_and_maybe_reset(s.set("action", action.to(env.device))) for env, s in zip(envs, steps)]  # noqa: B905
        (here, there), steps = [pair[0]["next"].cpu() for pair in pairs], [pair[1] for pair in pairs]
        assert torch.equal(here["done"], there["done"])
        torch.testing.assert_close(here["reward"], there["reward"])
        seen, drawn = here["observation"], there["observation"]
        assert torch.equal(seen["language"], drawn["language"])
        torch.testing.assert_close(seen["proprio"], drawn["proprio"])
        off = (seen["rgb"].int() - drawn["rgb"].int()).abs()  # rounding may fall on the other side of a half
        assert off.max() <= 1 or (off > 1).float().mean() < 1e-3
        assert (off > 0).float().mean() < 0.02
        assert ((seen["depth"] - drawn["depth"]).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("scope", SCOPES)
def test_reuse_gives_the_gradients_of_recomputing(scope):
    policy = policy_on_gpu(scope, feature_reuse="off")
    rollouts = rollouts_on_gpu(policy)
    batch, _ = gae(policy, CFG)(rollouts.next())
    reusing = policy_on_gpu(scope)
    with torch.no_grad():
        kept = reusing.frozen(batch.copy())
    reused = [g.cpu() for g in gradients_of(reusing, kept)]
    recomputed = [g.cpu() for g in gradients_of(policy_on_gpu(scope, feature_reuse="off"), batch)]
    for a, b in zip(reused, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interface", ["staged", "fused", "methods"])
@pytest.mark.parametrize("scope", ["none", ["vision_encoder"], "backbone"])
def test_graphs_collect_and_train_as_no_graphs_do(interface, scope):
    """What a replay overwrites, such as the features of the steps before, would differ by far more than rounding."""
    losses, batches = [], []
    for compile in (False, True):
        model = small_model().cuda()
        freeze(model, scope)
        policy = VLAPolicy(WRAP[interface](model), compile=compile)
        rollouts = rollouts_on_gpu(policy)
        optimizer = torch.optim.Adam(parameter_groups(model, 1e-3, {}), eps=1e-5, fused=True)
        loss = make_loss(policy.actor, policy.critic, CFG)
        ppo = PPO(gae(policy, CFG), PolicyUpdate(loss, optimizer, CFG, value_head(model), critic_apart=True), CFG)
        for _ in range(3):  # the first runs record
            batch, _ = gae(policy, CFG)(rollouts.next())
            batches.append(batch.clone().cpu())
            losses.append(ppo.update(batch, Progress(iterations=3)))
            rollouts.publish()
    for here, there in zip(batches[:3], batches[3:], strict=True):
        for key in here.keys(include_nested=True, leaves_only=True):
            a, b = here[key].float(), there[key].float()
            close = torch.isclose(a, b, rtol=1e-2, atol=2e-2 * a.abs().max().item())
            assert close.float().mean() > 0.98, key
    for here, there in zip(losses[:3], losses[3:], strict=True):
        assert here["train/loss_critic"] == pytest.approx(there["train/loss_critic"], rel=0.05, abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("scope", ["none", "vision"])
def test_bf16_keeps_the_ratio_at_one(scope, compile):
    policy = policy_on_gpu(scope, autocast="bf16", compile=compile)
    rollouts = rollouts_on_gpu(policy)
    rollouts.next()
    batch, _ = gae(policy, CFG)(rollouts.next())
    losses = make_loss(policy.actor, policy.critic, CFG)(batch[:64])
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=1e-3)
    assert losses["loss_objective"].dtype == torch.float32


def test_evaluation_is_that_of_the_cpu():
    successes = []
    for device in ("cpu", "cuda"):
        env = TabletopEnv(16, "reach", max_steps=10, modalities=MODALITIES, device=device)
        policy = VLAPolicy(small_model().to(device))
        result = evaluate(env, policy.act, range(32), film=2)
        assert len(result.frames) == 2 and result.frames[0].dtype == "uint8"
        successes.append([(e.success, e.length) for e in result.episodes])
    assert sum(a == b for a, b in zip(*successes, strict=True)) >= 31


def test_the_instruction_is_looked_up_on_the_gpu():
    policy, fresh = policy_on_gpu("backbone"), policy_on_gpu("backbone", feature_reuse="off")
    env = TabletopEnv(64, modalities=MODALITIES, device="cuda")
    for _ in range(3):
        step = env.reset()
        torch.testing.assert_close(policy.values(step), fresh.values(step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [[], ["--trainer.compile=on", "--trainer.autocast=bf16"]])
def test_the_main_job_runs_and_resumes(tmp_path, options):
    config = [f"--config={write_config(tmp_path)}", "--trainer.device=cuda", "--trainer.enable_eval=false", *options]
    assert ppo_vla.main(config) == 0
    run = run_folder(tmp_path)
    assert ppo_vla.main([*config, f"--trainer.resume={run}", "--trainer.iterations=5"]) == 0
    rows = [row for row in read_metrics(run) if "train/loss_critic" in row]
    assert [row["global_step"] for row in rows] == [64, 128, 192, 256, 320]


def test_workers_collect_on_the_gpu(tmp_path):
    config = write_config(tmp_path, trainer__buffer_type="vla", trainer__device="cuda", trainer__enable_eval=False)
    assert ppo_vla.main([f"--config={config}"]) == 0
    rows = [row for row in read_metrics(run_folder(tmp_path)) if "rollout/staleness_max" in row]
    assert len(rows) == 3


def test_weights_move_between_devices():
    model = SmallVLA(3, modalities=MODALITIES)
    there = copy.deepcopy(model).cuda()
    there.load_state_dict(model.state_dict())
    observation = TabletopEnv(8, modalities=MODALITIES).reset()["observation"]
    with torch.no_grad():
        values = model.get_value(observation), there.get_value(observation.cuda()).cpu()
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
