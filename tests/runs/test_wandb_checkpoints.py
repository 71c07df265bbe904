"""Checkpoints as artifacts, by the real client against a server in this process."""

import json
import shutil
import threading
import time

import pytest
import wandb
from standin_wandb_server import ENTITY
from wandb_worlds import start_tracker

from research.runs.folder import RunFolder
from research.runs.wandb_checkpoints import CheckpointUploads

pytestmark = pytest.mark.slow


@pytest.fixture
def run(wandb_server, tmp_path):
    with start_tracker(RunFolder.create(tmp_path / "runs", "exp"), "online") as tracker:
        yield tracker.run


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.create(tmp_path / "other", "exp")
    folder.config.write_text(json.dumps({"a": 1}))
    return folder


def written(folder, step, best=False):
    path = folder.checkpoint(step, best)
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    (path / "state.pt").write_bytes(b"weights at %d" % step)
    return path


def steps_by_alias(server, collection):
    return {
        alias: json.loads(version.metadata)["global_step"]
        for version in server.there(collection)
        for alias in version.aliases
    }


def test_the_newest_and_the_best_are_kept_and_what_a_user_named(wandb_server, run, folder):
    name = f"checkpoint-{run.id}"
    for step, best in ((1, True), (1, False), (2, False), (3, True), (3, False), (4, False)):
        uploads = CheckpointUploads(run, every_s=0)
        uploads.offer(written(folder, step, best))
        assert uploads.finish(60)
        if step == 2:
            wandb_server.there(name)[-1].aliases.add("mine")
    assert steps_by_alias(wandb_server, name) == {"latest": 4, "best": 3, "mine": 2}
    assert [version.state for version in wandb_server.versions].count("DELETED") == 3
    newest = wandb_server.there(name)[-1]
    assert newest.type == "model" and newest.run == run.id
    assert wandb_server.file_of(newest, "checkpoints/step_000000004/state.pt") == b"weights at 4"
    assert json.loads(wandb_server.file_of(newest, "config.json")) == {"a": 1}


def test_what_comes_faster_than_it_is_sent_is_replaced(wandb_server, run, folder):
    uploads = CheckpointUploads(run, every_s=1000)
    for step in range(1, 6):
        uploads.offer(written(folder, step, best=step == 3))
        uploads.offer(written(folder, step, best=False)) if step == 3 else None
    assert not wandb_server.there(f"checkpoint-{run.id}")
    assert uploads.finish(60)
    assert len(wandb_server.versions) == 2
    assert steps_by_alias(wandb_server, f"checkpoint-{run.id}") == {"best": 3, "latest": 5}


def test_a_checkpoint_that_is_removed_while_another_is_sent_leaves_the_one_that_is_there(
    wandb_server, run, folder, monkeypatch
):
    """1 is sent; of 2 and its best, which wait, the newest is gone before its turn, for 3; then 3 is gone, too."""
    name, log = f"checkpoint-{run.id}", run.log_artifact

    def send(*offered, meanwhile=lambda uploads: None):
        uploads = CheckpointUploads(run, every_s=1000)

        def log_artifact(artifact, aliases):
            if aliases == ["best"]:
                meanwhile(uploads)
            return log(artifact, aliases=aliases)

        monkeypatch.setattr(run, "log_artifact", log_artifact)
        for path in offered:
            uploads.offer(path)
        return uploads.finish(60)

    def newer(uploads):
        uploads.offer(written(folder, 3))
        shutil.rmtree(folder.checkpoint(2))

    assert send(written(folder, 1))
    assert send(written(folder, 2, best=True), written(folder, 2), meanwhile=newer)
    assert steps_by_alias(wandb_server, name) == {"best": 2, "latest": 3}
    assert wandb_server.file_of(wandb_server.there(name)[-1], "checkpoints/step_000000003/state.pt") == b"weights at 3"
    shutil.rmtree(folder.checkpoint(3))
    assert not send(folder.checkpoint(3))
    assert steps_by_alias(wandb_server, name) == {"best": 2, "latest": 3}


def test_what_a_run_started_from_is_its_input(wandb_server, run, tmp_path):
    start = tmp_path / "pretrained.pt"
    start.write_bytes(b"weights")
    uploads = CheckpointUploads(run, str(start))
    assert uploads.finish(60)
    (version,) = wandb_server.there("start-pretrained")
    assert wandb_server.used == [(run.id, version.id)]
    assert not version.files  # a reference: the file itself stays on its machine
    reference = json.loads(wandb_server.contents[version.manifest])["contents"]["pretrained.pt"]
    assert reference["ref"] == start.as_uri() and reference["size"] == 7
    assert CheckpointUploads(run, f"wandb:{ENTITY}/test/start-pretrained:v0").finish(60)
    assert wandb_server.used == [(run.id, version.id)] * 2


def test_a_checkpoint_that_cannot_be_sent_is_named_once_and_the_run_goes_on(wandb_server, run, folder, capsys):
    wandb_server.refuse_uploads = True
    uploads = CheckpointUploads(run, every_s=0)
    for step in (1, 2):
        uploads.offer(written(folder, step))
        time.sleep(0.5)
    assert not uploads.finish(60)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"W&B: {folder.checkpoint(1)} is not there: ") and line.endswith("; the run goes on")


def test_an_upload_that_hangs_holds_nobody_up_and_is_dropped(wandb_server, run, folder, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(wandb.Artifact, "add_dir", lambda *arguments, **options: hanging.wait(100))
    uploads = CheckpointUploads(run, every_s=0)
    start = time.monotonic()
    for step in (1, 2, 3):
        uploads.offer(written(folder, step))
    assert not uploads.finish(0.2)
    assert time.monotonic() - start < 20
    hanging.set()
    uploads._thread.join(20)
    assert not uploads._thread.is_alive() and wandb_server.versions == []
