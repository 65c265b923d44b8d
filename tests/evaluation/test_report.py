"""The HTML report: what it says, that it is self-contained, and how it behaves in a browser."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from funcbayes.evaluation import report
from funcbayes.evaluation.report import MethodReport, Points, Prediction, Report, Surface, svg

CLASSIFICATION = {"accuracy": 0.95, "nll": 0.21, "brier": 0.08, "ece": 0.03, "aurc": 0.01}
REGRESSION = {"rmse": 54.3, "nll": 5.41, "crps": 30.2, "coverage": 0.88, "width": 170.0}
HOSTILE = '</script><script>document.title = "owned"</script><img src=x onerror=alert(1)>"\'&'


def classified(*, ood=True, seed=0, surface=None):
    gen = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(40, 3, generator=gen)).softmax(-1)
    entropy = -(probs * probs.log()).sum(-1)
    strange = torch.rand(20, generator=gen) if ood else None
    return Prediction(probs.argmax(-1), probs, entropy, entropy / 2, strange, surface)


def regressed(surface=None):
    gen = torch.Generator().manual_seed(0)
    mean, noise = 100 * torch.randn(2, 30, generator=gen)
    std = torch.full((30,), 100.0)
    return Prediction(mean + noise, mean, std, std / 3, None, surface)


def method(name, figures, prediction, *, label=None, memory=(2e6,), choices=({},), seconds=None):
    seconds = seconds or {"train": [2.5], "predict": [0.004], "predict_loop": [0.02]}
    figures = {key: [v] if isinstance(v, float) else v for key, v in figures.items()}
    return MethodReport(
        name, label or name.upper(), figures, seconds, list(memory), list(choices), prediction
    )


def make(
    methods,
    *,
    task="classification",
    points=None,
    seeds=(0,),
    complete=True,
    data=None,
    command="funcbayes compare",
):
    base = {
        "name": "digits",
        "rows": {"train": 1006, "test": 40},
        "classes": ["0", "1", "2"],
        "features": [],
        "notes": ["Pixels are divided by 16."],
    }
    return Report(
        task,
        base | (data or {}),
        command,
        list(seeds),
        complete,
        methods,
        points,
        {"funcbayes": "0.1.0", "torch": "2.11.0"},
        {"cores": 2, "device": "cpu"},
        "2026-01-02T03:04:05+00:00",
    )


class Page(HTMLParser):
    """Elements with their attributes, texts by element, and all ids."""

    def __init__(self, text):
        super().__init__()
        self.source, self.elements, self.texts, self._open = text, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def images(self):
        return [
            base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode()
            for image in self.all("img")
        ]


def written(tmp_path, content):
    report.write_html(tmp_path / "report.html", content)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two methods, three seeds, one method without figures for some columns."""
    spread = {key: [v, v * 1.1, v * 0.9] for key, v in CLASSIFICATION.items()}
    plain = method("plain", {"accuracy": [0.9, 0.9, 0.9], "nll": [0.3, 0.3, 0.3]}, classified())
    swag = method(
        "swag",
        spread | {"auroc": [0.9] * 3, "fpr95": [0.4] * 3},
        classified(seed=1),
        choices=[{"learning_rate": 0.1}] * 3,
    )
    return written(tmp_path_factory.mktemp("report"), make([plain, swag], seeds=(4, 5, 6)))


def columns_of(*figures, **options):
    methods = [method(f"m{i}", f, classified(), **options) for i, f in enumerate(figures)]
    return {column.name: column for column in report.columns(methods)}


# The figures


def test_columns_are_in_the_order_of_the_metrics_and_only_those_with_values():
    names = list(columns_of({"ece": 0.1, "accuracy": 0.9}, {"fpr95": 0.2}))
    assert names == ["accuracy", "ece", "fpr95", "train", "predict", "predict_loop", "memory"]


def test_the_spread_is_the_sample_standard_deviation():
    (cell,) = columns_of({"accuracy": [0.90, 0.94]})["accuracy"].cells
    assert (cell.text, cell.spread) == ("92.0", "2.8")
    assert columns_of({"accuracy": [0.9]})["accuracy"].cells[0].spread == ""


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("accuracy", (0.9, 0.95, 0.8), [False, True, False]),
        ("nll", (0.3, 0.2, 0.4), [False, True, False]),
        ("nll", (-0.3, -0.2, 0.4), [True, False, False]),
        # As printed: 95.04 % and 95.01 % are both 95.0.
        ("accuracy", (0.9504, 0.9501, 0.8), [True, True, False]),
        # Closest to 90 %, from either side.
        ("coverage", (0.85, 0.92, 0.99), [False, True, False]),
        ("coverage", (0.88, 0.92, 0.99), [True, True, False]),
        # Narrow says nothing by itself.
        ("width", (1.0, 2.0, 3.0), [False, False, False]),
        ("nll", (math.nan, 0.2, math.inf), [False, False, False]),
    ],
)
def test_the_best_is_marked(name, values, best):
    column = columns_of(*({name: value} for value in values))[name]
    if any(not math.isfinite(v) for v in values):
        assert [cell.text for cell in column.cells] == ["NaN", "0.200", "∞"]
    assert [cell.best for cell in column.cells] == best


def test_a_single_method_is_not_the_best():
    assert not any(c.best for column in columns_of(CLASSIFICATION).values() for c in column.cells)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((54.31, 120.4), ["54.3", "120.4"]),
        ((0.01234, 0.5), ["0.0123", "0.5000"]),
        ((12345.6, 23456.7), ["12346", "23457"]),
        ((1.5e-6, 2.5e-5), ["1.50e−06", "2.50e−05"]),
        ((1.5e7,), ["1.50e+07"]),
        ((0.0, 2.0), ["0.00", "2.00"]),
        ((0.0,), ["0"]),
    ],
)
def test_units_of_the_target_keep_three_digits(values, texts):
    column = columns_of(*({"rmse": value} for value in values))["rmse"]
    assert [cell.text for cell in column.cells] == texts


def test_costs_have_one_unit_a_column():
    methods = [
        method("a", CLASSIFICATION, classified(), memory=(300 * 1024,), seconds={"train": [0.5]}),
        method("b", CLASSIFICATION, classified(), memory=(3 * 2**20,), seconds={"train": [90.0]}),
    ]
    found = {c.name: (c.unit, [cell.text for cell in c.cells]) for c in report.columns(methods)}
    assert found["train"] == ("s", ["0.50", "90.00"])
    assert found["memory"] == ("MiB", ["0.29", "3.00"])
    assert "predict" not in found


def test_negative_figures_have_a_minus_sign():
    assert columns_of({"nll": -1.5})["nll"].cells[0].text == "−1.500"


def test_an_unknown_figure_is_an_error():
    with pytest.raises(ValueError, match="method 'm0' has the figure 'acc', expected one of acc"):
        columns_of({"acc": 0.9})


@pytest.mark.parametrize("metric", report.METRICS.values(), ids=report.METRICS)
def test_every_metric_is_explained(metric):
    assert metric.description.endswith((".", "?"))
    assert metric.better is None or metric.better in ("higher", "lower") or 0 < metric.better < 1


# The page


def test_the_page_says_what_was_compared(page):
    for text in ("digits", "Classification", "2 methods", "3 seeds", "2 January 2026, 03:04 UTC",
                 "1,006 rows", "Pixels are divided by 16.", "funcbayes compare", "2.11.0",
                 "learning rate", "Shown is seed 4"):  # fmt: skip
        assert text in page.text, text
    assert "Interrupted" not in page.text
    for name in ("accuracy", "nll", "auroc"):
        assert report.METRICS[name].description in page.text
    assert report.METRICS["rmse"].description not in page.text


def test_missing_figures_are_a_dash_and_have_no_value(page):
    cells = [cell["data-value"] for cell in page.all("td") if "data-value" in cell]
    assert cells.count("") == 5  # Brier, ECE, AURC, AUROC and FPR95 of the plain network
    assert page.source.count('<span aria-hidden="true">–</span>') == 5


def test_best_values_are_named_and_not_only_coloured(page):
    assert page.source.count('<b class="best">') - 1 == page.source.count("(best)")
    assert page.source.count("(best)") > 0


def test_every_picture_has_a_text_and_every_id_is_unique(page):
    assert len(page.images) == 2 + 2 + 1
    assert all(len(image["alt"]) > 30 for image in page.all("img"))
    assert len({image["alt"] for image in page.all("img")}) == 5
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {a["href"].removeprefix("#") for a in page.all("a")}
    referred |= {
        v
        for _, a in page.elements
        for k, v in a.items()
        if k.startswith("aria-") and k.endswith("by")
    }
    assert referred <= set(ids)


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/svg+xml;base64,")), (tag, name, value)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert not page.all("link")
    assert not re.search(r"url\(|@import|https?://|import\(|fetch\(", page.source)
    for image in page.images:
        targets = re.findall(r"href=\"([^\"]*)\"|url\(([^)]*)\)", image)
        assert all((a or b).startswith(("#", "data:")) for a, b in targets)
        assert set(re.findall(r"https?://[^\"]*", image)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


def test_the_policy_allows_only_this_style_and_this_script(page):
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_pictures_follow_the_colour_scheme(page):
    for image in page.images:
        ElementTree.fromstring(image)
        drawn = image.replace(svg.palette_style(), "")
        assert "prefers-color-scheme:dark" in image
        assert "var(--ink)" in drawn
        assert not set(re.findall("#[0-9a-f]{6}\\b", drawn)) & {
            pair[0] for pair in svg.PALETTE.values()
        }


def contrast(one, other):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast_is_that_of_wcag_aa(scheme):
    colors = {name: pair[scheme] for name, pair in svg.PALETTE.items()}
    paper = colors.pop("paper")
    del colors["grid"]  # decoration
    for name in ("ink", "muted"):
        assert contrast(colors.pop(name), paper) >= 4.5
    for name, color in colors.items():
        assert contrast(color, paper) >= 3, name


def test_the_same_report_gives_the_same_file(tmp_path):
    content = make([method("swag", CLASSIFICATION, classified(ood=False))])
    first, second = written(tmp_path, content), written(tmp_path, content)
    assert first.source == second.source
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_hostile_names_stay_text(tmp_path):
    content = make(
        [method("m", CLASSIFICATION, classified(), label=HOSTILE, choices=[{HOSTILE: HOSTILE}])],
        data={key: [HOSTILE] * 3 for key in ("classes", "features", "notes")}
        | {"name": HOSTILE, "target": HOSTILE},
        command=HOSTILE,
    )
    page = written(tmp_path, content)
    assert len(page.all("script")) == 1
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert page.text.count("owned") >= 8
    for image in page.images:
        names = [element.tag.partition("}")[2] for element in ElementTree.fromstring(image).iter()]
        assert "script" not in names


def test_an_interrupted_run_says_so(tmp_path):
    one_seed = method("vi", {"accuracy": [0.9]}, classified(ood=False))
    page = written(tmp_path, make([one_seed], seeds=(0, 1, 2), complete=False))
    assert "Interrupted." in page.text
    assert "VI: 1 of 3 seeds" in page.text


def test_a_method_that_diverged_has_figures_and_no_pictures(tmp_path):
    broken = classified()
    broken = broken._replace(mean=broken.mean * math.nan)
    page = written(
        tmp_path,
        make([method("vi", {"nll": math.nan}, broken), method("swag", {"nll": 0.2}, classified())]),
    )
    assert "Not finite. The predictions of VI" in page.text
    assert "NaN" in page.text
    assert not any("VI" in image["alt"] for image in page.all("img"))
    nothing = written(tmp_path, make([method("vi", {"nll": math.nan}, broken)]))
    assert not nothing.images


def plane(mean):
    axis = torch.linspace(-1, 1, 5)
    points = torch.cartesian_prod(axis, axis)
    spread = points.square().sum(1) / 4
    return Surface(points, mean(points), spread, spread / 2)


CASES = {
    "two-moons": (
        "classification",
        classified(
            ood=False,
            surface=plane(
                lambda p: torch.stack([p[:, 0].sigmoid(), (-p[:, 0]).sigmoid(), 0 * p[:, 0]], 1)
            ),
        ),
        Points(torch.rand(700, 2), torch.arange(700) % 3),
        ["maps", "calibration", "selective"],
    ),
    "one input, classes": (
        "classification",
        classified(
            surface=Surface(
                torch.linspace(0, 1, 9)[:, None],
                torch.full((9, 3), 1 / 3),
                torch.rand(9),
                torch.rand(9),
            )
        ),
        Points(torch.rand(5, 1), torch.arange(5) % 3),
        ["calibration", "ood", "selective"],
    ),
    "gap": (
        "regression",
        regressed(Surface(torch.linspace(0, 1, 9)[:, None], *torch.rand(3, 9))),
        Points(torch.rand(5, 1), torch.rand(5)),
        ["bands", "intervals"],
    ),
    "two inputs": (
        "regression",
        regressed(plane(lambda p: p[:, 0])),
        Points(torch.rand(5, 2), torch.rand(5)),
        ["maps", "observed", "intervals"],
    ),
    "table": ("regression", regressed(), None, ["observed", "intervals"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_data_has_its_pictures(case, tmp_path):
    task, prediction, points, anchors = CASES[case]
    figures = CLASSIFICATION if task == "classification" else REGRESSION
    page = written(
        tmp_path,
        make(
            [method("swag", figures, prediction)],
            task=task,
            points=points,
            data={"features": ["age"]},
        ),
    )
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["results", *anchors, "meaning", "data", "again"]
    assert len(page.images) == len(anchors)


@pytest.mark.parametrize(
    ("labels", "message"), [((), "the report has no method"), (("A", "A"), "expected different")]
)
def test_labels_are_checked(labels, message, tmp_path):
    methods = [method("m", CLASSIFICATION, classified(), label=label) for label in labels]
    with pytest.raises(ValueError, match=message):
        report.write_html(tmp_path / "report.html", make(methods))


# In a browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

# The report in a frame as wide as a phone, then as a desktop; the outcome is left in the title.
DRIVER = """<!doctype html><title>running</title><iframe width="360" height="700"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, found = {};
  const root = page.documentElement;
  const order = () => [...page.querySelectorAll("#results tbody th")].map((th) => th.dataset.value);
  const heading = (text) => [...page.querySelectorAll("#results thead tr:last-child th")]
    .find((th) => th.textContent.trim().startsWith(text));
  const press = (text) => {
    heading(text).querySelector("button").click();
    return [heading(text).getAttribute("aria-sort"), ...order()];
  };
  found.phone = [root.scrollWidth, root.clientWidth];
  const box = page.querySelector(".scroll");
  found.table = box.scrollWidth > box.clientWidth;
  found.accuracy = [press("accuracy"), press("accuracy")];
  found.nll = [press("NLL"), press("NLL")];
  found.method = press("method");
  found.sorted = page.querySelectorAll("[aria-sort]").length;
  found.loaded = [...page.images].every((image) => image.complete && image.naturalWidth > 0);
  frame.width = 1400;
  found.desktop = [root.scrollWidth, root.clientWidth];
  document.title = JSON.stringify(found);
});
frame.srcdoc = REPORT;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_the_table_sorts_and_the_page_fits_a_phone(tmp_path):
    figures = [
        {"nll": -0.5},
        {"accuracy": 0.9, "nll": 10.0},
        {"accuracy": 0.97},
        {"accuracy": 0.95, "nll": 9.0},
    ]
    labels = a, d, b, c = ["a " + "very long name " * 9, "d", "b" * 120, "c"]
    methods = [
        method(f"m{i}", f, classified(), label=label)
        for i, (f, label) in enumerate(zip(figures, labels, strict=True))
    ]
    page = written(
        tmp_path, make(methods, data={"name": "x" * 150, "notes": ["y" * 150]}, command="z" * 300)
    )
    text = json.dumps(page.source).replace("</", "<\\/")
    (tmp_path / "driver.html").write_text(DRIVER.replace("REPORT", text), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "driver.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    found = json.loads(html.unescape(title))
    # Best first, then the other way; missing values last both times.
    assert found["accuracy"] == [["descending", b, c, d, a], ["ascending", d, c, b, a]]
    # By value: 10 comes after 9 and −0.5 before both.
    assert found["nll"] == [["ascending", a, c, d, b], ["descending", d, c, a, b]]
    assert found["method"] == ["ascending", a, b, c, d]
    assert found["sorted"] == 1
    assert found["loaded"]
    assert found["table"]
    for width in ("phone", "desktop"):
        scroll, client = found[width]
        assert scroll <= client
    assert 300 < found["phone"][1] <= 360
