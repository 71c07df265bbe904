"""docs/what_to_freeze.md says what the committed rows say."""

from __future__ import annotations

import re

import numpy as np
import pretraining_study
import pytest
from worlds import ROOT
from written_numbers import interval

from research.study.comparison import compare
from research.study.run_table import read_table
from research.study.statistics import difference_interval, holm

pytestmark = pytest.mark.numbers

RESULTS = ROOT / "experiments" / "results"
STUDY = "131,072 env steps of PPO on `pick_place`"
PAGE = (ROOT / "docs" / "what_to_freeze.md").read_text()


def compared(name: str, choosing: tuple[int, ...] = (), by: tuple[str, ...] = ()):
    return compare(read_table(RESULTS / name / "runs.csv"), choosing_seeds=choosing, by=by)


def row(words: str, question: str = "") -> str:
    """The one row of the page's tables with these words; of those of one question, where that is given."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    if question:
        (first,) = [place for place, line in enumerate(lines) if question in line]
        others = [place for place, line in enumerate(lines) if place > first and not line.startswith("| |")]
        lines = lines[first : others[0]]
    (line,) = [line for line in lines if words in line]
    return line


@pytest.fixture(scope="module")
def study():
    return compared("freeze_learning_rate", (1, 2))


def test_scopes_have_the_success_of_the_study_and_its_verdicts(study):
    names = {arm.arm: f"| `{arm.arm}`" for arm in study.arms} | {"language": "`language`, at the chosen rate"}
    for arm in study.arms:
        line = row(names[arm.arm], STUDY)
        assert interval(arm.mean) in line
        if arm.arm in ("none", "lora", "language"):
            told = set(re.findall(r"`(\w+)`", line.split("|")[-2]))
            assert told == set(arm.separable_from), arm.arm
    with_other = {arm.arm: set(arm.separable_from) for arm in compared("language_rate").arms}
    own = {arm.arm: set(arm.separable_from) for arm in study.arms}
    assert own["backbone"] == {"none", "lora", "language", "vision"}
    assert own["backbone"] - with_other["backbone"] == {"vision"} == own["backbone"] - {"none", "lora", "language"}
    assert own["vision"] == {"none", "lora", "backbone"} and with_other["vision"] == {"none", "lora"}
    for name, lost in (("`backbone` (heads alone)", "vision"), ("`vision`", "backbone")):
        assert f"at the other rate of `language` no longer from `{lost}` |" in row(f"| {name} |", STUDY)


def test_the_heads_alone_are_below_all_and_told_from_vision_in_one_of_two_analyses(study):
    assert study.arms[-1].arm == "backbone"
    p_values = [
        f"{pair.p_value:.3f}"
        for comparison in (study, compared("language_rate"))
        for pair in comparison.pairs
        if (pair.first, pair.second) == ("vision", "backbone")
    ]
    assert "with its chosen rate (p {}), and not with the other (p {}).".format(*p_values) in " ".join(PAGE.split())


def test_splits_tell_the_heads_alone_from_some_and_no_others_apart(study):
    told = [pair for pair in study.split_pairs if pair.split != "train" and pair.p_value < 0.05]
    assert [(pair.split, pair.first, pair.second) for pair in told] == [
        ("vision", "none", "backbone"), ("vision", "vision", "backbone"), ("semantics", "none", "backbone"),
        ("semantics", "lora", "backbone"), ("execution", "lora", "backbone"),
    ]  # fmt: skip
    words = "from `none` and `vision` in `vision`, from `none` and `lora` in `semantics`, from `lora` in `execution`"
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    assert all(words in " ".join(text.split()) for text in (PAGE, results))
    others = [pair for pair in study.split_pairs if pair.split != "train"]
    at_once = [p < 0.05 for p in holm([pair.difference.p_value for pair in others])]
    assert len(others) == 30 and [pair for pair, is_left in zip(others, at_once, strict=True) if is_left] == [
        pair for pair in others if (pair.split, pair.first, pair.second) == ("semantics", "lora", "backbone")
    ]


def test_the_longer_run_is_not_compared_at_the_time_of_a_short_one(study):
    longer = read_table(RESULTS / "main_job" / "runs.csv")
    none = next(arm for arm in study.arms if arm.arm == "none")
    seconds, of_none = (np.mean([run.eval_seconds[-1] for run in runs]) for runs in (longer, none.runs))
    then = np.mean([run.mean_at("seconds", of_none) for run in longer])
    text = " ".join(PAGE.split())
    assert f"took {seconds:.0f} s in the mean, {seconds / of_none:.1f} times as long as `none` here" in text
    assert f"after {of_none:.0f} s, its rates still high, it was at {then:.3f}, where `none` ended at" in text
    assert f"where `none` ended at {interval(none.mean)}." in text


def test_the_other_rate_of_language(study):
    (chosen,) = [arm for arm in study.arms if arm.arm == "language"]
    (arm,) = [arm for arm in compared("language_rate").arms if arm.arm == "language"]
    assert interval(arm.mean) in row("`language`, at the other rate") and arm.separable_from == ["backbone"]
    higher = difference_interval(arm.scores, chosen.scores)
    assert f"came out {interval(higher)} higher on fresh seeds" in " ".join(PAGE.split()) and higher.low < 0


def test_seconds_and_rates_of_the_scopes(study):
    seconds = {arm.arm: np.mean([run.eval_seconds[-1] for run in arm.runs]) for arm in study.arms}
    said = [
        int(word)
        for word in re.search(
            r"heads alone took (\d+) s, with frozen vision (\d+) s, with everything (\d+)", PAGE
        ).groups()
    ]
    assert said == [round(seconds[name]) for name in ("backbone", "vision", "none")]
    rates = {arm.arm: arm.learning_rate for arm in study.arms}
    assert rates == {"language": 1e-4, "none": 4e-4, "vision": 4e-4, "lora": 1.6e-3, "backbone": 1.6e-3}
    open_at = {arm.arm: {4e-4} & {arm.learning_rate, *(o.learning_rate for o in arm.runners_up)} for arm in study.arms}
    assert {scope for scope, near in open_at.items() if not near} == {"lora"}
    text = " ".join(PAGE.split())
    assert "4e-4 is within two standard errors of the best of all scopes but `lora`" in text
    ends = {
        scope: {run.eval_scores[-1] for run in runs if run.seed in (1, 2)}
        for (scope, rate), runs in study.cells.items() if rate == 1.6e-3
    }  # fmt: skip
    assert {scope for scope, success in ends.items() if success == {0.0}} == {"none", "vision", "language"}
    assert (
        "at 1.6e-3, `lora` and `backbone` are at their best, and `none`, `vision` and `language` at no success" in text
    )
    assert {arm.learning_rate for arm in study.arms if arm.arm in ("lora", "backbone")} == {1.6e-3}
    nones = next(arm for arm in study.arms if arm.arm == "none").runners_up
    assert sorted(o.learning_rate for o in nones) == [2.5e-5, 1e-4] and "of `none` open from 2.5e-5 to 4e-4" in text


@pytest.mark.parametrize(("name", "words"), [("main_job", "Seven times the budget"), ("grpo", "The same by GRPO")])
def test_the_longer_runs(name, words):
    (arm,) = compared(name).arms
    assert interval(arm.mean) in row(words)


def test_the_algorithms_each_at_its_own_rate():
    comparison = compared("algorithms", (1, 2, 3), ("algorithm", "algorithm.cfg.advantage"))
    ppo, *others = comparison.arms
    question = "PPO, GRPO and RLOO at equal env steps"
    lines = [row(question), row("| | GRPO |", question), row("| | RLOO |", question)]
    assert all(interval(arm.mean) in line for arm, line in zip((ppo, *others), lines, strict=True))
    better = [pair.difference for pair in comparison.pairs if pair.first == "ppo"]
    assert "{} and {} better".format(*map(interval, better)) in lines[0]
    assert ppo.separable_from == ["grpo, grpo", "grpo, rloo"]
    assert all(arm.separable_from == ["ppo"] for arm in others) and all("from PPO alone" in line for line in lines[1:])


def test_what_pretraining_is_worth():
    rows = pretraining_study.read_table(RESULTS / "pretraining" / "runs.csv")
    for vision, words, verdict in (("trained", "| trained |", "yes"), ("frozen", "| frozen |", "no")):
        both = [
            pretraining_study.scores(rows, "clone", f"{start}+{vision}", "mode") for start in ("imagenet", "random")
        ]
        worth = difference_interval(*both)
        assert row(words).endswith(f"| {interval(worth)} better from ImageNet | {verdict} |")
        assert (worth.low > 0) == (verdict == "yes")
        if vision == "frozen":
            assert f"worth to a frozen one, {interval(worth)}, three seeds cannot tell from nothing" in " ".join(
                PAGE.split()
            )
    gain = difference_interval(
        *(pretraining_study.scores(rows, "clone", f"imagenet+{vision}", "mode") for vision in ("trained", "frozen"))
    )
    assert f"train them ({interval(gain)} better than frozen, from ImageNet)" in PAGE


def test_what_is_said_beside_what_others_published(study):
    pairs = {(pair.first, pair.second): pair.difference for pair in study.pairs}
    lost = pairs["none", "vision"]
    assert f"same sign, smaller: {-lost.value:.3f} [{-lost.high:.3f}, {-lost.low:.3f}]" in row("VLM4VLA")
    assert f"is not separable from it ({pairs['none', 'lora'].value:.3f} apart)" in " ".join(PAGE.split())
