"""Normalisation by statistics: the numbers that OpenVLA and LeRobot give, and refusals that name what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from agents.normalisation import Normalisation, RunningNormalisation, find_running_normalisation, read_statistics
from research.errors import UserError

STATISTICS = {
    "mean": [0.1, -0.2, 0.5], "std": [0.2, 0.4, 0.5], "min": [-1.0, -2.0, 0.0], "max": [1.0, 2.0, 1.0],
    "q01": [-0.5, -1.0, 0.0], "q99": [0.7, 1.4, 1.0],
}  # fmt: skip
MASKED = {**STATISTICS, "mask": [True, True, False]}


def test_quantiles_are_undone_as_openvla_does():
    """`0.5 * (a + 1) * (q99 - q01) + q01`, and what is masked as it is."""
    scale = Normalisation.from_statistics(MASKED, "quantiles")
    action = torch.tensor([[-1.0, 0.5, 1.0], [1.0, -2.0, 0.25]])
    low, high = torch.tensor(STATISTICS["q01"]), torch.tensor(STATISTICS["q99"])
    expected = torch.where(torch.tensor(MASKED["mask"]), 0.5 * (action + 1) * (high - low) + low, action)
    assert torch.allclose(scale.unnormalise(action), expected)
    assert scale.unnormalise(action)[0].tolist() == pytest.approx([-0.5, 0.8, 1.0])


@pytest.mark.parametrize("kind", ["quantiles", "min_max", "mean_std"])
def test_to_and_fro_is_where_it_began(kind):
    scale = Normalisation.from_statistics(STATISTICS, kind, size=3)
    x = torch.randn(4, 5, 3)
    assert torch.allclose(scale.unnormalise(scale.normalise(x)), x, atol=1e-6) and scale.size == 3
    assert torch.allclose(scale.normalise(torch.tensor(STATISTICS["mean" if kind == "mean_std" else kind_low(kind)])),
                          torch.full((3,), 0.0 if kind == "mean_std" else -1.0), atol=1e-6)  # fmt: skip
    identity = Normalisation.identity(3)
    assert torch.equal(identity.normalise(x), x) and torch.equal(identity.unnormalise(x), x)


def kind_low(kind: str) -> str:
    return {"quantiles": "q01", "min_max": "min"}[kind]


def test_a_number_that_never_varies_becomes_its_middle():
    scale = Normalisation.from_statistics({"mean": [2.0, 0.0], "std": [0.0, 1.0]}, "mean_std")
    assert scale.normalise(torch.tensor([7.0, 3.0])).tolist() == [0.0, 3.0]
    assert scale.unnormalise(torch.tensor([5.0, 3.0])).tolist() == [2.0, 3.0]


def test_statistics_are_no_part_of_the_weights():
    assert not Normalisation.from_statistics(STATISTICS, "mean_std").state_dict()


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


OPENVLA = {
    "bridge_orig": {"action": MASKED, "proprio": {"mean": [0.0], "std": [1.0]}, "num_transitions": 7},
    "fractal": {"action": STATISTICS, "num_transitions": 3, "num_trajectories": 1},
}


def test_files_of_openvla_and_of_lerobot_are_read(tmp_path):
    path = written(tmp_path / "a", "dataset_statistics.json", OPENVLA)
    assert read_statistics(path, dataset="bridge_orig") == MASKED == read_statistics(path.parent, dataset="bridge_orig")
    assert read_statistics(path, "proprio", "bridge_orig") == {"mean": [0.0], "std": [1.0]}
    one = written(tmp_path / "b", "dataset_statistics.json", {"fractal": OPENVLA["fractal"]})
    assert read_statistics(one) == STATISTICS
    lerobot = {"action": {**STATISTICS, "count": [90]}, "observation.state": {"mean": [1.0], "std": [2.0]}}
    written(tmp_path / "c", "meta/stats.json", lerobot)
    assert read_statistics(tmp_path / "c", "observation.state") == {"mean": [1.0], "std": [2.0]}
    read = Normalisation.from_statistics(read_statistics(tmp_path / "c"), "mean_std")
    assert read.middle.tolist() == pytest.approx(STATISTICS["mean"])


def test_a_policy_of_lerobot_has_statistics_beside_its_weights(tmp_path):
    tensors = {"action.mean": [1.0, 2.0], "action.std": [3.0, 4.0], "observation.state.mean": [5.0]}
    tensors = {name: torch.tensor(numbers) for name, numbers in tensors.items()}
    path = tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    save_file(tensors, path)
    assert read_statistics(tmp_path) == {"mean": [1.0, 2.0], "std": [3.0, 4.0]} == read_statistics(path)
    assert read_statistics(tmp_path, "proprio") == {"mean": [5.0]}  # by LeRobot's name for it
    actions = Normalisation.from_file(tmp_path, "action", None, "mean_std", 2)
    assert actions.normalise(torch.tensor([4.0, 10.0])).tolist() == [1.0, 2.0]
    assert Normalisation.from_file(None, "action", None, "mean_std", 2).scale.tolist() == [1.0, 1.0]
    assert Normalisation.from_file(tmp_path, "proprio", None, "mean_std", 0).size == 0
    path.write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_statistics(tmp_path)


@pytest.mark.parametrize(
    ("content", "asked", "message"),
    [
        (OPENVLA, {}, "statistics of 2 data sets; name one of bridge_orig, fractal"),
        (OPENVLA, {"dataset": "bridge_origin"}, "no data set 'bridge_origin'; did you mean 'bridge_orig'"),
        (OPENVLA, {"dataset": "fractal", "quantity": "proprio"}, "no statistics of 'proprio'; there are action"),
        ({"action": STATISTICS}, {"dataset": "fractal"}, "one data set without a name; leave out 'fractal'"),
        ({"action": STATISTICS}, {"quantity": "actions"}, "did you mean 'action'"),
        ("{", {}, "cannot be read as JSON"),
        ("[" * 100_000, {}, "cannot be read as JSON"),
        ([1], {}, "expected an object of statistics"),
        ({}, {}, "expected an object of statistics"),
        ({"action": 3}, {}, "expected an object of statistics"),
        ({"norm_stats": [1]}, {}, "expected an object of statistics"),
        ({"fractal": {"action": 5}}, {}, "no statistics of 'action'; there are none"),
        ({"fractal": {"action": 5, "proprio": STATISTICS}}, {}, "no statistics of 'action'; there are proprio"),
        ({"action": {}}, {}, "no statistics of 'action'; there are none"),
        (OPENVLA, {"dataset": ["fractal"]}, r"dataset: expected the name of a data set in .*, got \['fractal'\]"),
        (OPENVLA, {"dataset": {"fractal": 1}}, "dataset: expected the name of a data set"),
    ],
)  # fmt: skip
def test_files_that_do_not_have_it_are_refused(tmp_path, content, asked, message):
    path = written(tmp_path, "stats.json", content)
    with pytest.raises(UserError, match=message) as caught:
        read_statistics(path, **asked)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more", [{"desc": "a text"}, {"num_transitions": [5]}, {"proprio": None}, {"licence": {"name": "MIT"}}]
)
def test_what_else_a_file_says_is_not_in_the_way(tmp_path, more):
    assert read_statistics(written(tmp_path, "a.json", {"fractal": {"action": STATISTICS, **more}})) == STATISTICS
    assert read_statistics(written(tmp_path, "b.json", {"action": STATISTICS, **more})) == STATISTICS


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file .*gone.json$"):
        read_statistics(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"nor dataset_statistics.json, stats.json, meta/stats.json in it"):
        read_statistics(tmp_path)


@pytest.mark.parametrize(
    ("changed", "kind", "size", "message"),
    [
        ({}, "quantile", None, "normalisation is one of quantiles, min_max, mean_std"),
        ({"q01": None}, "quantiles", None, "q01 is not a list of numbers"),
        ({"q01": ["a"] * 3}, "quantiles", None, "q01 is not a list of numbers"),
        ({"q99": [1.0]}, "quantiles", None, "q99 has 1 numbers, and 3 are expected"),
        ({}, "quantiles", 7, "q01 has 3 numbers, and 7 are expected"),
        ({"mask": [True]}, "quantiles", None, "mask has 1 numbers"),
        ({"q99": [1.0, float("nan"), 1.0]}, "quantiles", None, "q99 should be a list of finite numbers"),
        ({"q99": [[1.0], [1.0], [1.0]]}, "quantiles", None, "q99 should be a list of finite numbers"),
        ({"q01": [1.0, 0.0, 0.0]}, "quantiles", None, "q99 has a number below q01"),
        ({"std": [1.0, -1.0, 1.0]}, "mean_std", None, "std has a number below 0"),
    ],
)  # fmt: skip
def test_statistics_that_do_not_fit_are_refused(changed, kind, size, message):
    with pytest.raises(UserError, match=message):
        Normalisation.from_statistics({**STATISTICS, **changed}, kind, size)
    lacking = {name: numbers for name, numbers in STATISTICS.items() if name != "std"}
    with pytest.raises(UserError, match="no std; there are mean, min, max, q01, q99"):
        Normalisation.from_statistics(lacking, "mean_std")


def test_running_statistics_are_those_of_all_that_was_shown():
    x = torch.randn(60, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 7.0, -3.0])
    running = RunningNormalisation(3)
    assert torch.equal(running(x), x)  # nothing was shown yet
    for part in x.split([10, 1, 49]):
        running.update(part)
    torch.testing.assert_close(running(x), (x - x.mean(0)) / x.std(0, correction=0), rtol=1e-4, atol=1e-4)
    assert running(x[:1] + 1e6).tolist() == [[10.0] * 3] and running(x[:1] - 1e6).tolist() == [[-10.0] * 3]
    other = RunningNormalisation(3)
    other.load_state_dict(running.state_dict())
    assert torch.equal(other(x), running(x))
    constant = RunningNormalisation(1)
    constant.update(torch.full((5, 1), 2.0))
    assert constant(torch.tensor([[2.0]])).item() == 0


def test_the_one_running_normalisation_of_a_model_is_found():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), RunningNormalisation(2))
    assert find_running_normalisation(model) is model[1]
    with pytest.raises(UserError, match="normalize_proprio: Sequential has 2 RunningNormalisations"):
        find_running_normalisation(model.append(RunningNormalisation(2)))
