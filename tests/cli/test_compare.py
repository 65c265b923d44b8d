"""`funcbayes compare` in small: files, schema, reproducibility, interrupts."""

import json
import math

import pytest
import torch

from funcbayes.cli import commands, data, main, methods
from funcbayes.cli.data import ShuffledBatches, digits

METRICS = {"accuracy", "nll", "brier", "ece", "auroc", "fpr95"}
SMALL = ["compare", "--epochs", "2", "--samples", "2"]


def figures(folder):
    return json.loads((folder / "results.json").read_text())


def without_times(report):
    for part in report["methods"].values():
        del part["seconds"]
    return report


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    arguments = ["--method", "dropout", "--method", "laplace", "--output", str(folder)]
    assert main(SMALL + arguments) == 0
    return folder


def test_files_and_schema(small_run):
    assert sorted(path.name for path in small_run.iterdir()) == [
        "ood.png",
        "reliability.png",
        "results.json",
    ]
    report = figures(small_run)
    assert set(report) == {"configuration", "data", "versions", "machine", "methods"}
    assert report["configuration"] == {
        "data": "digits",
        "methods": ["laplace", "dropout"],
        "samples": 2,
        "seed": 0,
        "epochs": 2,
        "ood_classes": [8, 9],
    }
    assert report["data"]["classes"] == list(range(8))
    parts = ("train", "validation", "test", "out_of_distribution")
    assert sum(report["data"][part] for part in parts) == 1797
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["methods"]) == ["plain", "laplace", "dropout"]
    for name, part in report["methods"].items():
        assert set(part["metrics"]) == METRICS
        assert all(math.isfinite(value) for value in part["metrics"].values())
        assert set(part["seconds"]) == {"train", "predict", "predict_loop"}
        assert (part["metrics_of_mutual_information"] is None) == (name == "plain")
    assert "prior_precision" in report["methods"]["laplace"]["choices"]


def test_the_same_seed_gives_the_same_figures_and_another_does_not(small_run, tmp_path):
    # One method less: the others do not depend on which are there.
    again = [*SMALL, "--method", "dropout", "--output", str(tmp_path)]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main(again) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    want, got = without_times(figures(small_run)), without_times(figures(tmp_path))
    for name in ("plain", "dropout"):
        assert got["methods"][name] == want["methods"][name]
    assert main([*again, "--seed", "1"]) == 0
    other = without_times(figures(tmp_path))
    assert other["methods"]["plain"]["metrics"] != want["methods"]["plain"]["metrics"]


def test_the_table_is_printed(capsys, tmp_path):
    assert main([*SMALL, "--method", "dropout", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("plain", "dropout", "NLL", "AUROC", "results.json"):
        assert word in printed
    assert "…" not in printed


def test_ctrl_c_leaves_what_is_finished(monkeypatch, capsys, tmp_path):
    def interrupt(task):
        task.begin(1)
        raise KeyboardInterrupt

    monkeypatch.setitem(methods.METHODS, "dropout", interrupt)
    arguments = ["--method", "laplace", "--method", "dropout", "--output", str(tmp_path)]
    assert main(SMALL + arguments) == 130
    assert list(figures(tmp_path)["methods"]) == ["plain", "laplace"]
    assert (tmp_path / "reliability.png").exists()
    assert "finished 2 of 3 methods" in capsys.readouterr().out


def test_ctrl_c_before_the_first_method(monkeypatch, tmp_path):
    def interrupt(task):
        raise KeyboardInterrupt

    monkeypatch.setitem(methods.METHODS, "plain", interrupt)
    assert main([*SMALL, "--output", str(tmp_path)]) == 130
    assert not list(tmp_path.iterdir())


def test_splits_are_disjoint_and_stratified():
    data = digits(ood_classes=(3,), key=0)
    assert data.classes == (0, 1, 2, 4, 5, 6, 7, 8, 9)
    parts = (data.train, data.validation, data.test)
    images = torch.cat([*(part.images for part in parts), data.ood])
    # The data set holds no image twice, so every one is in exactly one part.
    assert len(images) == len(images.flatten(1).unique(dim=0)) == 1797
    assert images.min() == 0
    assert images.max() == 1
    for part in parts:
        counts = part.targets.bincount(minlength=9)
        assert counts.min() > 0.8 * counts.max()


def test_batches_are_reshuffled_each_epoch_and_whole():
    data = digits(ood_classes=(8, 9), key=0).train
    batches = ShuffledBatches(data, batch_size=32, key=1)
    first, second = ([images for images, _ in batches] for _ in range(2))
    assert len(first) == len(batches) == len(data.targets) // 32
    assert all(len(images) == 32 for images in first)
    assert not torch.equal(first[0], second[0])
    again = [images for images, _ in ShuffledBatches(data, batch_size=32, key=1)]
    assert torch.equal(torch.cat(again), torch.cat(first))


@pytest.mark.slow
def test_every_method_matches_or_beats_the_plain_network(tmp_path):
    # Four seeds: on one, a single misread digit moves the NLL by as much as a method does.
    ratios = {name: [] for name in methods.METHODS}
    for seed in range(4):
        assert main(["compare", "--seed", str(seed), "--output", str(tmp_path)]) == 0
        parts = figures(tmp_path)["methods"]
        for name, part in parts.items():
            ratios[name].append(part["metrics"]["nll"] / parts["plain"]["metrics"]["nll"])
            assert part["metrics"]["accuracy"] > 0.95
            assert part["metrics"]["auroc"] > 0.85
    for name, values in ratios.items():
        # Geometric mean. The plain network's own is 1.
        assert math.exp(sum(map(math.log, values)) / len(values)) <= 1, (name, values)


def test_the_command_line_names_every_method_and_data_set():
    assert ("plain", *commands.METHOD_NAMES) == tuple(methods.METHODS)
    assert tuple(data.DATA) == commands.DATA_NAMES
