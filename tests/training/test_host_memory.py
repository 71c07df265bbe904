"""Freed memory stays with the process, where glibc allocates and the user has not said how."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")

SCRIPT = """
import resource, sys, torch
from research.training.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for minibatch in range(10):  # nine blocks of 36 to 68 MiB each
    if minibatch == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones((9 + k) * 2**20) for k in range(9)]
    while blocks:
        blocks.pop()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **variables: str) -> tuple[bool, int]:
    """Whether freed memory is said to stay, and how many pages the last five minibatches had to ask for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


def test_what_a_minibatch_freed_is_there_for_the_next_one():
    pages = 5 * sum(9 + k for k in range(9)) * 2**22 // os.sysconf("SC_PAGE_SIZE")
    assert faults("leave")[1] > 0.5 * pages or huge_pages_always()
    kept, touched = faults("keep")
    assert kept and touched < 0.1 * pages


@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_environment_says_of_the_allocator_stays(variables):
    assert faults("keep", **variables)[0] is False


def huge_pages_always() -> bool:
    """Whether the system backs every large block by huge pages, of which there are few to ask for."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[always]" in setting.read_text()
