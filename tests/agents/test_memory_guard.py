"""A model that does not fit is refused in one line, before the machine is out of memory; and what is free."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from worlds import ROOT

from agents import memory_guard
from agents.loading import load_vla_model
from agents.memory_guard import free_bytes, in_gib, refuse_too_large
from research.errors import UserError

CPU = torch.device("cpu")


def test_the_whole_is_counted_as_soon_as_some_of_it_is_there(monkeypatch):
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 3 * 2**20)
    built = []

    def build(layers: int = 8) -> nn.Module:
        return nn.ModuleList([built.append(1) or nn.Linear(512, 512, bias=False) for _ in range(layers)])  # 1 MiB each

    def on_meta(layers: int = 8) -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(layers)])

    told = r"the weights of X take 0\.0 GiB, and 0\.0 GiB of memory are free"
    with pytest.raises(UserError, match=told), refuse_too_large("X", on_meta, look_from=2**20):
        build()
    assert len(built) == 1  # and not the three that there is room for
    with refuse_too_large("X", lambda: on_meta(3), look_from=2**20):
        build(3)  # fits
    with refuse_too_large("X", on_meta, look_from=2**30):
        build()  # too small to ask
    build()  # and what comes later is none of its business


def test_a_model_whose_constructor_reads_values_is_let_through(monkeypatch):
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 0)

    def on_meta() -> nn.Module:
        raise UserError("reads values")

    with refuse_too_large("X", on_meta, look_from=1):
        nn.Linear(8, 8)


def test_loading_is_guarded(monkeypatch):
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 400_000)
    monkeypatch.setattr(memory_guard, "LOOKED_AT_FROM", 1000)
    with pytest.raises(UserError, match=r"^model_config: the weights of SmallVLA take .* are free"):
        load_vla_model(None, "agents.small_vla.SmallVLA", {"action_dim": 3}, expect_fresh=True)
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 800_000)
    assert load_vla_model(None, "agents.small_vla.SmallVLA", {"action_dim": 3}, expect_fresh=True)


def test_what_is_free_keeps_to_the_limits_of_process_and_container(tmp_path, monkeypatch):
    free = free_bytes(CPU)
    assert free is not None and 2**20 < free < 2**50
    (tmp_path / "memory.max").write_text(f"{3 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**20}\n")
    monkeypatch.setattr(memory_guard, "GROUP", tmp_path)
    assert free_bytes(CPU) == 2 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2 * 2**20
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**60, resource.RLIM_INFINITY))
    assert free_bytes(CPU) > 2 * 2**20
    used = memory_guard._kibibytes(memory_guard.Path("/proc/self/status"), "VmSize")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 5 * 2**20, resource.RLIM_INFINITY))
    assert free_bytes(CPU) <= 5 * 2**20
    assert free_bytes(torch.device("meta")) is None and in_gib(3 * 2**29) == "1.5 GiB"


@pytest.mark.slow
def test_seven_billion_parameters_are_refused_where_four_gigabytes_are_left(tmp_path):
    """The plain run of the full-size configuration, in a process that may take 8 GB of addresses."""
    limited = (
        "import resource, runpy, sys; most = resource.getrlimit(resource.RLIMIT_AS)[1]; "
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, most)); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, 'experiments'); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ["--config", "experiments/configs/openvla.json", f"--trainer.run_dir={tmp_path / 'runs'}"]
    command = [sys.executable, "-c", limited, "experiments/ppo_vla.py", *flags, "--trainer.device=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: model_config: the weights of OpenVLA take 28.1 GiB" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
