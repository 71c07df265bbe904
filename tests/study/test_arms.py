"""The arms of a comparison, by any option and by several, and the runs that cannot be compared."""

import itertools

import numpy as np
import pytest
from study_worlds import STATES, make_run

from research.errors import UserError
from research.study.arms import arm_of
from research.study.comparison import compare
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.tables import arm_table, pair_table, ranking

GRPO = {"learning_rate": 1e-4, "group_size": 4}


def arms_of(tmp_path, by, **options):
    """The names of arms, best first, and the comparison; the same from the table alone."""
    runs = read_folders([str(tmp_path)])
    comparison = compare(runs, by=by, **options)
    write_table(tmp_path / "runs.csv", runs)
    again = compare(read_table(tmp_path / "runs.csv"), by=by, **options)
    assert arm_table(again) == arm_table(comparison) and pair_table(again) == pair_table(comparison)
    return [result.arm for result in comparison.arms], comparison


def test_runs_are_compared_by_an_option_that_is_a_number(tmp_path):
    for coefficient, seed in itertools.product((0.1, 0.01, 1.0), (1, 2, 3)):
        final = np.arange(STATES) < STATES * (0.9 if coefficient == 0.01 else 0.3)
        make_run(tmp_path / f"{coefficient}-{seed}", seed=seed, final=final, algorithm__cfg__ent_coef=coefficient)
    names, comparison = arms_of(tmp_path, ["algorithm.cfg.ent_coef"])
    assert names == ["ent_coef=0.01", "ent_coef=0.1", "ent_coef=1.0"]
    assert [cell for cell, _ in comparison.cells] == ["ent_coef=0.01", "ent_coef=0.1", "ent_coef=1.0"]
    assert [result.mean.value for result in comparison.arms] == [0.9, 0.3, 0.3]
    pair = comparison.pairs[0]
    assert (pair.first, pair.second, pair.separable) == (*names[:2], True)
    assert arm_table(comparison)[0][0] == comparison.heading == "algorithm.cfg.ent_coef"


def test_several_options_make_an_arm_of_every_combination_that_was_run(tmp_path):
    combinations = [("a.pt", "none"), ("a.pt", "vision"), ("b.pt", "none")]
    for i, (start, scope) in enumerate(combinations):
        for seed in (1, 2):
            path = {"policy__vla_config__model_path": f"/some/where/{start}"}
            make_run(tmp_path / f"{i}{seed}", scope, seed=seed, final=np.arange(STATES) < 10 * (3 - i), **path)
    by = ["policy.vla_config.model_path", "policy.freeze"]
    assert arms_of(tmp_path, by)[0] == ["a.pt, none", "a.pt, vision", "b.pt, none"]
    assert arms_of(tmp_path, by[::-1])[0] == ["none, a.pt", "vision, a.pt", "none, b.pt"]
    with pytest.raises(UserError, match=r'they differ in policy.vla_config.model_path \("a.pt", "b.pt"\)'):
        compare(read_folders([f"{tmp_path}/1*", f"{tmp_path}/2*"]), by=["policy.freeze"])


def test_each_arm_has_a_rate_of_its_own_unless_rates_are_what_is_compared(tmp_path):
    for coefficient, rate, seed in itertools.product((0.1, 1.0), (1e-4, 3e-4), (1, 2)):
        best = (coefficient, rate) in ((0.1, 1e-4), (1.0, 3e-4))
        changes = {"sampled": 0.9 if best else 0.1, "algorithm__cfg__ent_coef": coefficient}
        make_run(tmp_path / f"{coefficient}-{rate}-{seed}", "none", rate, seed, **changes)
    _, comparison = arms_of(tmp_path, ["algorithm.cfg.ent_coef"])
    assert {a.arm: a.learning_rate for a in comparison.arms} == {"ent_coef=0.1": 1e-4, "ent_coef=1.0": 3e-4}
    assert comparison.notes[0].startswith("Each arm's learning rate was chosen by success")
    by = ["algorithm.cfg.learning_rate", "algorithm.cfg.ent_coef"]
    names, comparison = arms_of(tmp_path, by)
    assert set(names) == {f"learning_rate={r}, ent_coef={c}" for r in ("0.0001", "0.0003") for c in (0.1, 1.0)}
    assert not comparison.chooses_rates and not any("chosen" in note for note in comparison.notes)
    assert all(len(result.runs) == 2 for result in comparison.arms)
    with pytest.raises(UserError, match="--by has algorithm.cfg.learning_rate: leave them out"):
        compare(read_folders([str(tmp_path)]), by=by, choosing_seeds=[1])


def test_the_options_that_only_one_algorithm_has_go_with_it(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"ppo{seed}", seed=seed)
        make_run(tmp_path / f"grpo{seed}", seed=seed, algorithm={"name": "grpo", "cfg": GRPO})
    names, comparison = arms_of(tmp_path, ["algorithm.name"])
    assert set(names) == {"ppo", "grpo"}
    (note,) = (note for note in comparison.notes if note.startswith("Besides algorithm.name, rate and seed"))
    assert note.endswith("the runs differ in `algorithm.cfg.group_size`.")  # what else they have alone is as by default
    by = ["algorithm.name", "algorithm.cfg.group_size"]
    assert set(arms_of(tmp_path, by)[0]) == {"ppo, group_size not set", "grpo, group_size=4"}
    make_run(tmp_path / "grpo3", seed=3, algorithm={"name": "grpo", "cfg": GRPO | {"n_epochs": 8}})
    with pytest.raises(UserError, match="are no repetitions: algorithm.cfg.n_epochs is 4 and 8"):
        compare(read_folders([str(tmp_path)]), by=["algorithm.name"])


def test_options_that_both_algorithms_have_must_agree(tmp_path):
    make_run(tmp_path / "ppo")
    make_run(tmp_path / "grpo", algorithm={"name": "grpo", "cfg": GRPO | {"n_epochs": 8}})
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]), by=["algorithm.name"])
    message = "by algorithm.name alone, they differ in algorithm.cfg.n_epochs (8, 4): name in --by what belongs to"
    assert message in str(error.value)
    assert set(arms_of(tmp_path, ["algorithm.name", "algorithm.cfg.n_epochs"])[0]) == {
        "ppo, n_epochs=4", "grpo, n_epochs=8",
    }  # fmt: skip


def test_whole_algorithms_are_compared_recipes_and_all(tmp_path):
    def grpo(advantage):
        return {"name": "grpo", "cfg": GRPO | {"n_epochs": 8, "advantage": advantage}}

    for seed in (1, 2):
        make_run(tmp_path / f"ppo{seed}", seed=seed, policy__learning_rates={"value_head": 1e-3})
        for advantage in ("grpo", "rloo"):
            changes = {"algorithm": grpo(advantage), "trainer__buffer_size": 4096}
            make_run(tmp_path / f"{advantage}{seed}", seed=seed, **changes)
    names, comparison = arms_of(tmp_path, by := ["algorithm", "algorithm.cfg.advantage"])
    assert set(names) == {"ppo", "grpo, grpo", "grpo, rloo"}
    (line,) = (line for line in ranking(comparison) if line.startswith("ppo: "))
    assert line.endswith('against "grpo, grpo", "grpo, rloo"') or line.endswith('against "grpo, rloo", "grpo, grpo"')
    (note,) = (note for note in comparison.notes if note.startswith("Besides algorithm, algorithm.cfg.advantage"))
    for option in ("algorithm.cfg.n_epochs", "policy.learning_rates.value_head", "trainer.buffer_size"):
        assert f"`{option}`" in note
    # Runs of one algorithm have one recipe, and whatever is no part of it is still no difference of algorithms.
    with pytest.raises(UserError, match=r"are no repetitions: algorithm.cfg.advantage is 'grpo' and 'rloo'"):
        compare(read_folders([f"{tmp_path}/ppo*", f"{tmp_path}/grpo1", f"{tmp_path}/rloo2"]), by=["algorithm"])
    changes = {"policy__vla_config__model_path": "other.pt", "policy__learning_rates": {"value_head": 1e-3}}
    make_run(tmp_path / "other", seed=3, **changes)
    with pytest.raises(UserError, match=r"are no repetitions: policy.vla_config.model_path is"):
        compare(read_folders([str(tmp_path)]), by=by)


def test_a_model_class_brings_its_checkpoint_and_arguments_if_all_of_its_runs_have_the_same(tmp_path):
    def model(name, width):
        return {
            "policy__vla_config__model_class": f"agents.{name}", "policy__vla_config__model_path": f"{name}.pt",
            "policy__vla_config__model_config": {"width": width},
        }  # fmt: skip

    for seed, (name, width) in enumerate((("A", 1), ("A", 1), ("B", 2))):
        make_run(tmp_path / f"{seed}", seed=seed, **model(name, width))
    by = ["policy.vla_config.model_class"]
    assert set(arms_of(tmp_path, by)[0]) == {"agents.A", "agents.B"}
    with pytest.raises(UserError, match=r"by policy.freeze alone, they differ in policy.vla_config.model_class \("):
        make_run(tmp_path / "other" / "4", "vision", seed=1, **model("B", 2))
        compare(read_folders([f"{tmp_path}/0", f"{tmp_path}/other"]))
    make_run(tmp_path / "3", "vision", seed=3, **model("B", 4))
    with pytest.raises(UserError, match=r"they differ in policy.vla_config.model_config.width \(1, 2, 4\)"):
        compare(read_folders([f"{tmp_path}/[0-3]"]), by=[*by, "policy.freeze"])


def test_what_only_adapters_have_is_no_difference_to_runs_without_them(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"none{seed}", "none", seed=seed)
        make_run(tmp_path / f"lora{seed}", "lora", seed=seed, policy__lora={"rank": 32})
    names, comparison = arms_of(tmp_path, [])
    assert set(names) == {"none", "lora"}
    assert "Besides scope, rate and seed, the runs differ in `policy.lora.rank`." in comparison.notes
    make_run(tmp_path / "lora+", ["lora", "heads"], policy__lora={"rank": 64})
    assert set(arms_of(tmp_path, ["policy.freeze"])[0]) == {"none", "lora", "lora+heads"}


def test_an_option_of_the_environment_is_compared_where_that_is_asked(tmp_path):
    for chunk, seed in itertools.product((1, 4), (1, 2)):
        make_run(tmp_path / f"{chunk}{seed}", seed=seed, trainer__env_config={"task": "reach", "chunk": chunk})
    names, comparison = arms_of(tmp_path, ["trainer.env_config.chunk"])
    assert set(names) == {"chunk=1", "chunk=4"}
    assert any("The arms differ in the environment (`trainer.env_config.chunk`)" in note for note in comparison.notes)


REFUSED = {
    "algorithm.cfg.entcoef": "--by: there is no option 'algorithm.cfg.entcoef'; did you mean 'algorithm.cfg.ent_coef'?",
    "algorithm.cfg.gamma": "--by: algorithm.cfg.gamma is the same in all 2 complete runs: nothing to compare",
    "policy.freeze": '--by: policy.freeze is the same in all 2 complete runs ("none"): nothing to compare',
    "policy.vla_config.model_config.width": "model_config.width is the same in all 2 complete runs: nothing",
    "trainer.seed": "--by: trainer.seed makes no arms: seeds are the repetitions of each",
    "trainer.env": "--by: trainer.env makes no arms: scores of two environments cannot be compared",
    "policy.learning_rate_factor": "makes no arms: it becomes algorithm.cfg.learning_rate, which may",
    "trainer.iterations_by_scope": "makes no arms: it becomes trainer.iterations, which may",
    "policy.vla_config.model_config.freeze_vision_encoder": "makes no arms: it becomes policy.freeze, which may",
    "trainer.run_dir": "--by: trainer.run_dir makes no arms: it does not change what is learned",
}


@pytest.mark.parametrize(("option", "message"), REFUSED.items(), ids=REFUSED)
def test_what_makes_no_arms_is_refused_in_one_line(tmp_path, option, message):
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}", seed=seed)
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]), by=[option])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_arms_are_named_by_their_values(tmp_path):
    make_run(tmp_path / "a", ["fusion", "heads"], policy__vla_config__strict=False)
    (run,) = read_folders([str(tmp_path)])
    assert arm_of(run, ["policy.freeze"]) == "fusion+heads"
    assert arm_of(run, ["policy.vla_config.strict", "policy.freeze"]) == "strict=false, fusion+heads"
    assert arm_of(run, ["trainer.env_config.chunk"]) == "chunk not set"


# ---- runs that cannot be compared


def test_runs_of_two_sweeps_are_repetitions_however_their_rate_came_about(tmp_path):
    reference = {"vision": 1e-4, "none": 5e-5}
    by_factor = {"policy__learning_rate_by_scope": reference, "policy__learning_rate_factor": 4.0}
    make_run(tmp_path / "a", "vision", 4e-4, seed=1, **by_factor)
    lengths = {"trainer__iterations_by_scope": {"vision": 50, "none": 20}}
    make_run(tmp_path / "b", "vision", 4e-4, seed=2, policy__learning_rate_by_scope={"vision": 4e-4}, **lengths)
    (result,) = compare(read_folders([str(tmp_path)])).arms
    assert [run.seed for run in result.runs] == [1, 2]


def refused(tmp_path, *changes, **common):
    for i, change in enumerate(changes):
        make_run(tmp_path / f"run{i}", **{"seed": i, **common, **change})
    with pytest.raises(UserError) as error:
        compare(read_folders([str(tmp_path)]))
    return str(error.value)


def test_runs_of_different_environments_are_refused(tmp_path):
    message = refused(tmp_path, {}, {}, {"trainer__env": "gym:Reacher-v5"})
    assert message == (
        'these runs cannot be compared, trainer.env differs: "tabletop" in run0 and 1 more; "gym:Reacher-v5" in run2'
    )


def test_runs_with_success_and_runs_with_return_only_are_refused(tmp_path):
    changes = {"trainer__env": "gym:my_env:Reach", "returns": np.ones(STATES)}
    message = refused(tmp_path, {"trainer__env": "gym:my_env:Reach", "trainer__env_config": {}}, changes, changes)
    assert message.endswith('what evaluations measure differs: "success" in run0; "return" in run1 and 1 more')


def test_runs_of_different_env_configs_are_refused(tmp_path):
    message = refused(tmp_path, {}, {"trainer__env_config": {"task": "pick_place", "reward": "sparse"}})
    assert message.endswith('trainer.env_config.reward differs: null in run0; "sparse" in run1')


def test_runs_with_different_evaluation_states_are_refused(tmp_path):
    message = refused(tmp_path, {}, {"trainer__num_eval_episodes": 20})
    assert message.endswith('the initial states of the evaluation differs: "0-39" in run0; "0-19" in run1')


def test_seeds_that_are_no_repetitions_are_refused(tmp_path):
    assert "run0 and run1 are the same seed 7 of scope none, learning rate 0.0001" in refused(
        tmp_path / "twice", {"seed": 7}, {"seed": 7}
    )
    assert (
        "run0 and run1, both scope none, learning rate 0.0001, are no repetitions: algorithm.cfg.n_epochs is 4 and 8"
        in (refused(tmp_path / "unlike", {}, {"algorithm__cfg__n_epochs": 8}))
    )


def test_scopes_that_differ_in_other_settings_are_refused_and_all_of_them_named(tmp_path):
    changes = {"algorithm__cfg__n_epochs": 8, "trainer__num_envs": 128}
    assert refused(tmp_path, {}, {"scope": "vision", **changes}) == (
        "these runs cannot be compared by policy.freeze alone, they differ in algorithm.cfg.n_epochs (4, 8); "
        "trainer.num_envs (64, 128): name in --by what belongs to the comparison, or leave runs out (--where)"
    )


def test_the_freeze_scope_is_a_difference_like_any_other(tmp_path):
    """Else two starts are told apart by what was frozen, and two scopes are seeds of one arm."""
    for i, (start, scope) in enumerate(itertools.product(("a.pt", "b.pt"), ("none", "lora"))):
        for seed in (1, 2):
            changes = {"policy__vla_config__model_path": start}
            changes |= {"policy__lora": {"rank": 32}} if scope == "lora" else {}
            make_run(tmp_path / f"{i}{seed}", scope, seed=seed + 2 * (scope == "lora"), **changes)
    by = ["policy.vla_config.model_path"]
    with pytest.raises(UserError) as error:  # a.pt frozen otherwise than b.pt; what lora has of its own goes with it
        compare(read_folders([f"{tmp_path}/0*", f"{tmp_path}/3*"]), by=by)
    assert str(error.value) == (
        'these runs cannot be compared by policy.vla_config.model_path alone, they differ in policy.freeze ("none", '
        '"lora"): name in --by what belongs to the comparison, or leave runs out (--where)'
    )
    with pytest.raises(UserError, match="01 and 11, both arm a.pt, learning rate 0.0001, are no repetitions: "):
        compare(read_folders([str(tmp_path)]), by=by)
    assert len(arms_of(tmp_path, [*by, "policy.freeze"])[0]) == 4


def test_runs_of_one_seed_that_differ_lack_an_option_and_are_not_one_too_many(tmp_path):
    width = {"policy__vla_config__model_config": {"width": 8}}
    message = refused(tmp_path, {"seed": 1}, {"seed": 1, **width}, {"seed": 1, "scope": "vision"})
    assert "run0 and run1, both scope none, learning rate 0.0001, are no repetitions: policy.vla_config" in message
    with pytest.raises(
        UserError, match="run0 and run2, both arm learning_rate=0.0001, .* are no repetitions: policy.f"
    ):
        make_run(tmp_path / "run3", rate=1e-3)
        compare(read_folders([f"{tmp_path}/run[023]"]), by=["algorithm.cfg.learning_rate"])
