"""`--dry_run` tells what a run would need, trains nothing and leaves nothing."""

from __future__ import annotations

import json
import re

import bc_vla
import dry_run
import memory_tables
import ppo_vla
import pytest
from accounting import model_of_shapes, parts_of
from building import model_arguments
from worlds import ROOT, write_config

from envs.tabletop import TabletopEnv
from research.errors import UserError
from research.training.freezing import HEADS, freeze


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(printed: str, name: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_a_run_is_told_and_not_begun(elsewhere, capsys):
    path = write_config(elsewhere)
    before = sorted(elsewhere.iterdir())
    assert ppo_vla.main(["--config", str(path), "--policy.freeze=backbone", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    model = {part.name: part for part in _parts(path)}
    for name, part in model.items():
        heads = name in HEADS
        assert numbers(printed, name)[:2] == [f"{part.parameters:,}", f"{part.parameters if heads else 0:,}"]
    assert numbers(printed, "features of frozen parts") != ["0"] and "rollout (64 transitions)" in printed
    assert "activations (of 32 at once)" in printed and "most at once in an update" in printed
    total = re.search(r"time of an iteration: ([\d.e-]+) s, from one step of 8 environments \(([\d.e-]+) s, 8 of them\)"
                      r" and one minibatch \(([\d.e-]+) s, 4 of them\)", printed)  # fmt: skip
    iteration, step, minibatch = map(float, total.groups())
    assert iteration == pytest.approx(8 * step + 4 * minibatch, rel=0.02)
    assert sorted(elsewhere.iterdir()) == before


def test_tasks_that_evaluations_leave_out_are_told_before_a_run_begins(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(TabletopEnv, "task_names", tuple("abc"), raising=False)
    argv = ["--config", str(write_config(elsewhere)), "--dry_run"]
    assert ppo_vla.main([*argv, "--trainer.num_eval_episodes=2"]) == 0
    said = "trainer.num_eval_episodes: 2 evaluation episodes are of 2 of the 3 tasks, "
    assert said in capsys.readouterr().out
    assert ppo_vla.main([*argv, "--trainer.num_eval_episodes=6"]) == 0
    assert "evaluation episodes are" not in capsys.readouterr().out


def _parts(path):
    content = json.loads(path.read_text())["policy"]["vla_config"]
    return parts_of(model_of_shapes(None, content["model_class"], content["model_config"]))


def test_what_does_not_fit_is_not_timed(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(dry_run, "assemble", lambda config: pytest.fail("the real model was built"))
    assert ppo_vla.main(["--config", str(write_config(elsewhere)), "--dry_run"]) == 0
    assert "time: not estimated: the run needs 0.0 GiB on cpu, where 0.0 GiB are free" in capsys.readouterr().out


def test_without_its_files_a_run_is_told_and_not_timed(elsewhere, capsys):
    tiny = json.loads((ROOT / "experiments" / "configs" / "openvla_tiny.json").read_text())
    tiny["policy"]["vla_config"]["model_config"]["pretrained"] = "nowhere"
    (elsewhere / "config.json").write_text(json.dumps(tiny))
    assert ppo_vla.main(["--config", "config.json", "--algorithm.cfg.batch_size=8", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "features of frozen parts" in printed and "time: not estimated: OpenVLA: there is no nowhere" in printed


def test_a_model_that_cannot_imitate_is_refused(elsewhere):
    with pytest.raises(UserError, match="imitation needs stages"):
        bc_vla.main(["--model_class=user_package.odd_models.Plain", "--model_config={}", "--dry_run"])


def test_what_a_run_would_refuse_is_refused(elsewhere, capsys):
    flags = ["--config", str(write_config(elsewhere)), "--dry_run"]
    assert ppo_vla.main([*flags, "--policy.freeze=[nothing_of_that_name]"]) == 2
    assert "error: policy.freeze: 'nothing_of_that_name' matches nothing" in capsys.readouterr().err
    assert ppo_vla.main([*flags, "--trainer.env=gym:NoSuchEnvironment-v0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_imitation_is_told_and_not_begun(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(bc_vla, "collect", lambda *_: pytest.fail("the expert played"))
    assert bc_vla.main(["--freeze=vision", "--batch_size=16", "--samples=1000", "--epochs=2", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert numbers(printed, "vision_encoder")[1] == "0" and "data (1,000 samples)" in printed
    assert "activations (of 16 at once)" in printed and "most at once in collecting" not in printed
    assert re.search(r"time of a gradient step, from one: [\d.e-]+ s, 124 of them: [\d.e-]+ s", printed)
    assert not list(elsewhere.iterdir())


def test_a_flag_that_stands_alone_is_no_option(capsys):
    assert ppo_vla.main(["--dry_run=true"]) == 2
    assert "unknown option --dry_run" in capsys.readouterr().err
    with pytest.raises(UserError, match="unexpected argument '--tables'; there is --check alone"):
        memory_tables.main(["--tables"])


# ------------------------------------------------------------------------------------------------------ docs/models.md


def rows(first_column: str) -> dict[tuple[str, str], list[str]]:
    """A table of docs/models.md, by its first two columns."""
    text = (ROOT / "docs" / "models.md").read_text()
    (table,) = re.findall(rf"^\| {first_column} \|.*?(?=\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {(row[0], row[1]): row for row in cells}


@pytest.mark.numbers
def test_the_table_of_memory_has_the_columns_and_rows_of_its_command():
    table = rows("family")
    assert list(table) == [(family, scope) for family in memory_tables.FULL_SIZE for scope in memory_tables.SCOPES]
    assert all(len(row) == len(memory_tables.COLUMNS) for row in table.values())
    for scope in ("none", "backbone"):
        line = memory_tables.row_of("SmallVLA", scope)
        assert [cell.strip() for cell in line.strip("|").split("|")] == table["SmallVLA", scope]


@pytest.mark.numbers
@pytest.mark.parametrize("family", [name for name in memory_tables.FULL_SIZE if name != "SmallVLA"])
def test_the_table_of_memory_has_the_models_of_today(family):
    """What trains, and what weights take, of the real sizes; without running them."""
    offered = _tabletop_sizes()
    for scope in ("none", "vision", "backbone"):
        config = memory_tables.configured([*memory_tables.FULL_SIZE[family], *memory_tables.SIZES], scope)
        chunk = config.trainer.chunk
        shape = (3,) if chunk == 1 else (chunk, 3)
        vla = config.policy.vla_config
        model = model_of_shapes(None, vla.model_class, model_arguments(config, offered, shape))
        freeze(model, scope, heads=getattr(model, "heads", None) or HEADS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = rows("family")[family, scope]
        assert row[2] == f"{trained / 1e6:,.2f}", (scope, row)
        weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 2**30
        assert float(row[4]) == pytest.approx(weights, rel=0.01)


def _tabletop_sizes():
    from envs.tabletop import TabletopEnv

    return TabletopEnv(2, "reach", modalities=["rgb", "proprio", "language"]).observation_spec["observation"].zero()


@pytest.mark.numbers
def test_what_is_told_was_measured_to_be_so():
    for row in rows("configuration, freeze").values():
        for ratio in (row[3], row[6]):
            assert 0.85 < float(ratio) < 1.15, row
    assert [row[0] for row in rows("configuration, freeze").values()] == list(memory_tables.CHECKED)
