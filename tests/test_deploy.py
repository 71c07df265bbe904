"""What deploy/ has: scripts that run, manifests that fit their schemas, and flags that exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import sweep_local
import yaml
from jsonschema import Draft202012Validator
from torch.distributed.run import get_args_parser
from wandb.cli.cli import agent
from worlds import ROOT

from research.config import ExperimentConfig
from research.options import parse_config
from research.study.sweep_file import load_sweep

DEPLOY = ROOT / "deploy"
JOBS = sorted((DEPLOY / "slurm").glob("*.sbatch"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
EDITED = [DEPLOY / "Dockerfile", DEPLOY / "apptainer.def", *JOBS, *MANIFESTS]

# Stand for Slurm's: srun notes its command, and ends by itself or when it is asked to, with the exit code $CODE.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/command"
trap 'exit "$CODE"' TERM
touch "$RECORD/started"
until [ -e "$RECORD/end" ]; do sleep 0.02; done
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$RECORD/asked"; fi
"""


class Job:
    """A batch script that runs, with programs that stand for Slurm's."""

    def __init__(self, script: Path, folder: Path, code: int):
        self.folder = folder
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        (folder / "deploy").symlink_to(DEPLOY)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(folder), "CODE": str(code),
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }  # fmt: skip
        self.process = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.DEVNULL)
        while not (folder / "started").exists():
            assert self.process.poll() is None, "it has not come to srun"
            time.sleep(0.01)

    def end(self, number: int | None = None) -> int:
        """Send the script a signal, or let the command end by itself; returns the script's exit code."""
        if number is None:
            (self.folder / "end").touch()
        else:
            self.process.send_signal(number)
        return self.process.wait()

    @property
    def command(self) -> list[str]:
        return (self.folder / "command").read_text().splitlines()

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


def check_command(words: list[str]) -> str:
    """Parse a command as its program would; returns the program. What does not parse ends the test."""
    program, *words = words
    if program == "torchrun":
        options = get_args_parser().parse_args(words)
        return check_command(["python", options.training_script, *options.training_script_args])
    if program == "wandb":
        assert words[0] == "agent"
        context = agent.make_context("wandb agent", words[1:])
        assert re.fullmatch(r"[\w-]+/[\w-]+/[\w-]+", context.params["sweep_id"])
        return "wandb agent"
    script, *words = words
    assert program == "python" and (ROOT / script).is_file()
    if script == "experiments/sweep_local.py":
        load_sweep(sweep_local.read_options(words).sweep)
    else:
        assert script == "experiments/ppo_vla.py"
        parse_config(ExperimentConfig, words)
    return script


def option(words: list[str], name: str) -> str:
    (value,) = (word.partition("=")[2] for word in words if word.startswith(f"--{name}="))
    return value


@pytest.mark.parametrize("path", EDITED, ids=lambda path: path.name)
def test_a_user_edits_three_places(path):
    assert re.findall(r"# EDIT (\d of \d): ", path.read_text()) == ["1 of 3", "2 of 3", "3 of 3"]


# ---- Slurm


@pytest.mark.parametrize("path", [*JOBS, DEPLOY / "slurm" / "requeue.sh"], ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_options_of_sbatch_stand_where_they_are_read(path):
    forms = {
        "job-name": r"[\w-]+", "output": r"[\w%.-]+", "open-mode": "append", "requeue": "", "ntasks-per-node": "1",
        "nodes": r"\d+", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+", "time": r"\d\d:\d\d:\d\d",
        "array": r"\d+-\d+%\d+", "signal": r"B:USR1@\d+",
    }  # fmt: skip
    lines = path.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[head:])
    options = dict(re.fullmatch(r"#SBATCH --([\w-]+)=?(.*)", line).groups() for line in lines if "#SBATCH" in line)
    assert {"nodes", "ntasks-per-node", "time", "signal", "requeue", "open-mode"} <= options.keys()
    assert all(re.fullmatch(forms[name], value) for name, value in options.items())


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no Slurm here")
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_sbatch_takes_them(path):
    subprocess.run(["sbatch", "--test-only", str(path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_commands_of_the_batch_scripts_are_complete(path, tmp_path, monkeypatch):
    job = Job(path, tmp_path, 0)
    assert job.end() == 0
    monkeypatch.chdir(ROOT)
    program = check_command(job.command)
    assert program == {"train": "experiments/ppo_vla.py", "sweep": "wandb agent"}[path.stem]
    for line in re.findall(r"^# +work=\((.*)\)$", path.read_text(), flags=re.MULTILINE):  # the other way
        assert check_command(shlex.split(line)) == "experiments/sweep_local.py"


def test_the_nodes_of_a_run_meet_at_the_first_and_have_time_for_a_checkpoint(tmp_path):
    job = Job(DEPLOY / "slurm" / "train.sbatch", tmp_path, 0)
    job.end()
    assert option(job.command, "rdzv-endpoint") == "node7:24711" and option(job.command, "nnodes") == "2"
    assert option(job.command, "rdzv-id") == "4711" and option(job.command, "trainer.exp_name") == "vla-4711"
    notice = int(re.search(r"--signal=B:USR1@(\d+)", (DEPLOY / "slurm" / "train.sbatch").read_text())[1])
    assert 30 < int(option(job.command, "shutdown-timeout")) <= notice - 30


@pytest.mark.parametrize(
    ("name", "number", "code", "requeued"),
    [
        ("train", signal.SIGUSR1, 1, True),
        ("train", signal.SIGUSR1, 0, False),  # it was at its end anyway
        ("train", signal.SIGTERM, 143, False),
        ("train", None, 2, False),
        ("sweep", signal.SIGUSR1, 0, True),
        ("sweep", signal.SIGUSR1, 138, True),
        ("sweep", None, 0, False),
    ],
)
def test_a_job_ends_with_its_steps_exit_code_and_is_queued_again_before_its_limit(
    tmp_path, name, number, code, requeued
):
    job = Job(DEPLOY / "slurm" / f"{name}.sbatch", tmp_path, code)
    assert job.end(number) == code
    assert job.requeued == ["requeue 4711"] * requeued


# ---- Kubernetes


def objects(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def containers(path: Path) -> list[tuple[dict, dict]]:
    """Pod specs and their containers."""
    pods = [o["spec"]["template"]["spec"] for o in objects(path) if o["kind"] in ("Job", "Deployment")]
    return [(pod, container) for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas_of_kubernetes(path):
    schema = json.loads((ROOT / "tests" / "kubernetes_schema.json").read_text())
    for found in objects(path):
        Draft202012Validator(schema | {"$ref": f"#/$defs/{found['kind']}"}).validate(found)
        assert found["metadata"]["name"]


def test_what_manifests_refer_to_is_there():
    found = [o for path in MANIFESTS for o in objects(path)]
    names = {kind: {o["metadata"]["name"] for o in found if o["kind"] == kind} for kind in ("Secret", "Service")}
    claims = {o["metadata"]["name"] for o in found if o["kind"] == "PersistentVolumeClaim"}
    for path in MANIFESTS:
        for pod, container in containers(path):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
            asked = [v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v]
            assert set(asked) <= claims
            secrets = [v["valueFrom"]["secretKeyRef"]["name"] for v in container.get("env", []) if "valueFrom" in v]
            assert set(secrets) <= names["Secret"] | {"wandb"}  # which its file says how to make
            assert pod.get("subdomain") in (None, *names["Service"])
            if image_is_ours(container):
                assert {"name": "runs", "mountPath": "/opt/vla-rl/runs"} in container["volumeMounts"]
    for o in found:
        if o["kind"] == "Service":
            ((key, value),) = o["spec"]["selector"].items()
            assert value == o["metadata"]["name"] and key in ("job-name", "app")


def image_is_ours(container: dict) -> bool:
    return "/vla-rl:" in container["image"]


@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.stem not in ("runs", "database")], ids=lambda p: p.name)
def test_commands_of_the_pods_are_complete(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (job,) = (o for o in objects(path) if o["kind"] == "Job")
    ((pod, container),) = containers(path)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] and job["spec"]["completionMode"] == "Indexed"
    words = [*container["command"], *container["args"]]
    if words[:2] == ["bash", "-c"]:
        words = shlex.split(re.search(r"^(wandb .*) &$", words[2], flags=re.MULTILINE)[1])
    programs = {"train": "experiments/ppo_vla.py", "sweep": "experiments/sweep_local.py", "wandb_agents": "wandb agent"}
    assert check_command(words) == programs[path.stem]
    assert pod["terminationGracePeriodSeconds"] >= 120
    if path.stem == "train":
        name = job["metadata"]["name"]
        assert int(option(words, "nnodes")) == job["spec"]["completions"]
        port = option(words, "rdzv-endpoint").removeprefix(f"{name}-0.{pod['subdomain']}:")  # pods are named so
        assert int(port) == next(o for o in objects(path) if o["kind"] == "Service")["spec"]["ports"][0]["port"]
        assert int(option(words, "shutdown-timeout")) <= pod["terminationGracePeriodSeconds"] - 30
    if path.stem == "sweep":
        database = next(o for o in objects(DEPLOY / "kubernetes" / "database.yaml") if o["kind"] == "Service")
        assert f"@{database['metadata']['name']}/" in option(words, "storage")


@pytest.mark.parametrize(("number", "code", "expected"), [(signal.SIGTERM, 0, 143), (None, 0, 0), (None, 1, 1)])
def test_a_pod_whose_agent_was_asked_to_end_is_not_done(tmp_path, number, code, expected):
    ((_, container),) = containers(DEPLOY / "kubernetes" / "wandb_agents.yaml")
    (tmp_path / "wandb").write_text(SRUN)
    (tmp_path / "wandb").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path), "CODE": str(code)}
    pod = subprocess.Popen([*container["command"], *container["args"]], env=environment)
    while not (tmp_path / "started").exists():
        assert pod.poll() is None
        time.sleep(0.01)
    if number is None:
        (tmp_path / "end").touch()
    else:
        pod.send_signal(number)
    assert pod.wait() == expected


# ---- images


def test_the_images_are_of_the_same_packages_as_the_tests():
    ours = set(re.search(r"^install (libegl1.*)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)[1].split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = []
    for name in ("Dockerfile", "apptainer.def"):
        text = (DEPLOY / name).read_text()
        packages = re.search(r"--no-install-recommends \\\n(.+)", text)[1].rstrip("\\").split()
        asked = re.search(r"EXTRAS=(.*)", text)[1].split(",")
        found.append((re.search(r"python:\S+", text)[0], packages, asked))
        assert ours <= set(packages) and set(asked) <= extras.keys()
        assert "grep '^torch==' requirements.txt" in text
    assert found[0] == found[1]
    assert re.search("^torch==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)


def test_the_images_get_the_project_and_nothing_else():
    """Not run folders, keys or the history: what Docker is given, Apptainer copies."""
    given = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    text = (DEPLOY / "apptainer.def").read_text()
    copied = re.findall(r"^    (\S+) /opt/vla-rl/(\S+)$", text, flags=re.MULTILINE)
    assert [source for source, _ in copied] == [target for _, target in copied] == given
    assert all((ROOT / name).exists() for name in given)
    assert set(re.findall(r"^(?:ENTRYPOINT|USER) .*$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)) == {
        'ENTRYPOINT ["python", "experiments/ppo_vla.py"]',
        "USER 1000",
    }
    assert "exec python /opt/vla-rl/experiments/ppo_vla.py" in text
