"""Which settings of a run a comparison keeps, and what all runs share of them."""

import numpy as np
import pytest
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
    assert kept["policy.vla_config.model_path"] == "me/a.pt"
    assert not {"trainer.run_dir", "_wandb", "trainer.seed", "policy.freeze", "trainer.env_config"} & set(kept)


def starts_of(tmp_path, *paths) -> list[str]:
    """What is left of start checkpoints in the settings of runs that are read together."""
    for seed, path in enumerate(paths):
        make_run(tmp_path / f"{seed}", seed=seed, policy__vla_config__model_path=path)
    return [value_of(run, "policy.vla_config.model_path")[1] for run in read_folders([str(tmp_path)])]


@pytest.mark.parametrize(
    ("paths", "kept"),
    [
        (("/home/me/a.pt", "/root/b.pt"), ["a.pt", "b.pt"]),
        (("/home/me/project/a.pt", "/root/project/a.pt"), ["a.pt", "a.pt"]),  # two machines
        (("x/clone_40/policy.pt", "x/clone_75/policy.pt"), ["clone_40/policy.pt", "clone_75/policy.pt"]),
        (("runs/A/checkpoints/step_1", "runs/B/checkpoints/step_1"), ["A/checkpoints/step_1", "B/checkpoints/step_1"]),
        (("a/runs/A/checkpoints/step_1", "b/runs/A/checkpoints/step_1"), ["step_1", "step_1"]),
    ],
)  # fmt: skip
def test_starts_keep_what_tells_them_apart_on_any_machine(tmp_path, paths, kept):
    assert starts_of(tmp_path, *paths) == kept


def test_only_the_switches_of_scopes_are_taken_for_the_scope():
    prefix = "policy.vla_config.model_config."
    kept = settings_of(dict.fromkeys((f"{prefix}freeze_layers", f"{prefix}freeze_language_model"), True), "none")
    assert kept[f"{prefix}freeze_layers"] is True and f"{prefix}freeze_language_model" not in kept


def test_the_order_of_frozen_parts_makes_no_scope(tmp_path):
    for seed, parts in enumerate((["language_encoder", "vision_encoder"], ["vision_encoder", "language_encoder"])):
        make_run(tmp_path / f"{seed}", parts, seed=seed)
    assert {run.scope for run in read_folders([str(tmp_path)])} == {"language_encoder+vision_encoder"}


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
