"""The throughput benchmark: its table is complete, its floor is one, and what is frozen does not run in the update."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import benchmark_throughput as benchmark
import pytest
import torch
from throughput import model, processes
from throughput.models import StandInEnv, build_model
from throughput.peers import Floor
from throughput.profiling import profile
from throughput.row import Settings, build_loop, measure
from torchrl.envs.utils import check_env_specs
from worlds import ROOT

from agents.checking import check_policy
from agents.flop_counter import FlopCounter
from agents.policy import VLAPolicy
from research.config import PPOConfig
from research.training.freezing import part_names

pytestmark = pytest.mark.slow

TINY = {"num_envs": 4, "steps": 4, "batch_size": 8, "iterations": 1}
RESULTS = ROOT / "experiments" / "results"
FULL, FROZEN = "ours/none/fp32/standard", "ours/backbone/fp32/standard"


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, dict]:
    """Two rows of ours, as a user gets them."""
    folder = tmp_path_factory.mktemp("throughput")
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    code = benchmark.main([*sizes, f"--rows={FULL},{FROZEN}", "--threads=1", "--profile", f"--output={folder}"])
    assert code == 0
    for freeze in ("none", "backbone"):
        text = (folder / f"profile-ours-{freeze}-fp32-standard.txt").read_text()
        for name in ("collect, ", "update, ", "torchrl", "tensordict", "envs"):
            assert name in text
    assert (folder / "small-tabletop-cpu.png").stat().st_size > 0
    return {row["row"]: row for row in benchmark.read_table(folder / "small-tabletop-cpu.csv")}


def test_a_profile_names_the_functions_that_take_the_time_with_their_files():
    def busy(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    loop = SimpleNamespace(collect=lambda: busy(0.05), update=lambda: None)
    loop.collect.__name__, loop.update.__name__ = "collect", "update"
    collect, update = profile(loop, torch.device("cpu")).split("update, ")
    first = next(line for line in collect.splitlines() if "(busy)" in line)
    assert Path(__file__).name in first and float(first.split()[1]) > 0.02
    assert "(busy)" not in update


def test_every_row_of_ours_has_its_columns_and_its_floor(table):
    assert set(table) == {FULL, FROZEN, "floor/none/fp32/standard", "floor/backbone/fp32/standard"}
    for name in (FULL, FROZEN):
        row = table[name]
        missing = [column for column in benchmark.COLUMNS if row[column] is None and not column.startswith("ratio_")]
        assert not missing
        assert row["env_steps_per_second"] == pytest.approx(16 / row["iteration_s"])
        assert row["iteration_s"] == pytest.approx(row["collect_s"] + row["update_s"])
        assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / row["peak_flops_per_second"])
        assert row["model_flops_per_second"] == pytest.approx(16 * row["flops_per_env_step"] / row["iteration_s"])
        assert (row["num_envs"], row["threads"], row["torch"]) == ("4", "1", torch.__version__)


def test_a_table_names_files_of_its_folder_and_nothing_of_the_machines(table):
    assert [table[name]["profile"] for name in (FULL, FROZEN)] == [
        "profile-ours-none-fp32-standard.txt", "profile-ours-backbone-fp32-standard.txt",
    ]  # fmt: skip
    assert not [value for row in table.values() for value in row.values() if Path(str(value)).is_absolute()]


def test_committed_results_hold_no_absolute_path():
    """Nor the name of a home folder: whoever repeats a table has neither."""
    absolute = re.compile(r"(?:^|(?<=[\s,;:\"'=`(\[]))(?:/|~/|[A-Z]:\\)[\w.-]+[/\\]", flags=re.MULTILINE)
    assert absolute.search("a,/home/x/y.txt") and absolute.search("`~/runs/a`") and not absolute.search("runs/a / b/c")
    files = [file for file in RESULTS.rglob("*") if file.suffix in (".csv", ".json", ".md", ".txt")]
    assert len(files) > 10
    for file in files:
        assert not absolute.search(file.read_text()), file


SPEED, RATIO, NUMBER = "{:,.0f}".format, "{:.2f}".format, "{:.3f}".format
PEERS = {
    "env_steps_per_second": SPEED, "ratio_to_sb3": RATIO, "ratio_to_sb3_full": RATIO, "iteration_over_floor": RATIO,
    "bytes_per_transition": SPEED,
}  # fmt: skip
SHOWN = {  # committed table -> what RESULTS.md shows of each of its rows
    "small-tabletop-cpu": PEERS,
    "resnet18-tabletop-cpu": PEERS,
    "small-tabletop-cuda": {
        "env_steps_per_second": SPEED, "iteration_over_floor": RATIO, "collect_s": NUMBER, "update_s": NUMBER,
    },
    "gpt-tabletop-cuda": {
        "env_steps_per_second": SPEED, "iteration_over_floor": RATIO,
        "model_flops_per_second": lambda flops: f"{flops / 1e12:.0f} T", "mfu": "{:.1%}".format,
        "bytes_per_transition": SPEED,
    },
}  # fmt: skip


@pytest.mark.numbers
@pytest.mark.parametrize("name", SHOWN)
def test_results_say_what_the_committed_tables_say(name):
    text = (ROOT / "experiments" / "RESULTS.md").read_text()
    for row in benchmark.read_table(RESULTS / "throughput" / f"{name}.csv"):
        if row["loop"] != "floor":
            cells = [look(row[column]) if row[column] is not None else "-" for column, look in SHOWN[name].items()]
            line = f"| `{row['row']}` | {' | '.join(cells)} |"
            assert line in text, f"{name}: {line}"


@pytest.mark.numbers
def test_the_page_on_scaling_says_what_the_committed_curves_say():
    text = (ROOT / "docs" / "scaling.md").read_text()
    curves = {}
    for row in benchmark.read_table(RESULTS / "throughput" / "scaling-tabletop-cpu.csv"):
        curves.setdefault(row["curve"], []).append(row)
    assert len(curves) == 3
    for rows in curves.values():
        first, last = (1e3 * float(row["seconds_per_env_step"]) for row in (rows[0], rows[-1]))
        error = f" ± {float(rows[0]['slope_stderr']):.2f}" if rows[0]["slope_stderr"] else ", two points"
        line = f"| {first:.3g} to {last:.3g} ms | power {float(rows[0]['slope']):.2f}{error} |"
        assert line in text, line


def test_without_output_committed_tables_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "run", lambda settings: rows_of(settings.row))
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in RESULTS.rglob("*") if file.is_file()}
    assert benchmark.main([f"--rows={FULL}"]) == 0
    assert (tmp_path / "runs" / "throughput" / "small-tabletop-cpu.csv").is_file()
    assert {file: file.read_bytes() for file in RESULTS.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("scope", ["none", "vision", "backbone", "residual"])
def test_the_floor_does_the_work_of_the_loop_and_no_more(scope):
    """In FLOPs, as times of so small an example say nothing; beyond the floor the loop values its final states."""
    settings, cfg = Settings("ours", scope, **TINY), PPOConfig(n_epochs=2, batch_size=8)
    loop = build_loop(settings, cfg)
    floor = Floor(settings.build_env(), loop.policy, settings.steps, cfg, bf16=False)
    work = []
    for each in (loop, floor):
        each.collect()  # frozen instruction features are known from here on
        for part in (each.collect, each.update):
            with FlopCounter() as counter:
                part()
            work.append(counter.get_total_flops())
    collected, updated, least_collected, least_updated = work
    # A trainable language encoder runs for the distinct instructions of a minibatch, and only the loop shuffles.
    rel = 0 if scope in ("backbone", "residual") else 0.05
    assert least_updated > 0 and least_updated == pytest.approx(updated, rel=rel)
    step = least_collected / settings.steps
    assert step * settings.steps < collected <= step * (settings.steps + 1.01)


def test_the_floor_is_timed_by_turns_with_the_loop(table):
    for name in (FULL, FROZEN):
        assert table[name]["iteration_over_floor"] == pytest.approx(
            table[name]["iteration_s"] / table[name]["floor_s"]
        )  # of a single iteration
        assert table[name.replace("ours", "floor")]["iteration_s"] == table[name]["floor_s"]


def test_a_frozen_trunk_does_not_run_in_the_update(table):
    assert table[FROZEN]["flops_per_minibatch"] < table[FULL]["flops_per_minibatch"] / 50
    assert table[FROZEN]["flops_per_collected_step"] > table[FULL]["flops_per_collected_step"] / 2


def test_bytes_of_a_transition(table):
    pixels, features = 64 * 64 * 3, 128 * 4
    assert pixels < table[FULL]["bytes_per_transition"] < 1.1 * pixels
    assert features < table[FROZEN]["bytes_per_transition"] < features + 64


def test_the_recipe_runs_two_trunks_and_keeps_next_observations(table):
    row = measure(Settings("torchrl", "none", **TINY))[0]
    assert row["flops_per_minibatch"] > 1.9 * table[FULL]["flops_per_minibatch"]
    assert row["bytes_per_transition"] > 2 * 64 * 64 * 3


def rows_of(*names: str, speed: float = 100.0) -> list[dict]:
    settings = [Settings(*name.split("/")) for name in names]
    return [{"row": s.row, **asdict(s), "env_steps_per_second": speed, "iteration_s": 2048 / speed} for s in settings]


def test_ratios_are_to_the_same_scope_and_to_the_full_fine_tune():
    rows = (
        rows_of("sb3/none", speed=10.0) + rows_of("sb3/backbone", speed=20.0) + rows_of("torchrl/backbone", speed=5.0)
    )
    rows += rows_of("floor/backbone", speed=200.0) + rows_of("ours/backbone", "ours/backbone/fp32/vla")
    benchmark.compare_with_peers(rows)
    ours, vla = rows[-2:]
    assert (ours["ratio_to_sb3"], ours["ratio_to_sb3_full"], ours["ratio_to_torchrl"]) == (5.0, 10.0, 20.0)
    assert ours["ratio_to_torchrl_full"] is None
    assert vla["iteration_over_floor"] == pytest.approx(2.0)


def test_utilisation_is_of_the_fastest_product_that_any_row_saw_in_its_precision():
    rows = rows_of("ours/none", "ours/vision", "ours/none/bf16", "floor/none")
    for row, peak in zip(rows, (10.0, 40.0, 100.0), strict=False):  # the first row's process was disturbed
        row |= {"model_flops_per_second": 20.0, "peak_flops_per_second": peak, "mfu": 20.0 / peak}
    benchmark.compare_with_peers(rows)
    assert [row.get("mfu") for row in rows] == [0.5, 0.5, 0.2, None]
    assert [row.get("peak_flops_per_second") for row in rows] == [40.0, 40.0, 100.0, None]


def test_a_failing_row_loses_no_other_and_append_keeps_the_table(tmp_path, monkeypatch, capsys):
    def measured(settings: Settings) -> list[dict] | None:
        return None if settings.freeze == "vision" else rows_of(settings.row)

    monkeypatch.setattr(benchmark, "run", measured)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert benchmark.main(["--rows=sb3/*,ours/*/fp32/standard", f"--output={tmp_path}"]) == 1
    assert "skipped: rows of Stable-Baselines3" in capsys.readouterr().out
    assert benchmark.main(["--rows=torchrl/none/*", "--append", "--threads=7", f"--output={tmp_path}"]) == 2
    assert "--append: the table has threads = 1, this run 7" in capsys.readouterr().err
    assert benchmark.main(["--rows=torchrl/none/*", "--append", f"--output={tmp_path}"]) == 0
    rows = benchmark.read_table(tmp_path / "small-tabletop-cpu.csv")
    residual = "ours/residual/fp32/standard"
    assert [row["row"] for row in rows] == ["torchrl/none/fp32/standard", FULL, FROZEN, residual]  # peers first
    assert [row["ratio_to_torchrl"] for row in rows] == [1.0, 1.0, None, None]


def test_scaling_fits_a_power(tmp_path, monkeypatch, capsys):
    def measured(settings: Settings) -> list[dict]:
        values = {"num_envs": settings.num_envs, "num_collectors": settings.num_collectors, "flops_per_env_step": 1e6}
        return [rows_of(settings.row, speed=settings.num_envs**0.5)[0] | values]

    monkeypatch.setattr(benchmark, "run", measured)
    assert benchmark.main(["--scaling", f"--output={tmp_path}"]) == 0
    assert "against envs: grows with the power -0.50 ± 0.00" in capsys.readouterr().out
    assert (tmp_path / "scaling-tabletop-cpu.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--device=cuda", "no GPU here"),
        ("--rows=sb4/*", "matches none of sb3/none/fp32/standard"),
        ("--steps=0", "--steps: expected at least 1"),
        ("--num_collectors=3", "does not divide --num_envs=64"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(flag, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([flag, f"--output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_stand_in_environment_keeps_the_contract_and_its_episodes_end_in_turn():
    env = StandInEnv(num_envs=6, image_size=16, episode_length=3)
    check_env_specs(env)
    rollout = env.rollout(7, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert (done.sum(dim=1) >= 2).all() and (done.sum(dim=0) == 2).all()
    assert not rollout["next", "terminated"].any()
    assert rollout["observation", "rgb"].float().std() > 50


def test_the_resnet_model_has_the_parts_that_scopes_name():
    model = build_model("resnet18", {}, action_dim=3, device=torch.device("cpu"))
    assert part_names(model) == ["vision_encoder", "language_encoder", "fusion", "action_head", "value_head"]
    assert 11e6 < sum(p.numel() for p in model.parameters()) < 12e6
    check_policy(VLAPolicy(model), StandInEnv(2).observation_spec["observation"].zero(), (3,))


def test_two_processes_are_predicted_from_one_within_a_fifth():
    rows = model.check()
    assert [row["kind"] for row in rows] == ["torchrun", "sharded", "gym_workers", "processes", "ray"]
    for row in rows:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.2)


@pytest.mark.numbers
def test_the_page_on_scaling_has_the_models_tables():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert model.markdown(model.table()) in text and model.markdown(model.shown(model.check())) in text


def test_the_model_by_hand():
    """One GPU that reads 1 GB of weights at 1 GB/s per token and does 1 TFLOP/s; two that exchange 8 bytes a weight."""
    policy = model.Policy("p", 0.5e9, 0.25e9, 1e9, 2e9, 1, 1e6, 0.0)
    assert policy.bytes_acting == 1.5e9 and policy.bytes_training(1, False) == 4.5e9
    assert policy.bytes_training(3, True) == 1.5e9
    machine = model.Machine(gpus=2, flops=1e12, memory_bandwidth=1e9, within=1e9, between=1e8)
    job = model.Job(envs=10, decisions=4, chunk=2, epochs=3, minibatch=20, micro_batch=5, step_s=0.5, cores=8)
    one = model.iteration(policy, job, machine, 1)
    assert one.simulate == 40 * 2 * 0.5 / 8 and one.act == pytest.approx(4 * 2 * 1.5 + 40 * 1e9 / 1e12)
    assert one.update == pytest.approx(3 * 40 * 2e9 / 1e12) and one.exchange == 0 and one.binds == "acting"
    two = model.iteration(policy, job, machine, 2)
    assert two.exchange == pytest.approx(6 * 0.5 * 8 * 0.25e9 / 1e9) and two.update == one.update / 2
    divided = model.iteration(policy, job, machine, 2, sharded=True)
    assert divided.exchange == pytest.approx(6 * 0.5 * (4 * 0.25e9 + 2 * 2 * 1.5e9) / 1e9)
    elsewhere = model.iteration(policy, job, machine, 2, rollout_gpus=4)
    assert elsewhere.seconds == pytest.approx(
        max(one.simulate + elsewhere.act, two.update + two.exchange, 2 * 1e9 / 1e8 + 0.4)
    )


def test_runs_of_one_and_two_processes_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["x", "--kinds=gym_workers", "--turns=1", "--iterations=3", f"--output={tmp_path / 'p.csv'}"]
    )
    monkeypatch.setattr(processes, "KINDS", {"gym_workers": processes.KINDS["gym_workers"]._replace(zero=None)})
    assert processes.main() == 0
    one, two = benchmark.read_table(tmp_path / "p.csv")
    assert (one["run"], two["run"]) == ("one", "two") and "two against one" in capsys.readouterr().out
    steps = processes.ENVS * processes.STEPS
    assert one["collect_s"] > 0.9 * steps * processes.STEP_S
    assert one["env_steps_per_second"] == pytest.approx(steps / (one["collect_s"] + one["update_s"]), rel=0.1)
