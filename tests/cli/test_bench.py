"""The benchmark command at toy sizes: what it shows and writes, not how fast anything is."""

import argparse
import contextlib
import gc
import io
import json
import math
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from funcbayes.cli import bench
from funcbayes.cli.bench import agreement, jobs, running, table, timing
from funcbayes.cli.errors import UsageError

CPU = torch.device("cpu")
# One batch size: with toys all have the same few rows.
TOYS = list(jobs.all_cells(CPU, toy=True))[:: len(jobs.BATCHES)]


@pytest.fixture(autouse=True)
def _three_rounds(monkeypatch):
    monkeypatch.setattr(running, "BUDGET", 0)
    monkeypatch.setattr(running, "QUICK_BUDGET", 0)
    monkeypatch.setattr(jobs, "NUM_SAMPLES", 3)


def global_state():
    # Without Python's `random`: rich and the run-time type checks of the tests draw from it.
    return {
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "gc": gc.isenabled(),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of the whole command, with the smallest networks and three rounds a cell."""
    folder = tmp_path_factory.mktemp("whole") / "made" / "by the command"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(running, "BUDGET", 0)
        patch.setattr(jobs, "NUM_SAMPLES", 3)
        patch.setattr(bench, "all_cells", lambda device: TOYS)
        torch.manual_seed(17)
        before = global_state()
        code = run(folder, quick=False)
        after = global_state()
    return code, out.getvalue(), folder / "bench.json", before, after


def spread(median, q1=None, q3=None):
    return {"median": median, "q1": q1 or median, "q3": q3 or median, "rounds": 5}


def a_cell(ratio, **side):
    ours = {"seconds": spread(0.1), "ratio": spread(ratio, 0.9 * ratio, 1.1 * ratio), **side}
    sides = {jobs.LOOP: {"seconds": spread(1.5, 1.4, 2345.6)}, jobs.DEFAULT: ours}
    return {"job": "swag", "network": "mlp", "batch": 8, "sides": sides}


def shown(cells, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table.render(cells))
    return console.file.getvalue()


def run(output, **options):
    return bench.run(**{"quick": True, "device": "cpu", "output": output, **options})


# The jobs


def test_every_side_runs_and_agrees_with_the_plain_loop(whole):
    code, _, path, _, _ = whole
    results = json.loads(path.read_text())
    assert results["complaints"] == []
    assert code == 0
    assert len(results["cells"]) == len(TOYS) == 12
    for cell in results["cells"]:
        predicts = cell["job"] in ("swag", "dropout")
        strategies = list(jobs.STRATEGIES) if predicts else []
        assert list(cell["sides"]) == [jobs.LOOP, jobs.DEFAULT, *strategies]
        for name, side in cell["sides"].items():
            assert set(side) == {"seconds"} | ({"ratio"} if name != jobs.LOOP else set())
            for figure in side.values():
                assert set(figure) == {"median", "q1", "q3", "rounds"}
                assert 0 < figure["q1"] <= figure["median"] <= figure["q3"]
                assert figure["rounds"] == 3


def test_every_job_is_there_on_every_network_at_two_batch_sizes():
    cells = {(c.job, c.network, c.batch) for c in jobs.all_cells(CPU)}
    assert len(cells) == 4 * 3 * 2
    assert {job for job, _, _ in cells} == set(jobs.TITLES)


@pytest.mark.slow
def test_every_side_agrees_at_full_size_too(monkeypatch):
    monkeypatch.undo()
    cells = [running.measure(cell, CPU, quick=False) for cell in jobs.all_cells(CPU)]
    assert running.complaints(cells) == []


@pytest.mark.cuda
def test_every_side_agrees_on_cuda():
    device = torch.device("cuda", 0)
    cells = [running.measure(c, device, quick=False) for c in jobs.all_cells(device, toy=True)]
    assert running.complaints(cells) == []


@pytest.mark.parametrize("job", ["swag", "dropout", "fisher", "ensemble"])
def test_a_side_that_computes_something_else_is_found(job, monkeypatch):
    def spoil(name, worse):
        good = getattr(jobs, name)
        monkeypatch.setattr(jobs, name, lambda *args, **kwargs: worse(good(*args, **kwargs)))

    if job in ("swag", "dropout"):
        spoil("predict", lambda prediction: (2 * prediction.mean, prediction.variance))
    elif job == "fisher":
        spoil(
            "empirical_fisher",
            lambda fisher: fisher._replace(
                blocks={
                    names: block._replace(values=1.01 * block.values)
                    for names, block in fisher.blocks.items()
                }
            ),
        )
    else:
        good = jobs.ensemble.losses
        monkeypatch.setattr(
            jobs.ensemble, "losses", lambda *a, **k: (1.01 * good(*a, **k)[0], None)
        )
    cell = next(c for c in TOYS if c.job == job)
    result = running.measure(cell, CPU, quick=False)
    complaints = running.complaints([result])
    assert len(complaints) == len(result["sides"]) - 1
    assert complaints[0].startswith(f"{job}, mlp, batch 8, funcbayes: differs: ")


def test_a_side_that_raises_is_found_and_the_others_are_timed(monkeypatch):
    good = jobs.predict

    def sometimes(*args, strategy, **options):
        if strategy == "vmap":
            raise RuntimeError("no rule\nfor that")
        return good(*args, strategy=strategy, **options)

    monkeypatch.setattr(jobs, "predict", sometimes)
    result = running.measure(TOYS[0], CPU, quick=False)
    assert result["sides"]["vmap"] == {"failed": "RuntimeError: no rule"}
    assert result["sides"][jobs.DEFAULT]["ratio"]
    assert running.complaints([result]) == [
        "swag, mlp, batch 8, vmap: could not run: RuntimeError: no rule"
    ]


def test_a_cell_that_cannot_be_built_is_found(monkeypatch):
    def plan():
        raise RuntimeError("no memory")

    result = running.measure(TOYS[0]._replace(plan=plan), CPU, quick=False)
    assert running.complaints([result]) == [
        "swag, mlp, batch 8, funcbayes: could not run: RuntimeError: no memory"
    ]
    assert "failed" in shown([result])
    assert running.losses([result]) == []


# The command


def test_the_command_shows_every_job_and_says_where_the_figures_are(whole):
    _, out, path, _, _ = whole
    for title in jobs.TITLES.values():
        assert title in out
    assert out.rstrip().endswith(str(path))
    results = json.loads(path.read_text())
    assert results["schema"] == 1
    assert results["complete"] is True
    assert {"funcbayes", "torch", "threads", "cpu", "device"} <= set(results["environment"])
    for line in results["slower"]:
        assert f"  {line}" in out


def test_nothing_global_is_left_changed(whole):
    *_, before, after = whole
    for name, value in before.items():
        assert after[name] == value, name


def test_quick_has_the_default_strategy_only(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "all_cells", lambda device: TOYS[:1])
    assert run(tmp_path) == 0
    (cell,) = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert list(cell["sides"]) == [jobs.LOOP, jobs.DEFAULT]


def test_the_widest_table_fits_into_80_columns():
    cell = a_cell(0.8765, differs="by something")
    cell["network"] = "transformer"
    for name in jobs.STRATEGIES:
        cell["sides"][name] = cell["sides"][jobs.DEFAULT]
    assert shown([cell], width=80) == shown([cell], width=81)
    assert "…" not in shown([cell], width=80)


def test_what_is_slower_stands_in_the_table_and_below_it(tmp_path, monkeypatch, capsys):
    slow = a_cell(0.8)
    text = shown([slow])
    assert "0.80×" in text
    assert "slower" in text
    assert "0.72–0.88" in text
    assert "1500 ms" in text
    assert "1400–2345600" in text
    assert "slower" not in shown([a_cell(1.25), a_cell(0.9999)])
    assert running.losses([a_cell(1.25), slow]) == [
        "swag, mlp, batch 8: 0.80 [0.72–0.88] times the plain loop's speed"
    ]
    monkeypatch.setattr(bench, "all_cells", lambda device: TOYS[:1])
    monkeypatch.setattr(bench, "measure", lambda *_, **__: slow)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "Slower than the plain loop by default:\n  swag, mlp, batch 8: 0.80 [" in out
    monkeypatch.setattr(bench, "measure", lambda *_, **__: a_cell(2.0))
    run(tmp_path)
    assert "Nothing that funcbayes does by default was slower" in capsys.readouterr().out


def test_what_differs_or_fails_stands_in_the_table_and_below_it(tmp_path, monkeypatch, capsys):
    cell = a_cell(3.0, differs="shape (3,)")
    cell["sides"]["vmap"] = {"failed": "RuntimeError: no"}
    assert "3.00×" in shown([cell])
    assert "differs" in shown([cell])
    assert "failed" in shown([cell])
    monkeypatch.setattr(bench, "all_cells", lambda device: TOYS[:1])
    monkeypatch.setattr(bench, "measure", lambda *_, **__: cell)
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    assert "Failed, or computed something else than the plain loop:" in out
    assert "  swag, mlp, batch 8, funcbayes: differs: shape (3,)" in out
    assert "  swag, mlp, batch 8, vmap: could not run: RuntimeError: no" in out


def test_a_loop_that_fails_leaves_seconds(tmp_path):
    cell = a_cell(3.0)
    cell["sides"][jobs.LOOP] = {"failed": "RuntimeError: no"}
    del cell["sides"][jobs.DEFAULT]["ratio"]
    assert "100 ms" in shown([cell])
    assert running.losses([cell]) == []


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (9.0, True), (None, False)])
def test_a_busy_machine_is_said_to_be(load, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_average", lambda: load)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench, "all_cells", lambda device: TOYS[:1])
    monkeypatch.setattr(bench, "measure", lambda *_, **__: a_cell(2.0))
    run(tmp_path)
    assert ("(load 9.0 on 2 CPUs)" in capsys.readouterr().out) == said
    assert json.loads((tmp_path / "bench.json").read_text())["environment"]["load"] == load


def test_ctrl_c_writes_what_is_finished(tmp_path, monkeypatch, capsys):
    results = iter([a_cell(2.0), a_cell(3.0)])

    def measure(*_, **__):
        try:
            return next(results)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(bench, "measure", measure)
    assert run(tmp_path) == 130
    written = json.loads((tmp_path / "bench.json").read_text())
    assert not written["complete"]
    assert len(written["cells"]) == 2
    assert "Interrupted: finished 2 cells" in capsys.readouterr().out


def test_arguments_and_help():
    parser = argparse.ArgumentParser(prog="funcbayes bench")
    bench.add_arguments(parser)
    options = parser.parse_args([])
    assert vars(options).keys() == {"quick", "device", "output"}
    assert (options.quick, options.device) == (False, "auto")
    text = parser.format_help()
    for word in ("plain Python loop", "--quick", "--device", "bench.json", "examples:"):
        assert word in text


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="argument --device: there is no CUDA device here"):
        run(tmp_path, device="cuda")


@pytest.mark.parametrize("below", ["", "results"])
def test_an_output_that_is_a_file(below, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match="is a file, expected a folder: name another one"):
        run(tmp_path / "taken" / below)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written to: name another folder"):
        run(tmp_path)


# Timing and agreement


def test_sides_are_timed_in_turn_and_compared_round_by_round():
    calls = []

    def side(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    timings = timing.in_turn({"a": side("a", 0.002), "b": side("b", 0.001)}, budget=0, min_rounds=4)
    assert calls == list("ab" + "abbaabba")
    assert timings.of("a").rounds == 4
    assert timings.ratio("b", "a").median == pytest.approx(
        timing.spread([a / b for a, b in zip(*timings.seconds.values(), strict=True)]).median
    )


def test_a_slow_secondary_side_sits_rounds_out(monkeypatch):
    clock = 0.0

    def side(seconds):
        def call():
            nonlocal clock
            clock += seconds

        return call

    monkeypatch.setattr(timing, "timer", lambda: clock)
    timings = timing.in_turn(
        {"fast": side(1.0), "slow": side(10.0)}, budget=60, min_rounds=2, secondary=("slow",)
    )
    # Slow sits out once its calls have taken more than its half of the 60 seconds; fast
    # goes on until the next round would not fit.
    assert timings.of("slow").rounds == 4
    assert timings.of("fast").rounds == 20
    assert [math.isnan(t) for t in timings.seconds["slow"]] == [False] * 4 + [True] * 16
    assert timings.ratio("slow", "fast") == timing.Spread(0.1, 0.1, 0.1, 4)


def test_a_side_that_raises_is_left_out():
    def broken():
        raise ValueError("first line\nsecond line")

    timings = timing.in_turn({"good": lambda: 3, "broken": broken}, budget=0, min_rounds=2)
    assert timings.failures == {"broken": "ValueError: first line"}
    assert timings.outputs == {"good": 3}
    assert list(timings.seconds) == ["good"]


def test_two_different_computations_do_not_agree():
    x = torch.rand(4, 10)
    assert agreement.tensor_difference(x, x) is None
    assert "relative difference 0.5" in agreement.tensor_difference(x, 2 * x)
    assert "relative difference nan" in agreement.tensor_difference(x * math.nan, x)
    assert agreement.tensor_difference(x, x[:2]) == "shape (4, 10)"
    assert agreement.moments_difference((x, x), (x, x)) is None
    assert "relative difference" in agreement.moments_difference((x, 2 * x), (x, x))
    same = agreement.prediction_difference
    assert same((x, x), (x, x), num_samples=20) is None
    assert "variance 0 times" in same((x, 0 * x), (x, x), num_samples=20)
    assert "standard errors" in same((x + 9, x), (x, x), num_samples=20)
    assert same((x[:2], x[:2]), (x, x), num_samples=20) == "mean of shape (2, 10)"
    assert same((x * math.nan, x), (x, x), num_samples=20) == "not finite"
