"""Whatever a sweep file, a runs.csv or a run folder holds: it is read, or refused in one line, and nothing else.

`pytest --hypothesis-profile=faults tests/study/test_anything.py` looks for more.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import sweep_local
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from study_worlds import config_of, make_run

from research.errors import UserError
from research.study.comparison import compare
from research.study.report import markdown_table
from research.study.run_sources import read_folders
from research.study.run_table import read_table, write_table
from research.study.sweep_file import check_options, load_sweep
from research.study.tables import arm_table, pair_table, ranking, split_pair_table, split_table

ODD = [
    None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "..", "a/b",
    "\ud800", "\0", "`|<script>\n", [], {}, [[]], {"a": {}}, "1e-5", "2001-01-01", "none", [1, "x"],
]  # fmt: skip
SCALARS = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three run folders, and the table of them."""
    folder = tmp_path_factory.mktemp("anything")
    for seed in (1, 2, 3):
        make_run(folder / f"runs/{seed}", seed=seed, trainer__num_eval_episodes=6)
    write_table(folder / "runs.csv", read_folders([str(folder / "runs")]))
    return folder


def compared(found) -> None:
    """Compare runs and make every text of the report; only a `UserError` of one line may come out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NaN and overflow in statistics warn first
        comparison = compare(found)
        for table in (arm_table, pair_table, split_table, split_pair_table):
            if rows := table(comparison):
                for line in markdown_table(rows):
                    assert "\n" not in line
        assert all("nan" not in line for line in ranking(comparison))


# ---- sweep files

SWEEP = {
    "program": "script.py", "method": "random", "name": "s", "project": "p", "run_cap": 3,
    "metric": {"name": "x", "goal": "maximize", "target": 0.5},
    "parameters": {
        "trainer.seed": {"min": 1, "max": 5, "distribution": "int_uniform"},
        "algorithm.cfg.learning_rate": {"min": 0.1, "max": 1.0, "q": 0.1, "distribution": "q_uniform"},
        "policy.freeze": {"values": ["none", "vision"]},
    },
    "early_terminate": {"type": "hyperband", "max_iter": 9, "s": 2, "eta": 3},
}  # fmt: skip
SNIPPETS = st.sampled_from(
    ["2001-09-09", "2001-99-99", "!!int x", "!!bool x", "!!set {x}", "!!binary aaaa", ".nan", ".inf", "1e-5", "0x_",
     "0x" + "f" * 300, "9" * 400, "9" * 5000, '"\\ud800"', '"\\0"', "&a [*a]", "[" * 500, "{a: 1, a: 2}", "!!str [x]",
     "{<<: 1}", "? [a]", "1:99:99", "1_000", "~", "<<", "| x", "*x"]
)  # fmt: skip


def places(content, path=()):
    """The path of every value in nested dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def sweep_texts(draw) -> str:
    """The YAML of a right sweep in which a few values, names or methods are others, some of them only YAML's own."""
    content, snippets = copy.deepcopy(SWEEP), []
    content["method"] = draw(st.sampled_from(["random", "bayes", "random", "grid"]))
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(places(content))))
        node = content
        for key in parents:
            node = node[key]
        if isinstance(node, dict) and draw(st.booleans()) and len(node) > 1:
            value = node.pop(last)  # left out, or under another name
            if draw(st.booleans()):
                node[draw(st.text(max_size=5))] = value
        elif draw(st.booleans()):
            node[last] = f"@{len(snippets)}@"
            snippets.append(draw(SNIPPETS))
        else:
            node[last] = draw(VALUES)
    try:
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    except (yaml.YAMLError, ValueError):
        text = repr(content)
    for i, snippet in enumerate(snippets):
        text = text.replace(f"'@{i}@'", snippet)
    return text


def read_sweep(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with suppress(UserError):
            sweep = load_sweep(path)
            check_options(sweep, sweep_local.config_of)
            json.dumps(sweep.grid() if sweep.method == "grid" else sweep.corners())
            for parameter in sweep.parameters:
                parameter.distribution()


@given(sweep_texts())
def test_any_values_in_a_sweep_file(text):
    read_sweep(text)


@given(st.text(alphabet=st.sampled_from("abm:{}[]&*!<|>-?'\"\\ \n#%@0123456789.,~\ud800\xff"), max_size=60))
def test_any_text_as_a_sweep_file(text):
    read_sweep(text)


# ---- tables


@given(st.data())
def test_any_cells_in_a_table(runs, data):
    rows = list(csv.reader(io.StringIO((runs / "runs.csv").read_text())))
    for _ in range(data.draw(st.integers(1, 3))):
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        place = data.draw(st.integers(0, len(row) - 1))
        numbers = st.lists(st.floats() | st.integers(), max_size=4).map(lambda values: " ".join(map(str, values)))
        cell = st.text(max_size=12) | numbers | VALUES.map(lambda value: json.dumps(value, default=str))
        row[place] = data.draw(cell | st.sampled_from(["0-0", "5-1", "0110;0101", ";;", "1 2;3 4", "true", "return"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        buffer = io.StringIO()
        csv.writer(buffer).writerows(rows)
        path.write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
        with suppress(UserError):
            compared(read_table(path))


@given(st.binary(max_size=40), st.integers(0, 3000))
def test_any_bytes_in_a_table(runs, noise, place):
    content = (runs / "runs.csv").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        path.write_bytes(content[:place] + noise + content[place + len(noise) :])
        with suppress(UserError):
            compared(read_table(path))


# ---- run folders

FILES = (
    "config.json",
    "metrics.jsonl",
    "episodes.jsonl",
    "summary.json",
    "splits/episodes.jsonl",
    "choosing/episodes.jsonl",
)
KEYS = sorted(
    {
        "trainer__env", "trainer__env_config", "trainer__seed", "trainer__num_eval_episodes", "policy__freeze",
        "policy__vla_config__model_path", "policy__vla_config__model_config", "algorithm__cfg__learning_rate",
        "algorithm__cfg", "trainer", "policy", "algorithm__cfg__anneal_lr",
    }
)  # fmt: skip
FIELDS = (
    "global_step", "time/elapsed_s", "eval/success_rate", "eval/return", "rollout/success_rate", "rollout/episodes",
    "initial_state", "success", "episode_return", "split", "exit_code",
)  # fmt: skip


def with_one_bad_folder(runs: Path, change) -> None:
    """One of three folders is changed: it is read or marked, and the other two are compared."""
    with tempfile.TemporaryDirectory() as name:
        bad = make_run(Path(name) / "bad", seed=9, trainer__num_eval_episodes=6)
        change(bad)
        found = read_folders([str(runs / "runs"), name])
        assert {run.run for run in found if run.complete} >= {"1", "2", "3"} and len(found) == 4
        try:
            compared(found)
            write_table(Path(name) / "runs.csv", found)
            compared(read_table(Path(name) / "runs.csv"))
        except UserError as error:
            assert "differ" in str(error) or "are no repetitions" in str(error)  # a run of something else


@given(st.sampled_from(KEYS), VALUES)
@example("trainer__num_eval_episodes", 10**9)
@example("algorithm__cfg__learning_rate", 10**400)
@example("policy__vla_config__model_path", [])
def test_any_value_in_a_configuration(runs, key, value):
    def change(bad: Path) -> None:
        (bad / "config.json").write_text(json.dumps(config_of(seed=9, **{"trainer__num_eval_episodes": 6, key: value})))

    with_one_bad_folder(runs, change)


@given(st.sampled_from(FILES[1:]), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())
@example("episodes.jsonl", {"global_step": 2000, "initial_state": 10**400, "success": True}, False)
@example("metrics.jsonl", {"global_step": 2000, "eval/success_rate": 3.0, "time/elapsed_s": 300.0}, False)
def test_any_row_in_any_file_of_a_run(runs, file, row, alone):
    def change(bad: Path) -> None:
        (bad / file).parent.mkdir(exist_ok=True)
        with (bad / file).open("w" if alone else "a") as stream:
            stream.write(json.dumps(row) + "\n")

    with_one_bad_folder(runs, change)


@given(st.sampled_from(FILES), st.binary(max_size=30), st.integers(0, 900))
@example("config.json", b"[" * 100_000, 0)
@example("config.json", b"[]", 0)
@example("metrics.jsonl", b'{"global_step": ' + b"9" * 5000 + b"}\n", 0)
@example("summary.json", b"\xff", 0)
@example("episodes.jsonl", b"1\n", 0)
def test_any_bytes_in_any_file_of_a_run(runs, file, noise, place):
    def change(bad: Path) -> None:
        (bad / file).parent.mkdir(exist_ok=True)
        content = (bad / file).read_bytes() if (bad / file).exists() else b""
        (bad / file).write_bytes(content[:place] + noise + content[place + len(noise) :])

    with_one_bad_folder(runs, change)
