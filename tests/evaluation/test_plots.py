"""Pictures: what they show, not how they look."""

import math
import sys

import pytest
import torch

from funcbayes.evaluation import plots


def predictions(num_methods):
    gen = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_methods, 200, 5, generator=gen)
    targets = torch.randint(5, (200,), generator=gen)
    return {f"method {i}": (row.softmax(-1), targets) for i, row in enumerate(logits)}


def scores(num_methods):
    gen = torch.Generator().manual_seed(0)
    inside = math.log(5) * torch.rand(num_methods, 100, generator=gen)
    outside = math.log(5) * torch.rand(num_methods, 50, generator=gen).sqrt()
    return {f"method {i}": pair for i, pair in enumerate(zip(inside, outside, strict=True))}


@pytest.mark.parametrize("num_methods", [1, 2, 3, 4, 6])
def test_every_method_has_its_panel_and_the_file_is_written(num_methods, tmp_path):
    titles = [f"method {i}" for i in range(num_methods)]
    reliability = plots.reliability_diagrams(predictions(num_methods))
    assert [a.get_title("left") for a in reliability.axes[::2]] == titles
    assert all("ECE" in a.get_title("right") for a in reliability.axes[::2])
    ood = plots.ood_histograms(scores(num_methods), upper=math.log(5))
    assert [a.get_title("left") for a in ood.axes] == titles
    assert all("AUROC" in a.get_title("right") for a in ood.axes)
    for figure in (reliability, ood):
        path = tmp_path / "figure.png"
        figure.savefig(path)
        assert path.stat().st_size > 10_000


def test_bars_reach_the_accuracy():
    probs = torch.tensor([[0.9, 0.1]] * 4)
    figure = plots.reliability_diagrams({"m": (probs, torch.tensor([0, 0, 0, 1]))}, num_bins=5)
    upper, lower = figure.axes
    bar, gap = upper.patches
    assert bar.get_height() == pytest.approx(0.75)
    assert gap.get_y() == pytest.approx(0.75)
    assert gap.get_height() == pytest.approx(0.15, rel=1e-6)
    assert [b.get_height() for b in lower.patches] == [0, 0, 0, 0, 1]


def test_histograms_keep_scores_beyond_the_end():
    above = torch.full((4,), math.log(2) + 1e-6)
    figure = plots.ood_histograms({"m": (torch.zeros(4), above)}, upper=math.log(2))
    inside, _, outside, _ = figure.axes[0].patches
    assert inside.get_data().values[0] == 1
    assert outside.get_data().values[-1] == 1


def test_scores_that_are_all_zero_are_drawn():
    plots.ood_histograms({"m": (torch.zeros(4), torch.zeros(4))})


def test_nothing_is_left_in_pyplot():
    plots.reliability_diagrams(predictions(1))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("draw", [plots.reliability_diagrams, plots.ood_histograms])
def test_no_method_is_an_error(draw):
    with pytest.raises(ValueError, match="there is no method to draw"):
        draw({})
