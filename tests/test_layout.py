"""The house: imports point down, and the way of one batch is short."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from worlds import ROOT


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


SCHEMA = (
    "research.errors",
    "research.own_packages",
    "research.schema",
    "research.processes",
    "research.action_map",
    "research.checkpoint_size",
    "research.progress_bar",
)
OPTIONS = (
    "research.commands",
    "research.config_file",
    "research.option_parser",
    "research.options",
    "research.plain_yaml",
)
CONFIG = (*SCHEMA, "research.config", *OPTIONS)
# folder -> what of this project its files may import, besides their own folder
BELOW = {
    "agents": SCHEMA,
    "envs": SCHEMA,
    "research/imitation": SCHEMA,
    "research/training": CONFIG,
    "research/runs": SCHEMA,
    "research/study": (*CONFIG, "research.runs"),
}
# A run is reported by what it evaluated: the one arrow between neighbours.
EXCEPTIONS = {"research/runs/reporting.py": ("research.training.evaluation",)}


def ours(name: str) -> bool:
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    return name.split(".")[0] in {"research", "agents", "envs", "throughput", *scripts}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    own = folder.replace("/", ".")
    for path in files:
        allowed = (own, *BELOW[folder], *EXCEPTIONS.get(str(path.relative_to(ROOT)), ()))
        for name in filter(ours, imports_of(path)):
            if name == "research" or name == "research.study":
                continue  # the package of what is named behind it
            assert name.startswith(tuple(f"{a}." for a in allowed)) or name in allowed, f"{path.name} imports {name}"


def test_the_root_of_research_is_below_its_folders():
    for path in (ROOT / "research").glob("*.py"):
        for name in filter(ours, imports_of(path)):
            assert name.startswith(CONFIG), f"{path.name}: {name}"


def test_no_script_imports_another():
    parts = {"accounting", "accounting_imitation", "algorithms", "assembling", "building", "configuration"}
    parts |= {"answering", "dry_run", "ends", "env_options", "opening", "starting"}
    parts |= {"packages", "resuming", "trained_policy", "training_run", "wandb_panels"}
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")} - parts
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not scripts & {name.split(".")[0] for name in imports_of(path)}, path.name


def test_the_readme_names_every_script():
    (line,) = re.findall(r"^\| `experiments/` \|.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    missing = {path.name for path in (ROOT / "experiments").glob("*.py")} - set(re.findall(r"[\w]+\.py", line))
    assert not missing


def test_no_script_writes_into_the_committed_results_by_default():
    defaults = {}
    for path in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "default":
                defaults.setdefault(path.name, []).append(ast.unparse(node.value))
    assert any("runs/" in default for default in defaults["ppo_parity.py"])
    assert not [(name, each) for name, all_ in defaults.items() for each in all_ if "results" in each]


def test_from_the_environment_to_the_gradient_it_is_five_files():
    """The README names them, in order."""
    (sentence,) = re.findall(r"To follow one batch.*?\n\n", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    files = re.findall(r"`([\w/]+\.py)`", sentence)
    assert files[0] == "experiments/ppo_vla.py" and files[-1] == "research/training/ppo.py" and len(files) <= 5
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 700


def test_every_module_has_a_test_file_of_its_own():
    tested_elsewhere = {
        "research/training/advantages.py": "tests/training/test_rollout.py",  # on scripted rollouts, by hand
        "agents/gpt_trunks.py": "tests/agents/test_gpt_vla.py",
        "agents/flop_counter.py": "tests/agents/test_cost.py",
        "research/training/clipping.py": "tests/training/test_ppo.py",
        "research/training/collecting_policy.py": "tests/training/test_rollout.py",
        "research/training/minibatches.py": "tests/training/test_parallel.py",
        "research/training/policy_gradient.py": "tests/training/test_ppo.py",
        "research/training/sharding.py": "tests/training/test_parallel.py",
        "research/imitation/lerobot_index.py": "tests/imitation/test_lerobot.py",
        "research/imitation/lerobot_tables.py": "tests/imitation/test_lerobot.py",
        "research/imitation/lerobot_videos.py": "tests/imitation/test_lerobot.py",
        "research/own_packages.py": "tests/agents/test_loading.py",
        "research/imitation/config.py": "tests/experiments/test_bc_vla.py",
        "research/options.py": "tests/test_config.py",
        "research/processes.py": "tests/training/test_workers.py",
        "envs/failures.py": "tests/envs/test_odd_environments.py",
        "envs/gym_info.py": "tests/envs/test_odd_environments.py",
        "envs/gym_options.py": "tests/envs/test_gym.py",
        "envs/gym_spaces.py": "tests/envs/test_gym.py",
        "envs/gym_trial.py": "tests/envs/test_odd_environments.py",
        "envs/gym_vector_entry.py": "tests/envs/test_gym_vector.py",
        "envs/gym_vector_trial.py": "tests/envs/test_gym_vector.py",
        "envs/initial_states.py": "tests/envs/test_vector.py",
        "envs/maniskill_tasks.py": "tests/envs/test_maniskill.py",
        "envs/maniskill_worlds.py": "tests/envs/test_maniskill_gpu.py",
        "envs/pictures.py": "tests/envs/test_gym.py",
        "envs/simulator_options.py": "tests/envs/test_metaworld.py",
        "envs/tabletop_instructions.py": "tests/envs/test_tabletop.py",
        "envs/tabletop_painter.py": "tests/envs/test_tabletop.py",
        "envs/tabletop_scene.py": "tests/envs/test_tabletop.py",
        "envs/tabletop_states.py": "tests/envs/test_tabletop.py",
    }
    parts = [f"research/{part}" for part in ("imitation", "training", "runs", "study")]
    for folder in ("agents", "envs", "research", *parts):
        for path in (ROOT / folder).glob("*.py"):
            own = ROOT / "tests" / folder.removeprefix("research").lstrip("/") / f"test_{path.name}"
            name = str(path.relative_to(ROOT))
            assert path.name == "__init__.py" or own.exists() or (ROOT / tested_elsewhere[name]).exists(), name


def test_what_a_message_says_to_install_can_be_installed():
    """The package is in no registry: an extra is installed from a checkout, and pyproject.toml has it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = 0
    for folder in ("agents", "envs", "research", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "vla-rl[" not in text, path
            for names in re.findall(r"pip install -e \.\[([a-z,]+)\]", text):
                assert set(names.split(",")) <= set(extras), path
                told += 1
    assert told > 10
