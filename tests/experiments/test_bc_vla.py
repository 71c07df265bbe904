"""Imitation: what it writes can be loaded, evaluated and fine-tuned, and it stops when it succeeds often enough."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import bc_vla
import gymnasium
import numpy as np
import pytest
import torch
from envs_worlds import Guided
from lerobot_worlds import write_v21
from safetensors.torch import load_file
from torch import nn
from worlds import ROOT

from agents.loading import load_vla_model
from agents.provided_weights import weights_sha256
from agents.small_vla import SmallVLA
from envs.vector import VectorEnv
from research.errors import SimulatorFailed, UserError
from research.imitation.experts import collect_rollout

pytestmark = pytest.mark.slow

TINY = [
    "--pointing_steps=3", "--samples=300", "--batch_size=32", "--num_envs=8", "--eval_episodes=4",
    '--env_config={"task": "reach", "image_size": 16, "max_steps": 8, "modalities": ["rgb", "proprio", "language"]}',
]  # fmt: skip


def imitate(folder, *flags: str) -> dict:
    assert bc_vla.main([*TINY, f"--output={folder / 'bc.pt'}", *flags]) == 0
    return json.loads((folder / "bc.json").read_text())


def load(folder, **config) -> SmallVLA:
    return load_vla_model(str(folder / "bc.pt"), "agents.small_vla.SmallVLA", {"action_dim": 3, **config}, "cpu")


def test_the_checkpoint_loads_and_says_how_it_was_made(tmp_path):
    facts = imitate(tmp_path, "--epochs=1", "--seed=3")
    assert facts["config"]["seed"] == 3 and facts["config"]["output"] == "bc.pt"
    assert 0 <= facts["eval/success_low"] <= facts["eval/success_rate"] <= facts["eval/success_high"] <= 1
    assert 0 <= facts["eval_sample/success_rate"] <= 1 and facts["samples"] == 300
    model = load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"] == facts["trained_parameters"]
    assert (model.fusion.proprio_std != 1).all()  # taken from the data


def test_imitation_goes_on_from_a_checkpoint_and_its_statistics(tmp_path):
    imitate(tmp_path, "--epochs=1")
    before = (tmp_path / "bc.pt").rename(tmp_path / "start.pt")
    imitate(tmp_path, f"--model_path={before}", "--seed=5", "--steps=1", "--pointing_steps=0", "--learning_rate=1e-7")
    start = torch.load(before)["model_state_dict"]
    for name, weight in load(tmp_path).state_dict().items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-6, msg=name)


def test_imitation_brings_actions_and_values_closer_to_the_experts(tmp_path):
    errors = []
    for epochs in (1, 12):
        imitate(tmp_path, f"--epochs={epochs}", "--stop_at=1")
        model = load(tmp_path)
        config = bc_vla.parse_config(bc_vla.BCConfig, TINY)
        torch.manual_seed(0)
        env = bc_vla.open_env(config, config.num_envs)
        data = collect_rollout(env, config.samples, config.noise, config.gripper_noise, gamma=config.gamma)
        with torch.no_grad():
            action = (model(data["observation"], deterministic=True) - data["action"][:, 0]).square().mean().item()
            value = (model.get_value(data["observation"]) - data["return"]).square().mean().item()
        errors.append((action, value))
    assert errors[1][0] < 0.8 * errors[0][0] and errors[1][1] < errors[0][1]


def test_imitation_stops_at_the_success_asked_for(tmp_path, monkeypatch):
    watched = []
    evaluate = bc_vla.evaluate
    monkeypatch.setattr(bc_vla, "evaluate", lambda *a, **k: watched.append(a[2]) or evaluate(*a, **k))
    watch = ["--watch_every=2", "--watch_episodes=4"]
    imitate(tmp_path, "--epochs=3", "--stop_at=0", *watch)  # any success is enough
    assert watched == [range(5000, 5004), range(4), range(4)]
    watched.clear()
    imitate(tmp_path, "--epochs=1", "--stop_at=0.99", *watch)
    assert watched.count(range(5000, 5004)) == 4  # in 9 steps


def test_what_stops_it_is_measured_as_what_is_reported(tmp_path, monkeypatch):
    limits = []
    evaluate = bc_vla.evaluate
    monkeypatch.setattr(bc_vla, "evaluate", lambda *a, **k: limits.append(k["max_steps"]) or evaluate(*a, **k))
    imitate(tmp_path, "--steps=2", "--stop_at=0.99", "--watch_every=2", "--watch_episodes=4", "--max_eval_steps=5")
    assert limits == [5, 5, 5]


def never(*arguments, **options):
    raise AssertionError("demonstrations were played")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output={}/there"], "output: .*there should be a file of weights"),
        (["--output={}/a.json"], "output: .*a.json should be a file of weights"),
        (["--output={}/file/a.pt"], r"output: .*a.pt cannot be written: (File exists|Not a directory)"),
        (["--env=gym:Pendulum-v1", "--env_config={{}}", "--pointing_steps=5"], "has no scripted expert"),
        (["--freeze=backbone"], "pointing_steps: all that points is frozen"),
        (["--model_config.action_head=tokens", "--loss=smooth_l1"], "loss: smooth_l1 has no gradient"),
        (["--device=nowhere"], "device: 'nowhere' cannot compute here"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_played(tmp_path, monkeypatch, flags, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(bc_vla, "collect_rollout", never)
    with pytest.raises(UserError, match=message):
        bc_vla.main([*TINY, f"--output={tmp_path / 'bc.pt'}", *(flag.format(tmp_path) for flag in flags)])


def test_a_stop_keeps_what_was_learned(tmp_path, monkeypatch, capsys):
    clone = bc_vla.clone

    def interrupted(*arguments):
        clone(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(bc_vla, "clone", interrupted)
    assert bc_vla.main([*TINY, f"--output={tmp_path / 'bc.pt'}", "--steps=2"]) == 130
    assert "the weights are written as they are" in capsys.readouterr().out
    facts = json.loads((tmp_path / "bc.json").read_text())
    assert load(tmp_path) and facts["samples"] == 300 and "eval/success_rate" not in facts


def test_an_environment_without_success_does_not_stop_it_and_says_so_once(tmp_path, capsys):
    data = write_v21(tmp_path / "data")
    flags = ["--env=gym:" + __name__ + ":Silent", "--env_config={}", f"--demonstrations={data}", "--steps=6"]
    flags += ["--model_class=agents.state_mlp.StateMLP", "--model_config={}", "--pointing_steps=0", "--watch_every=2"]
    assert bc_vla.main([*TINY[1:4], *flags, "--eval_episodes=2", f"--output={tmp_path / 'bc.pt'}"]) == 0
    printed = capsys.readouterr().err
    assert printed.count(f"stop_at: gym:{__name__}:Silent has no success") == 1 and "success 0.00" not in printed
    assert json.loads((tmp_path / "bc.json").read_text())["action_stats"] == "environment"


class Silent(gymnasium.Env):
    """Shows and takes what the data set has, and says nothing of success."""

    observation_space = gymnasium.spaces.Box(-1e3, 1e3, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-50, 50, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), 0.0, False, self.steps == 5, {}


def test_plans_of_several_steps_are_imitated_and_executed_in_part(tmp_path, monkeypatch):
    chunks = []
    evaluate = bc_vla.evaluate
    monkeypatch.setattr(bc_vla, "evaluate", lambda env, *a, **k: chunks.append(env.chunk) or evaluate(env, *a, **k))
    imitate(tmp_path, "--epochs=1", "--stop_at=1", "--horizon=4", "--executed=2")
    model = load(tmp_path, horizon=4, executed=2)
    assert chunks == [2, 2] and (model.action_head.horizon, model.action_head.executed) == (4, 2)


def test_frozen_parts_keep_their_weights(tmp_path):
    torch.manual_seed(5)
    fresh = SmallVLA(3)
    facts = imitate(tmp_path, "--epochs=1", "--stop_at=1", "--pointing_steps=0", "--seed=5", "--freeze=vision")
    model = load(tmp_path)
    same = {name for name, value in model.named_parameters() if torch.equal(value, fresh.get_parameter(name))}
    vision = {name for name, _ in model.named_parameters() if name.startswith("vision_encoder.")}
    assert same == vision | {"action_head.raw_std"}  # of the noise imitation knows nothing
    assert facts["trained_parameters"] == facts["parameters"] - sum(
        p.numel() for p in model.vision_encoder.parameters()
    )


# ------------------------------------------------------------------------------- an expert that plays whole episodes


class Drifting(SmallVLA):
    """Reads what the drifter shows that has the right size, and says that one part is from elsewhere."""

    def __init__(self, action_dim: int = 2, proprio_dim: int = 3):
        super().__init__(action_dim, modalities=["proprio", "language"], proprio_dim=proprio_dim, hidden_size=16)
        with torch.no_grad():
            for p in self.language_encoder.parameters():
                nn.init.constant_(p, 0.01)
        self.provided_weights = {"language_encoder": weights_sha256(self.language_encoder)}


@pytest.fixture
def drift(monkeypatch):
    """An environment of drifters with an expert, in place of the one that is asked for."""
    made = []

    def make_env(name, num_envs, env_config, device, seed=0):
        options = dict(env_config)
        chunk = options.pop("chunk", 1)
        made.append(VectorEnv(partial(Guided, **options), num_envs, 0, seed, device, chunk=chunk))
        return made[-1]

    monkeypatch.setattr(bc_vla, "make_env", make_env)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield made
    for env in made:
        env.close()


EPISODES = [
    "--env=drift", '--env_config={"limit": 20}', f"--model_class={__name__}.Drifting", "--model_config={}",
    "--pointing_steps=0", "--stop_at=1", "--episodes=6", "--num_envs=2", "--eval_episodes=6", "--batch_size=8",
    "--steps=40", "--freeze=language", "--executed=1",
]  # fmt: skip


def test_an_expert_of_simulators_is_imitated_in_every_task(tmp_path, drift):
    output = tmp_path / "drift.safetensors"
    assert bc_vla.main([*EPISODES, f"--output={output}"]) == 0
    facts = json.loads(output.with_suffix(".json").read_text())
    assert set(facts["demonstrations"]) == {"out", "away"}
    assert all(count["episodes"] == 6 for count in facts["demonstrations"].values())
    episodes = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    for mode, prefix in (("mode", "eval"), ("sample", "eval_sample")):
        assert {f"{prefix}/success_rate/out", f"{prefix}/success_rate/away"} < set(facts)
        of_mode = [episode for episode in episodes if episode["mode"] == mode]
        assert [episode["initial_state"] for episode in of_mode] == list(range(6))
        assert sum(episode["success"] for episode in of_mode) / 6 == facts[f"{prefix}/success_rate"]
    assert len(drift) == 1  # one environment for all of it
    assert max(episode["length"] for episode in episodes) > 4
    # What was not trained is left out, and known by its hash.
    names = set(load_file(output))
    assert not any(name.startswith("language_encoder") for name in names) and "value_head.0.weight" in names
    assert facts["provided_weights"] == Drifting().provided_weights
    loaded = load_vla_model(str(output), f"{__name__}.Drifting", {}, "cpu")
    assert torch.equal(loaded.fusion.proprio_mean, load_file(output)["fusion.proprio_mean"])


def test_an_evaluation_has_a_time_limit_of_its_own(tmp_path, drift):
    output = tmp_path / "drift.safetensors"
    assert bc_vla.main([*EPISODES, "--steps=2", "--max_eval_steps=4", f"--output={output}"]) == 0
    episodes = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert {episode["length"] for episode in episodes} == {4} and len(episodes) == 12
    assert json.loads(output.with_suffix(".json").read_text())["samples"] > 48  # demonstrations are as long as ever


def test_what_was_learned_is_there_though_its_evaluation_breaks(tmp_path, drift, monkeypatch):
    monkeypatch.setattr(bc_vla, "evaluate", lambda *args, **options: (_ for _ in ()).throw(SimulatorFailed("broke")))
    output = tmp_path / "drift.safetensors"
    with pytest.raises(SimulatorFailed):
        bc_vla.main([*EPISODES, f"--output={output}"])
    facts = json.loads(output.with_suffix(".json").read_text())
    assert "value_head.0.weight" in load_file(output) and "eval/success_rate" not in facts and facts["samples"] > 0


def test_it_imitates_what_the_expert_would_have_done_without_its_noise(tmp_path, drift, monkeypatch):
    seen = []
    clone = bc_vla.clone
    monkeypatch.setattr(bc_vla, "clone", lambda m, r, data, *a: seen.append(data) or clone(m, r, data, *a))
    flags = ["--first_state=7000", "--noise=0.7", "--noise_probability=1", "--wander=0", "--only_successful=false"]
    bc_vla.main([*EPISODES, *flags, f"--output={tmp_path / 'a.safetensors'}"])
    (data,) = seen
    assert (data["action"][:, 0, 0] == 0.25).all() and len(data["episode"].unique()) == 12
    starts = data["observation", "proprio"][data["observation", "proprio"][:, 2] == 0]
    expected = [np.random.default_rng(state).uniform(-0.5, 0.5, 2) for state in range(7000, 7012)]
    assert np.allclose(starts[:, :2], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--first_state=3"],
            r"first_state: demonstrations start from the ids 3 to 14 and meet those of eval_episodes",
        ),
        (["--first_state=4995", "--stop_at=0.5"], r"and meet those of watch_episodes, 5000 to 5127"),
        (["--first_state=9990"], r"ids 9990 to 10001, but training draws those from 10000 on"),
        (["--output=a.pt"], r"output: a.pt should end in .safetensors"),
        (["--loss=smooth_l1", '--env_config={"chunk": 2}'], r"env_config.chunk: give it as executed"),
        (["--horizon=1", "--executed=2"], r"horizon: 1 steps are planned and executed = 2 are executed"),
        (["--eval_episodes=0"], r"eval_episodes: 0 makes no environment"),
        (["--freeze=lora"], r"freeze: adapters are made for reinforcement learning"),
        (["--freeze=residual"], r"freeze: .*reinforcement learning, and residuals"),
        (["--freeze=visoin"], r"^freeze: .*visoin"),
    ],
)
def test_what_cannot_be_is_refused(drift, flags, message):
    with pytest.raises(UserError, match=message):
        bc_vla.main([*EPISODES, "--output=a.safetensors", *flags])


def test_an_environment_without_an_expert_is_refused(tmp_path):
    with pytest.raises(UserError, match="no scripted expert"):
        bc_vla.main([*TINY[:-1], "--env=gym:Pendulum-v1", f"--output={tmp_path / 'bc.pt'}", "--env_config={}"])


def test_another_environment_keeps_no_settings_of_the_default_one(tmp_path):
    """Pendulum has no task: what is refused is that it has no expert, as nobody said anything of a task."""
    for flags in (["--env=gym:Pendulum-v1"], [f"--config={tmp_path / 'my.json'}"]):
        (tmp_path / "my.json").write_text('{"env": "gym:Pendulum-v1"}')
        with pytest.raises(UserError, match="no scripted expert"):
            bc_vla.main([*TINY[:-1], *flags, "--model_config.modalities=[proprio]", f"--output={tmp_path / 'bc.pt'}"])


def test_options_of_the_environment_are_named_as_here(tmp_path):
    with pytest.raises(UserError, match=r"^env_config\.task: expected one of reach, push, pick_place, got 'fly'"):
        bc_vla.main(["--env_config.task=fly", f"--output={tmp_path / 'a.pt'}"])


# ------------------------------------------------------------------------------------------------------ data sets


def test_a_data_set_is_imitated_without_an_environment(tmp_path, monkeypatch):
    data, seen = write_v21(tmp_path / "data"), []
    clone = bc_vla.clone
    monkeypatch.setattr(bc_vla, "clone", lambda m, r, data, *a: seen.append(data) or clone(m, r, data, *a))
    flags = [
        f"--demonstrations={data}",
        "--eval_episodes=0",
        "--lerobot.action_stats=min_max",
        "--lerobot.image_size=16",
    ]
    facts = imitate(
        tmp_path, *flags, "--pointing_steps=0", "--model_config={}", "--steps=3", "--executed=2", "--horizon=3"
    )
    assert facts["action_stats"] == "min_max" and facts["action_high"] == [25.0, -3.0] and facts["samples"] == 15
    assert seen[0]["action"].shape == (15, 3, 2) and seen[0]["action"].abs().max() == 1
    assert not any(name.startswith("eval") for name in facts)
    cameras = sorted(key for key in seen[0]["observation"].keys() if key.startswith("rgb"))
    assert len(cameras) == 2
    load(tmp_path, action_dim=2, executed=2, horizon=3, modalities=[*cameras, "proprio", "language"])


def test_a_data_set_has_to_show_what_the_environment_shows(tmp_path):
    data = write_v21(tmp_path / "data")
    with pytest.raises(UserError, match=r"demonstrations: 'rgb' is .*\[32, 32, 3\].*\[16, 16, 3\]"):
        imitate(tmp_path, f"--demonstrations={data}", "--pointing_steps=0")


def test_the_recipe_for_meta_world_is_read():
    config = bc_vla.parse_config(bc_vla.BCConfig, [f"--config={ROOT}/experiments/configs/metaworld_bc.json"])
    assert config.env == "metaworld" and config.executed == 4 and len(config.env_config["task"]) == 3


def test_a_size_that_is_not_the_environments_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"^model_config\.action_dim is 7, but the environment takes actions of 3"):
        bc_vla.main(["--model_config.action_dim=7", f"--output={tmp_path / 'a.pt'}", "--samples=64"])
