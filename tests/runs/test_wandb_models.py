"""Weights by the name of an artifact, by the real client against a server in this process."""

import pytest
import wandb
from standin_wandb_server import ENTITY
from wandb_worlds import start_tracker

from research.errors import UserError
from research.runs import wandb_models
from research.runs.folder import RunFolder
from research.runs.wandb_models import fetch

pytestmark = pytest.mark.slow

NAME = f"wandb:{ENTITY}/test/start"


@pytest.fixture
def weights(wandb_server, tmp_path):
    """An artifact of two versions, of which the first is `best`."""
    file = tmp_path / "weights.pt"
    with start_tracker(RunFolder.create(tmp_path / "runs", "exp"), "online") as tracker:
        for content, alias in ((b"first", "best"), (b"second", "newest")):
            file.write_bytes(content)
            artifact = wandb.Artifact("start", type="model")
            artifact.add_file(str(file))
            tracker.run.log_artifact(artifact, aliases=[alias]).wait()


def test_an_alias_becomes_its_version_and_a_version_is_fetched_once(wandb_server, weights, monkeypatch):
    for alias, version, content in ((":best", "v0", b"first"), ("", "v1", b"second"), (":v0", "v0", b"first")):
        reference, folder = fetch(NAME + alias)
        assert reference == f"{NAME}:{version}"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"weights.pt": content}
    wandb_server.versions[0].aliases.discard("best")
    wandb_server.versions[1].aliases.add("best")
    assert fetch(f"{NAME}:best")[0] == f"{NAME}:v1"
    # Without W&B: what is here stays readable, by its version.
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "Api", lambda: pytest.fail("W&B was asked"))
    assert fetch(f"{NAME}:v1")[1].is_dir()
    with pytest.raises(UserError, match=r"model_path: .*start:best is not on this machine, and WANDB_MODE"):
        fetch(f"{NAME}:best")


def test_what_breaks_off_leaves_nothing_that_looks_complete(weights, monkeypatch):
    class Torn:
        version = "v0"

        def download(self, root, **options):
            raise OSError("the line is dead")

    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"artifact": lambda *a, **k: Torn()})())
    with pytest.raises(UserError, match="cannot be had from W&B: the line is dead"):
        fetch(f"{NAME}:v0")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be had from W&B"):  # no cache from elsewhere, no server
        wandb_models.fetch("wandb:a/b/c:v0")


@pytest.mark.parametrize("name", ["wandb:", "wandb:a", "wandb:a/b:best", "wandb:a/b/c/d", "wandb:a/b/c:x:y"])
def test_another_form_is_refused_by_name(no_wandb_account, name):
    with pytest.raises(UserError, match=f"model_path: {name} is not of the form wandb:entity/project/name:alias"):
        fetch(name)


def test_what_is_not_there_is_one_line(wandb_server):
    for name in (f"wandb:{ENTITY}/test/start:best", f"wandb:{ENTITY}/nothing/start"):
        with pytest.raises(UserError, match=f"model_path: {name} cannot be had from W&B: ") as raised:
            fetch(name)
        assert "\n" not in str(raised.value)
