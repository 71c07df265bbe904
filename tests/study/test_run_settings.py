"""Which settings of a run a comparison keeps, and what all runs share of them."""

import numpy as np
from study_worlds import make_run

from research.config import FREEZE_PRESETS
from research.study.run_settings import DEFAULTS, is_option, settings_of, value_of
from research.study.run_sources import read_folders


def test_an_option_that_a_configuration_lacks_is_at_its_default(tmp_path):
    """A run of an earlier version and one of today are repetitions, if today's has the default of what is new."""
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new", seed=2, algorithm__cfg__gae_lambda=0.95)
    assert all(run.settings == {} and run.common == {} for run in read_folders([str(tmp_path)]))
    other = make_run(tmp_path / "other", seed=3, algorithm__cfg__gae_lambda=0.9)
    runs = {run.folder.path: run.settings for run in read_folders([str(tmp_path)])}
    assert runs == {path: {"algorithm.cfg.gae_lambda": v} for path, v in ((old, 0.95), (new, 0.95), (other, 0.9))}


def test_settings_that_differ_are_apart_from_those_that_all_runs_share(tmp_path):
    shared = {"trainer__num_envs": 7, "policy__vla_config__model_config": {"width": 3}}
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}", seed=seed, **shared, algorithm__cfg__ent_coef=float(seed))
    for seed, run in enumerate(read_folders([str(tmp_path)]), 1):
        assert run.settings == {"algorithm.cfg.ent_coef": float(seed)}
        assert run.common == {"policy.vla_config.model_config.width": 3, "trainer.num_envs": 7}
        assert value_of(run, "trainer.num_envs") == (True, 7) and value_of(run, "policy.lora.rank") == (False, None)
        assert value_of(run, "trainer.env_config.task") == (True, "pick_place")


def test_where_a_checkpoint_lies_and_what_is_not_learned_from_are_not_kept():
    config = {"policy.vla_config.model_path": "/home/me/a.pt", "trainer.run_dir": "x", "_wandb": 1, "trainer.seed": 3}
    kept = settings_of(config, "none")
    assert kept["policy.vla_config.model_path"] == "a.pt"
    assert not {"trainer.run_dir", "_wandb", "trainer.seed", "policy.freeze", "trainer.env_config"} & set(kept)


def test_adapters_and_the_residual_policy_have_settings_only_where_they_are():
    def has(scope, name):
        return any(key.startswith(f"policy.{name}.") for key in settings_of({}, scope))

    assert {scope for scope in FREEZE_PRESETS if has(scope, "lora")} == {"lora"}
    assert {scope for scope in FREEZE_PRESETS if has(scope, "residual")} == {"residual"}
    assert has("vision+lora", "lora")


def test_every_option_of_every_algorithm_is_one_and_entries_of_free_form_ones_are():
    assert set(DEFAULTS) == {"ppo", "grpo"}
    for name in ("algorithm.cfg.group_size", "algorithm.cfg.gae_lambda", "trainer.env_config.chunk", "policy.freeze"):
        assert is_option(name)
    for name in ("algorithm.cfg.group", "chunk", "policy.freeze.x", ""):
        assert not is_option(name)


def test_settings_of_a_run_that_cannot_be_read_count_for_nothing(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}", seed=seed, final=np.ones(40))
    (make_run(tmp_path / "bad", seed=3) / "config.json").write_text("{")
    assert all(run.settings == {} for run in read_folders([str(tmp_path)]))


def test_sizes_of_the_environment_are_the_same_said_or_not(tmp_path):
    make_run(tmp_path / "said", policy__action_dim=3, policy__vla_config__model_config={"action_dim": 3, "width": 8})
    make_run(tmp_path / "told", seed=2, policy__vla_config__model_config={"width": 8})
    runs = read_folders([str(tmp_path)])
    assert len(runs) == 2 and all(run.settings == {} for run in runs)
    assert all(run.common == {"policy.vla_config.model_config.width": 8} for run in runs)
