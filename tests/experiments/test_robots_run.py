"""The main script on other simulators: what changes is a JSON, and an episode is that of its id wherever it runs."""

from __future__ import annotations

import json

import evaluate_vla
import ppo_vla
import pytest
from envs_worlds import skip_without_maniskill
from worlds import run_folder

from research.runs.folder import read_rows

SIZES = {
    "num_envs": 4, "buffer_size": 16, "iterations": 2, "num_eval_envs": 3, "num_eval_episodes": 4, "max_eval_steps": 8,
    "use_wandb": False, "progress_bar": False,
}  # fmt: skip
FETCH = {
    "env": "gym:gymnasium_robotics:FetchReachDense-v4",
    "env_config": {
        "keys": {"proprio": ["observation", "desired_goal"]}, "render": [64, 64], "instruction": "reach the red dot",
        "chunk": 2, "max_episode_steps": 8,
    },
}  # fmt: skip
PUSH_CUBE = {
    "env": "maniskill",
    "env_config": {"task": "PushCube-v1", "reward": "dense", "chunk": 2, "max_episode_steps": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [FETCH, PUSH_CUBE], ids=["fetch", "maniskill"])
def test_another_robot_is_another_json(tmp_path, world, capsys):
    if world["env"] == "maniskill":
        skip_without_maniskill()
    config = {
        "trainer": {**world, **SIZES, "run_dir": str(tmp_path / "runs")},
        "policy": {"freeze": "vision", "vla_config": {"model_class": "agents.small_vla.SmallVLA"}},
        "algorithm": {"cfg": {"batch_size": 8}},
    }
    (tmp_path / "my.json").write_text(json.dumps(config))
    assert ppo_vla.main(["--config", str(tmp_path / "my.json")]) == 0, capsys.readouterr().err
    run = run_folder(tmp_path)
    assert list((run / "videos").glob("*.mp4"))
    ends = []
    for rows, workers in ((1, 0), (3, 1)):
        output = tmp_path / f"of_{rows}"
        flags = [f"--trainer.num_eval_envs={rows}", f"--trainer.env_config.workers={workers}", "--film=0"]
        assert evaluate_vla.main([f"--checkpoint={run}", f"--output={output}", *flags]) == 0
        ends.append(read_rows(output / "episodes.jsonl"))
    for one, other in zip(*ends, strict=True):
        assert one["episode_return"] == pytest.approx(other["episode_return"], abs=1e-4)
        assert one | {"episode_return": 0} == other | {"episode_return": 0}
    assert len({round(one["episode_return"], 3) for one in ends[0]}) == 4
