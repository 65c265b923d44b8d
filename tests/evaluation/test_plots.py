"""Pictures: what they show, not how they look."""

import math
import sys

import numpy as np
import pytest
import torch

from funcbayes.evaluation import plots
from funcbayes.evaluation.plots import Points, Surface


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


def moments(num_methods, num=100):
    gen = torch.Generator().manual_seed(0)
    mean, targets = torch.randn(num_methods, num, generator=gen), torch.randn(num, generator=gen)
    return {f"method {i}": (row, torch.full((num,), 1.0), targets) for i, row in enumerate(mean)}


def line_surface(spread):
    x = torch.linspace(-1, 1, 30)[:, None]
    std = torch.full((30,), float(spread))
    return Surface(points=x, mean=x[:, 0].sin(), total=std, epistemic=std / 2)


def plane_surface(side=6, order=None):
    axis = torch.linspace(-1, 1, side)
    points = torch.cartesian_prod(axis, 2 * axis)
    points = points if order is None else points[order]
    p = points[:, 0].sigmoid()
    probs = torch.stack([p, 1 - p], 1)
    total = -(probs * probs.log()).sum(1)
    return Surface(points=points, mean=probs, total=total, epistemic=points[:, 1].abs() / 9)


PLANE_POINTS = Points(torch.tensor([[0.1, 0.2], [-0.5, 1.0], [0.3, -1.0]]), torch.tensor([0, 1, 1]))
LINE_POINTS = Points(torch.tensor([[-0.5], [0.5]]), torch.tensor([0.0, 9.0]))

DRAWINGS = {
    "reliability": lambda n, **options: plots.reliability_diagrams(predictions(n), **options),
    "ood": lambda n, **options: plots.ood_histograms(scores(n), **options),
    "bands": lambda n, **options: plots.regression_bands(
        {f"method {i}": line_surface(i + 1) for i in range(n)}, LINE_POINTS, **options
    ),
    "observed": lambda n, **options: plots.observed_against_predicted(moments(n), **options),
    "maps": lambda n, **options: plots.uncertainty_maps(
        {f"method {i}": plane_surface() for i in range(n)},
        PLANE_POINTS,
        classes=("a", "b"),
        **options,
    ),
    "risk": lambda n: plots.risk_coverage_curves(scores_and_losses(n)),
    "coverage": lambda n: plots.interval_coverage_curves(moments(n)),
}
PANELS = ("reliability", "ood", "bands", "observed", "maps")


def scores_and_losses(num_methods):
    gen = torch.Generator().manual_seed(0)
    pairs = torch.rand(num_methods, 2, 40, generator=gen)
    return {f"method {i}": (a, b < 0.3) for i, (a, b) in enumerate(pairs)}


def titles(figure):
    return [title for axes in figure.axes if (title := axes.get_title("left"))]


def notes(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("kind", PANELS)
@pytest.mark.parametrize("num_methods", [1, 4])
def test_every_method_has_its_panel(kind, num_methods):
    assert titles(DRAWINGS[kind](num_methods)) == [f"method {i}" for i in range(num_methods)]


@pytest.mark.parametrize("kind", DRAWINGS)
def test_the_file_is_written_and_nothing_is_left_in_pyplot(kind, tmp_path):
    DRAWINGS[kind](2).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("kind", PANELS)
def test_a_panel_alone_has_the_common_axes_and_no_text_around(kind):
    alone, page = DRAWINGS[kind](3, panel="method 1"), DRAWINGS[kind](3)
    assert not titles(alone)
    assert not alone.legends
    assert not alone.texts
    num = len(alone.axes)
    for axes, same in zip(alone.axes, page.axes[num : 2 * num], strict=True):
        assert axes.get_xlim() == pytest.approx(same.get_xlim())
        assert axes.get_ylim() == pytest.approx(same.get_ylim())


@pytest.mark.parametrize("kind", PANELS)
def test_an_unknown_panel_is_an_error(kind):
    with pytest.raises(ValueError, match="`panel` is 'swag', expected one of method 0, method 1"):
        DRAWINGS[kind](2, panel="swag")


@pytest.mark.parametrize(
    "draw",
    [
        plots.reliability_diagrams,
        plots.ood_histograms,
        plots.risk_coverage_curves,
        plots.interval_coverage_curves,
        plots.observed_against_predicted,
        plots.uncertainty_maps,
        lambda nothing: plots.regression_bands(nothing, LINE_POINTS),
    ],
)
def test_no_method_is_an_error(draw):
    with pytest.raises(ValueError, match="there is no method to draw"):
        draw({})


def test_panels_say_their_figures():
    assert all(text.startswith("ECE ") for text in notes(DRAWINGS["reliability"](2)))
    assert all(text.startswith("AUROC ") for text in notes(DRAWINGS["ood"](2)))


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


def test_risk_rises_to_the_error_rate_and_ends_are_named():
    # The least certain of four inputs is wrong, so is the second one.
    uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 0, 1]).bool()
    figure = plots.risk_coverage_curves({"m": (uncertainty, wrong)})
    line, end = figure.axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(line.get_ydata(), [0, 1 / 2, 1 / 3, 1 / 2])
    assert (end.get_xdata(), end.get_ydata()) == ([1], [0.5])
    assert notes(figure) == ["m"]


def test_names_of_lines_that_meet_do_not_overlap():
    figure = plots.risk_coverage_curves(
        dict.fromkeys("abcdefghij", scores_and_losses(1)["method 0"])
    )
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts)
    inches = np.diff(heights) * figure.axes[0].bbox.height / figure.dpi
    assert len(heights) == 10
    assert inches.min() >= 8.5 / 72  # the height of the type
    assert 0 <= heights[0] <= heights[-1] <= 1


def test_lines_are_told_apart_without_colour():
    figure = plots.risk_coverage_curves(scores_and_losses(7))
    dashes = [line._dash_pattern for line in figure.axes[0].lines[:7]]
    markers = [line.get_marker() for line in figure.axes[0].lines[7:]]
    assert len(set(markers)) == 7
    assert len(set(map(str, dashes))) >= 6


def test_interval_coverage_is_the_excess_over_the_level():
    # Errors of 1 at a standard deviation of 1: inside from 68.27 % on.
    mean, targets = torch.zeros(50), torch.ones(50)
    figure = plots.interval_coverage_curves({"m": (mean, torch.ones(50), targets)})
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    levels = line.get_xdata()
    np.testing.assert_allclose(line.get_ydata(), (levels >= 0.6827) - levels, atol=1e-12)


def test_certain_predictions_are_inside_only_where_exact():
    mean, targets = torch.zeros(2), torch.tensor([0.0, 1.0])
    figure = plots.interval_coverage_curves({"m": (mean, torch.zeros(2), targets)})
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    np.testing.assert_allclose(line.get_ydata() + line.get_xdata(), 0.5)


def test_bands_are_central_intervals_and_hold_the_data():
    figure = plots.regression_bands({"m": line_surface(2)}, LINE_POINTS, level=0.9)
    axes = figure.axes[0]
    upper = axes.lines[1].get_ydata()
    torch.testing.assert_close(
        torch.tensor(upper), line_surface(2).mean.double() + 2 * 1.6448536, rtol=1e-6, atol=1e-6
    )
    assert axes.get_ylim()[1] > 9
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [0, 9])


def test_observed_against_predicted_counts_all_and_draws_some():
    figure = plots.observed_against_predicted(moments(1, num=1000), max_points=60)
    drawn = sum(len(container[0].get_xdata()) for container in figure.axes[0].containers)
    assert drawn == 60
    (mean, std, targets) = moments(1, num=1000)["method 0"]
    inside = ((mean - targets).abs() <= 1.6449 * std).double().mean()
    assert notes(figure) == [f"{100 * inside:.0f} % inside"]


def test_maps_have_one_scale_and_do_not_mind_the_order_of_the_points():
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled, straight = plane_surface(order=order), plane_surface()
    shuffled = shuffled._replace(
        epistemic=straight.epistemic[order], total=straight.total[order], mean=straight.mean[order]
    )
    figure = plots.uncertainty_maps({"a": straight, "b": shuffled}, PLANE_POINTS, classes="ab")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len({image.get_clim() for image in images}) == 1
    expected = straight.epistemic.reshape(6, 6).T
    for image in (images[1], images[3]):
        np.testing.assert_allclose(image.get_array(), expected, rtol=1e-6)
    markers = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert [len(line.get_xdata()) for line in markers] == [1, 2]


def test_maps_of_a_regression_have_no_classes():
    surface = plane_surface()
    surface = surface._replace(mean=surface.total)
    points = Points(PLANE_POINTS.inputs, torch.tensor([0.5, 1.5, 2.5]))
    figure = plots.uncertainty_maps({"m": surface}, points, label="std")
    assert len(figure.axes[0].lines[0].get_xdata()) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.regression_bands({"m": plane_surface()}, LINE_POINTS), r"\[points, 1\]"),
        (lambda: plots.regression_bands({"m": line_surface(1)}, PLANE_POINTS), "`points.inputs`"),
        (lambda: plots.uncertainty_maps({"m": line_surface(1)}), r"\[points, 2\]"),
        (lambda: plots.observed_against_predicted(moments(1), level=90), "`level` is 90"),
        (
            lambda: plots.uncertainty_maps({"m": Surface(*(x[:35] for x in plane_surface()))}),
            "has 35 points, expected those of a square grid",
        ),
        (
            lambda: plots.interval_coverage_curves(
                {"m": (torch.zeros(3), torch.ones(2), torch.zeros(3))}
            ),
            r"`std` has shape \(2,\) beside targets of shape \(3,\)",
        ),
        (
            lambda: plots.interval_coverage_curves(
                {"m": (torch.zeros(2), -torch.ones(2), torch.zeros(2))}
            ),
            "`std` has the entry -1, expected none below 0",
        ),
        (
            lambda: plots.interval_coverage_curves(
                {"m": (torch.zeros(2), torch.ones(2) / 0, torch.zeros(2))}
            ),
            "`std` holds NaN or infinite values",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_hold_no_formula_and_no_control_character(tmp_path):
    pair = predictions(1)["method 0"]
    figure = plots.reliability_diagrams({"a $x^ b\x07\n" + "c" * 60: pair})
    assert titles(figure) == [r"a \$x^ b  " + "c" * 26 + "…"]
    figure.savefig(tmp_path / "figure.png")
