"""The worked example of docs/own_robot.md runs as it is printed, only shorter."""

from __future__ import annotations

import json
import re

import before_after
import gymnasium
import numpy as np
import ppo_vla
import pytest
from gymnasium.utils.env_checker import check_env
from sweep_local import LocalSweep
from worlds import ROOT

from research.runs.checkpoint import load_checkpoint
from research.study.sweep_file import load_sweep

PAGE = (ROOT / "docs" / "own_robot.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The three files of the page, in the working directory."""
    robot, policy = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (config,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    for name, text in (("my_robot.py", robot), ("my_policy.py", policy), ("my_robot.json", config)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_example_trains_both_ways_and_is_filmed_as_printed(folder, capsys):
    few = ["--trainer.max_env_steps=4096", "--trainer.num_eval_episodes=8", "--trainer.progress_bar=false"]
    frozen = {}
    for scope in ("none", "vision"):
        flags = ["--config", "my_robot.json", *few, f"--policy.freeze={scope}", f"--trainer.run_dir=runs/{scope}"]
        assert ppo_vla.main(flags) == 0, capsys.readouterr().err
        (run,) = (folder / "runs" / scope).iterdir()
        weights = load_checkpoint(run)["model_state_dict"]
        frozen[scope] = "vision_encoder.0.weight" not in weights
        assert weights["action_head.weight"].shape == (7, 128), "seven commands, as the environment says"
        assert weights["fusion.0.weight"].shape == (128, 32 * 6 * 6 + 7), "and a state of seven numbers"
    assert frozen == {"none": False, "vision": True}
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert {row["instruction"] for row in rows} == {"reach the red square"}
    assert before_after.main([str(run), "--states", "0", "1"]) == 0
    assert (folder / "before_after.gif").stat().st_size > 1000


def test_the_sweep_of_the_example_has_its_six_runs(folder):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / "my_sweep.yaml").write_text(text)
    sweep = LocalSweep(load_sweep("my_sweep.yaml"), workers=1, most=None, storage=None)
    assert sweep.trials.most == 6 and "--config=my_robot.json" in sweep.sweep.words(sweep.sweep.corners()[0])


def test_the_environment_of_the_example_is_one_that_gymnasium_accepts_and_can_be_solved(folder):
    import my_robot

    env = my_robot.ArmOverTable()
    check_env(env, skip_render_check=True)
    solved = 0
    for seed in range(20):
        env.reset(seed=seed)
        for _ in range(env.max_steps):
            wanted = np.clip((env.target - env.pose[:2]) / 0.15, -1, 1)
            _, _, terminated, truncated, info = env.step(np.concatenate([wanted, np.zeros(5)]).astype(np.float32))
            if terminated or truncated:
                break
        solved += info["success"]
    assert solved == 20 and isinstance(env, gymnasium.Env)
