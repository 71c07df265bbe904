"""A disk that is full, a folder that goes away: one line, nothing that was there is lost, and the run can go on."""

from __future__ import annotations

import resource
import shutil
import signal

import pytest
import training_run
from test_kills import ITERATIONS, arguments, check_rows, finished, start

from research.runs.folder import RunFolder
from research.runs.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def no_file_larger_than(size: int):
    """What a process finds that writes to a full disk, but for the error's name (EFBIG)."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize(("kilobytes", "scope"), [(1, "none"), (3, "none"), (3, "vision"), (100, "none")])
def test_a_disk_that_is_full_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tmp_path, kilobytes, scope):
    """At the configuration, at the rows, at what is frozen, at the checkpoint."""
    argv = [*arguments(tmp_path / "run", "tabletop"), f"--policy.freeze={scope}"]
    code = start(argv, tmp_path / "log", no_file_larger_than(1024 * kilobytes))
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error")]
    assert code in (1, 2) and said and "File too large" in said[0], (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert start(argv, tmp_path / "log", None) == 0, (tmp_path / "log").read_text()[-1500:]
    check_rows(finished(tmp_path / "run"))


@pytest.mark.parametrize("what", ["the run folder", "the checkpoints", "a file instead of checkpoints"])
def test_a_folder_that_goes_away_in_mid_run_is_one_line(tmp_path, what):
    def arm() -> None:
        log = training_run.TrainingRun.log

        def breaking(self, *arguments):
            log(self, *arguments)
            if self.progress.iteration == ITERATIONS // 2:
                shutil.rmtree(self.folder if what == "the run folder" else self.folder.checkpoints)
                if what == "a file instead of checkpoints":
                    self.folder.checkpoints.write_text("")

        training_run.TrainingRun.log = breaking

    code = start(arguments(tmp_path / "run", "tabletop"), tmp_path / "log", arm)
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text
    runs = [path for path in (tmp_path / "run" / "runs").iterdir() if RunFolder(path).metrics.exists()]
    if what == "the checkpoints":  # made again
        assert code == 0 and RunFolder(runs[0]).last_checkpoint.name == f"step_{64 * ITERATIONS:09d}", text
        return
    assert code == 1, text
    (said,) = [line for line in text.splitlines() if line.startswith("error: ") and "no summary" not in line]
    assert "cannot write a checkpoint into" in said, said
    assert ("No such file" if what == "the run folder" else "File exists") in said
    assert len(runs) == (what != "the run folder")
    for run in runs:  # what was logged is there
        assert read_metrics(run)[-1]["global_step"] >= 64 * ITERATIONS // 2
