"""research/training/parallel.py, sharding.py and minibatches.py: two processes take the steps that one would.

Both start once, for all tests here: what each case came to is in one dict.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from assembling import share_of
from collecting_worlds import Delivering
from tensordict import TensorDict
from torch import nn
from worlds import freeze_with_residual, reach_env, reach_policy

from agents.critic import detach_value_head, find_value_head, scores
from agents.policy import VLAPolicy
from agents.small_vla import SmallVLA
from research.config import AlgorithmConfig, ExperimentConfig, LoRAConfig, PPOConfig, TrainerConfig
from research.errors import UserError
from research.training.algorithm import Progress
from research.training.asynchronous import AsynchronousRollouts
from research.training.audit import FreezeAudit
from research.training.episodes import EpisodeStatistics
from research.training.freezing import HEADS, freeze, named_parameters_within, parameter_groups
from research.training.loss import make_loss
from research.training.minibatches import minibatches
from research.training.parallel import ALONE, PeerEnded, World, join
from research.training.ppo import PPO, PolicyUpdate
from research.training.rollout import Rollouts
from research.training.sharding import Sharding, blocks_that_run
from research.training.vtrace import VTraceAdvantages

pytestmark = pytest.mark.slow

ROWS = 48
# name -> freeze scope, changes of the configuration, rows of rank 0
CASES = {
    "none": ("none", {}, 24),
    "vision": ("vision", {}, 24),
    "backbone": ("backbone", {}, 24),
    "lora": ("lora", {}, 24),
    "residual": ("residual", {}, 24),
    "value_warmup": ("none", {"value_warmup_iterations": 1}, 24),
    "target_kl": ("none", {"target_kl": 0.008}, 24),
    "micro_batches": ("none", {"micro_batch_size": 8}, 24),
    "unequal_rows": ("none", {}, 33),
    "trunk": ("none", {"critic_gradient": "trunk"}, 24),
}


class OddEntries(nn.Module):
    """Entries of a `state_dict` that no message takes as they are."""

    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 4), 1.0 + rank).t())
        self.register_buffer("mask", torch.ones(1, 3).expand(500, 3))
        self.register_buffer("short", torch.full((2,), rank, dtype=torch.int16))
        self.register_buffer("scalar", torch.tensor(1.0 + rank))

    def get_extra_state(self) -> dict:
        return {"version": 1}


class Blocks(nn.Module):
    """Equal layers that run as modules, and equal layers whose weights are used without."""

    def __init__(self):
        super().__init__()
        self.run = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.read = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.run, *self.mixed]:
            x = layer(x)
        return x @ self.read[0].weight @ self.read[1].weight


def observations(rows: int) -> TensorDict:
    generator = torch.Generator().manual_seed(rows)
    rgb = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return TensorDict({"rgb": rgb, "proprio": torch.randn(rows, 3, generator=generator)}, [rows])


def make_ppo(scope: str, changes: dict, rows: int, world: World, sharded: bool) -> tuple[PPO, VLAPolicy, FreezeAudit]:
    """PPO as `algorithms.make_ppo` wires it, with one minibatch an epoch."""
    changes = dict(changes)
    to_head = changes.pop("critic_gradient", "head") == "head"
    torch.manual_seed(0)
    model = SmallVLA(2, modalities=["rgb", "proprio"], proprio_dim=3, hidden_size=16).eval()
    few = observations(2)
    head = find_value_head(model, few)
    if scope == "residual":
        frozen = freeze_with_residual(model, few)
    else:
        frozen = freeze(model, scope, heads=HEADS, lora=LoRAConfig())
    policy = VLAPolicy(model)
    cfg = PPOConfig(batch_size=rows, n_epochs=2, learning_rate=1e-4, max_grad_norm=0.5, **changes)
    optimizer = torch.optim.Adam(parameter_groups(model, cfg.learning_rate, {}), eps=1e-5, fused=True)
    value = [p for p in named_parameters_within(model, head).values() if p.requires_grad]
    apart = to_head and not detach_value_head(model, value, few)
    assert not apart
    score = policy.actor.score

    def shard() -> Sharding:
        sharding = Sharding(model, score.evaluate, lambda: scores(policy.contract, few), optimizer)
        score.run = sharding.root
        return sharding

    update = PolicyUpdate(
        make_loss(policy.actor, policy.critic, cfg), optimizer, cfg, value, apart, world, shard if sharded else None
    )
    return PPO(None, update, cfg), policy, FreezeAudit(model, frozen, policy.reused_modules, HEADS)


def make_batch(policy: VLAPolicy) -> TensorDict:
    torch.manual_seed(1)
    batch = TensorDict({"observation": observations(ROWS)}, [ROWS])
    with torch.no_grad():
        policy.act(batch)
    batch["action_log_prob"] += 0.1 * torch.randn(ROWS)
    batch = batch.select(*policy.kept_keys, "action", "action_log_prob", "state_value")
    batch["advantage"], batch["value_target"] = torch.randn(ROWS, 1), torch.randn(ROWS, 1)
    return batch


def weights_after(case: str, world: World, sharded: bool) -> tuple[dict, dict, dict, dict]:
    """Weights before and after two iterations, the metrics of both, and Adam's state."""
    scope, changes, first = CASES[case]
    share = slice(0, ROWS)
    if world.size > 1:
        share = slice(0, first) if world.leads else slice(first, ROWS)
    ppo, policy, audit = make_ppo(scope, changes, share.stop - share.start, world, sharded)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    batch = make_batch(policy)[share]
    metrics = [ppo.update(batch, Progress(2, iteration)) for iteration in range(2)]
    audit.check("after two iterations")
    after = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    saved = ppo.whole(audit.trained_state())
    assert saved and all(torch.equal(weight, after[name]) for name, weight in saved.items() if name in after)
    audit.check("after saving")
    assert policy.act(TensorDict({"observation": observations(2)}, [2]))["action"].isfinite().all()
    return before, after, metrics, ppo.state_dict()


def furthest(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def compare(case: str, world: World) -> dict:
    before, alone, expected, state = weights_after(case, ALONE, False)
    found = {"still": {name for name in alone if torch.equal(alone[name], before[name])}, "steps": expected}
    for way, sharded in (("averaged", False), ("sharded", True)):
        _, after, metrics, own = weights_after(case, world, sharded)
        adam = [(state["state"][i], own["state"][i]) for i in state["state"]]
        found[way] = {
            "furthest": furthest(alone, after),
            "still": {name for name in after if torch.equal(after[name], before[name])},
            "metrics": metrics,
            "adam": max(furthest(*({k: v for k, v in one.items() if k != "step"} for one in pair)) for pair in adam),
        }
    return found


def everything(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2)
    found = {case: compare(case, world) for case in CASES}
    numbers = torch.arange(10.0)[slice(0, 3) if rank == 0 else slice(3, 10)]
    found["moments"] = [float(x) for x in world.moments(numbers)]
    found["shares"] = world.gather(list(world.shares(range(5))))
    found["reductions"] = [world.total(rank + 1), world.largest(-rank), world.leaders(rank)]
    found["statistics"] = episodes_of(world)
    found["staleness"], found["behaviour"] = staleness_of(world), behaviour_of(world)
    found["minibatches"] = world.gather([len(m) for m, _ in minibatches(make_rows(9 if rank else 4), 3, world)])
    few = make_rows(7 if rank else 1)
    found["few"] = world.gather([(len(m), weight) for m, weight in minibatches(few, 3, world, normalise=True)])
    model = nn.BatchNorm1d(2)
    nn.init.constant_(model.weight, 1.0 + rank)
    model.running_mean += rank
    world.start_alike(model)
    found["alike"] = world.gather([model.weight.tolist(), model.running_mean.tolist()])
    odd = OddEntries(rank)
    world.start_alike(odd)
    found["odd"] = world.gather([odd.weight.unique().tolist(), odd.short.tolist(), odd.scalar.item()])
    torch.save(found, f"{folder}/found_{rank}.pt")
    if rank == 1:
        return  # gone without a word
    with pytest.raises(PeerEnded, match="another process of this run has ended"):
        for _ in range(3):
            world.total(1)
    Path(folder, "told").touch()


def make_rows(rows: int) -> TensorDict:
    return TensorDict({"advantage": torch.arange(float(rows))}, [rows])


def episodes_of(world: World) -> list[dict]:
    """Two environments: both of one process, or one of each of two."""
    rows = slice(0, 2) if world.size == 1 else slice(world.rank, world.rank + 1)
    statistics, told = EpisodeStatistics(rows.stop - rows.start, world=world), []
    for reward, done in (([[1, 2], [5, 6]], [[0, 1], [0, 0]]), ([[3, 4], [7, 8]], [[0, 0], [0, 1]])):
        after = {"reward": torch.tensor(reward, dtype=torch.float32)[rows, :, None]}
        after |= {"done": torch.tensor(done, dtype=torch.bool)[rows, :, None]}
        after["success"] = after["done"] & (after["reward"] < 5)
        statistics.observe(TensorDict({"next": after}, [rows.stop - rows.start, 2]))
        told.append(statistics.metrics())
    return told


def staleness_of(world: World) -> dict[str, float]:
    """Rank 0 throws a part away, and rank 1 learns from one of earlier weights."""
    options = {"max_staleness": 1, "seed": 3, "start": Delivering, "world": world}
    rollouts = AsynchronousRollouts(reach_env, 2, reach_policy(), 1, 2 * 3, **options)
    rollouts.policy.version += 2
    versions = [1] if world.rank else [0, 2]
    rollouts.workers.parts = [rollouts.workers.part(0, version, [0, 1]) for version in versions]
    rollouts.next()
    told = ("rollout/st", "rollout/di", "rollout/workers_replaced")
    return {name: value for name, value in rollouts.metrics().items() if name.startswith(told)}


def behaviour_of(world: World) -> list[dict[str, float]]:
    """Of rollouts of two sizes that older weights collected: this rank's, and of both together."""
    policy = reach_policy()
    parts = []
    for steps in (4, 8):
        torch.manual_seed(steps)
        parts.append(Rollouts(reach_env(), policy, 4 * steps).next())
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    both = torch.cat(parts, dim=1)
    prepared = [(parts[world.rank], world), (both, ALONE)]
    return [VTraceAdvantages(policy, 0.9, 0.8, world=of)(rollout)[1] for rollout, of in prepared]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.start_processes(everything, (str(folder),), nprocs=2, start_method="spawn")
    assert (folder / "told").exists()
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("way", ["averaged", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(found, case, way):
    for rank in range(2):
        one, two = found[rank][case], found[rank][case][way]
        assert two["furthest"] < 1e-6 and two["adam"] < 1e-6
        assert two["still"] == one["still"]  # every trained tensor has moved, and no frozen one
        for expected, metrics in zip(one["steps"], two["metrics"], strict=True):
            assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_cases_are_what_they_say(found):
    heads = ("action_head", "value_head", "log_std")
    still = {case: found[0][case]["still"] for case in CASES}
    assert not any(name.startswith(heads) for case in CASES if case != "residual" for name in still[case])
    residual = still["residual"] - still["backbone"]
    assert still["backbone"] < still["residual"] and all(name.startswith("action_head.") for name in residual)
    assert not still["none"] and not still["trunk"] and all(n.startswith("vision") for n in still["vision"])
    assert still["vision"] and still["vision"] < still["backbone"]
    steps = {case: [m["train/gradient_steps"] for m in found[0][case]["steps"]] for case in CASES}
    assert steps["none"] == [2.0, 2.0] and steps["target_kl"] == [1.0, 0.0]
    warm, moving = found[0]["value_warmup"]["steps"]
    assert warm["train/grad_norm/action_head"] == 0.0 < moving["train/grad_norm/action_head"]


def test_what_ranks_tell_each_other(found):
    for rank in range(2):
        numbers = torch.arange(10.0)
        assert found[rank]["moments"] == pytest.approx([numbers.mean().item(), numbers.std().item()])
        assert found[rank]["shares"] == [[0, 1], [2, 3, 4]]
        assert found[rank]["reductions"] == [3, 0, 0]
        assert found[rank]["statistics"] == episodes_of(ALONE) != [{}, {}]
        assert found[rank]["alike"] == [[[1.0, 1.0], [0.0, 0.0]]] * 2
        assert found[rank]["odd"] == [[[1.0], [0, 0], 1.0]] * 2


def test_what_is_told_of_stale_rollouts_is_of_all_ranks(found):
    for rank in range(2):
        told = {"rollout/staleness_mean": 0.5, "rollout/staleness_max": 1.0, "rollout/discarded": 6.0}
        assert found[rank]["staleness"] == told | {"rollout/workers_replaced": 2.0}
        shared, expected = found[rank]["behaviour"]
        assert shared == pytest.approx(expected, rel=1e-4) and expected["rollout/behaviour_kl"] > 1e-4


def test_ranks_with_unequal_rows_have_as_many_minibatches(found):
    """The one with 9 rows needs three of 3; the other divides its 4 in three."""
    assert found[0]["minibatches"] == [[2, 1, 1], [3, 3, 3]]


def test_a_rank_with_fewer_rows_than_minibatches_takes_all_steps_and_counts_in_those_where_it_has_rows(found):
    """One row of 8 in three minibatches: of 1 + 3, 0 + 2 and 0 + 2 rows."""
    assert found[0]["few"] == [[(1, 0.5), (1, 0.0), (1, 0.0)], [(3, 1.5), (2, 2.0), (2, 2.0)]]


def test_alone_nothing_is_exchanged():
    x = torch.randn(7)
    assert ALONE.total(3) == 3 and ALONE.largest(2) == 2 and ALONE.gather("a") == ["a"] and ALONE.leaders(1) == 1
    assert [a.item() for a in ALONE.moments(x)] == [x.mean().item(), x.std().item()]
    assert not dist.is_initialized()


def test_rows_that_collectors_of_several_processes_cannot_share_are_refused():
    trainer = {"num_envs": 6, "num_collectors": 2, "buffer_size": 24, "buffer_type": "vla"}
    config = ExperimentConfig(trainer=TrainerConfig(**trainer), algorithm=AlgorithmConfig(cfg=PPOConfig(batch_size=12)))
    with pytest.raises(
        UserError, match=r"trainer.num_envs: 6 cannot be shared among 2 processes with .*collectors = 2"
    ):
        share_of(config, World(rank=0, size=2))


def test_seeds_of_ranks_differ_and_are_such_as_all_generators_take():
    for seed in (0, 1, 2**32 - 1):
        seeds = [World(rank, 4).own_seed(seed) for rank in range(4)]
        assert seeds[0] == seed and len(set(seeds)) == 4 and not {seed - 1, seed + 1} & set(seeds)
        for own in seeds:
            np.random.default_rng(own), np.random.seed(own), torch.manual_seed(own)


def test_processes_without_a_gpu_or_without_each_other_are_told_so_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"trainer\.device: each process takes a GPU of its own, .* has 2; start"):
        join("auto")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 3, but .* do not find each other .*RANK.* by torchrun"):
        join("cpu")


def test_what_cannot_be_divided_is_named():
    assert World(0, 4).divide(64, "trainer.num_envs") == 16
    with pytest.raises(UserError, match=r"trainer\.num_envs: 65 cannot be divided among 4 processes"):
        World(0, 4).divide(65, "trainer.num_envs")


def test_blocks_are_layers_that_run_as_modules():
    model = Blocks()
    assert blocks_that_run(model, lambda: model(torch.ones(1, 2))) == list(model.run)
    assert not any(module._forward_hooks for module in model.modules())
