"""The benchmark program at toy sizes: that every cell runs, not how fast it is."""

import json
import subprocess

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import floors, growth, limits, peers, report, running
from benchmarks.cells import all_cells
from benchmarks.memory import peak_memory
from benchmarks.models import NETWORKS, Setting
from benchmarks.peers import BASELINE
from benchmarks.plans import FORMATS, LOOP, OURS

CPU = torch.device("cpu")


def toy_cells():
    # A cell's sizes differ in the number of inputs and members only, which a toy lacks.
    return {c.name.partition("=")[0].rsplit("/", 1)[0]: c for c in all_cells()}.values()


def spread(median, q1=None, q3=None):
    return {"median": median, "q1": q1 or median, "q3": q3 or median, "rounds": 5}


def a_cell(ratio, floor: float | None = 1.0, **side):
    ours = {"seconds": spread(0.1), "ratio": ratio, "floor": floor, **side}
    baseline = {"seconds": spread(0.2), "ratio": None}
    return {
        "name": "predict/swag/mlp/N=1",
        "baseline": BASELINE,
        "work": None,
        "goals": [],
        "sides": {BASELINE: baseline, "auto": ours},
    }


@pytest.mark.parametrize("cell", toy_cells(), ids=lambda cell: cell.name)
def test_every_cell_runs_at_toy_size_and_fits_the_schema(cell):
    torch.manual_seed(0)
    result = running.run(cell, CPU, toy=True)

    assert result["name"] == cell.name
    assert result["baseline"] in (BASELINE, LOOP, FORMATS[0], None)
    ours = [name for name in result["sides"] if name in OURS]
    assert ours
    for name, side in result["sides"].items():
        if "absent" in side:
            assert name not in OURS, side["absent"]
            assert side["absent"]
            continue
        assert set(side) <= {"seconds", "ratio", "floor", "rival", "disagrees", "error"}
        assert set(side["seconds"]) == {"median", "q1", "q3", "rounds"}
        assert side["seconds"]["median"] > 0
        assert not (name in OURS and "disagrees" in side), side
    assert result["baseline"] is None or result["baseline"] in result["sides"]
    results = json.loads(json.dumps(report.collect([result], quick=True)))
    assert cell.name.partition("/")[2] in report.markdown(results)


def test_a_peer_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(peers, "load", lambda name: (None, "not installed"))
    cell = next(c for c in all_cells() if c.name == "predict/swag/mlp/N=1")
    result = running.run(cell, CPU, toy=True)

    assert result["sides"][BASELINE] == {"absent": "not installed"}
    assert result["sides"]["auto"]["ratio"] is None
    assert running.failures([result]) == []
    assert running.unchecked([result]) == [cell.name]
    assert "No ratio" in report.markdown(report.collect([result], quick=True))


def test_a_side_of_ours_that_raises_is_a_failure(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("nothing works\nat all")

    monkeypatch.setattr("funcbayes.predict", broken)
    cell = next(c for c in all_cells() if c.name == "predict/swag/mlp/N=1")
    result = running.run(cell, CPU, toy=True)

    assert result["sides"]["auto"] == {"absent": "RuntimeError: nothing works"}
    assert any("auto: did not run" in line for line in running.failures([result]))


def test_names_are_unique_and_every_floor_and_goal_fits_a_cell():
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names)
    for floor in floors.FLOORS:
        assert any(floors.fnmatchcase(name, floor.cells) for name in names), floor
    for goal in floors.GOALS:
        assert any(floors.fnmatchcase(name, goal.cells) for name in names), goal
        assert goal.floor < goal.aim
    assert all(floors.floor_of(n, "auto") for n in names if n.startswith("predict/"))


def test_a_ratio_fails_only_if_its_upper_quartile_is_under_the_floor():
    assert running.failures([a_cell(spread(1.2))]) == []
    assert running.failures([a_cell(spread(0.97, 0.9, 1.01))]) == []
    (line,) = running.failures([a_cell(spread(0.9, 0.85, 0.95))])
    assert "0.9 times" in line
    assert "floor 1" in line


def test_a_floor_to_the_fastest_library_holds_too():
    rival = {"name": "BackPACK", "ratio": spread(0.9, 0.85, 0.95), "floor": 1.0}
    (line,) = running.failures([a_cell(spread(3.0), rival=rival)])
    assert "0.9 times the speed of BackPACK" in line
    assert running.failures([a_cell(spread(3.0), rival={**rival, "floor": None})]) == []


def test_the_report_names_every_loss():
    results = report.collect([a_cell(spread(0.9, 0.85, 0.95))], quick=False)
    text = report.markdown(results)
    assert "- predict/swag/mlp/N=1, auto: 0.90" in text
    assert results["schema"] == report.SCHEMA
    assert {"commit", "python", "torch", "threads", "cpu", "peers"} <= set(results["environment"])


def test_the_report_names_every_goal_that_is_not_reached():
    goal = {"cells": "*", "side": "auto", "to_rival": False, "floor": 2.0, "aim": 4.0}
    missed = a_cell(spread(1.5))
    missed["goals"] = [goal]
    text = report.markdown(report.collect([missed], quick=False))
    assert "1 of 1 not reached" in text
    assert "| **1.50** | 2 | 4 |" in text


def test_geometric_means_are_over_the_original_classes_cells():
    cells = [a_cell(spread(2.0)), a_cell(spread(8.0)), {**a_cell(spread(50.0)), "baseline": LOOP}]
    assert report.geometric_means(cells) == {"functions": {"mean": pytest.approx(4.0), "cells": 2}}


def test_limits_bound_what_was_measured():
    found = limits.measure(CPU, min_seconds=0.01)
    assert 1e8 < found.operations < 1e14
    assert 1e7 < found.bytes < 1e13
    work = limits.Work(operations=found.operations, bytes=3 * found.bytes)
    assert limits.seconds(work, found._asdict()) == pytest.approx(3)
    cell = {**a_cell(spread(1.5)), "work": {"operations": 1e9, "bytes": 1.0}}
    text = report.markdown(
        report.collect([cell], quick=False, machine_limits={"operations": 2e10, "bytes": 1e9})
    )
    assert "| 50 % |" in text  # 0.05 s of 0.1


def test_growth_is_measured_fitted_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "BUDGET", 0.0)
    curve = growth.run(growth.CURVES[2], CPU, (10**3, 10**4, 10**5, 10**13))
    assert [p["size"] for p in curve["points"]] == [10**3, 10**4, 10**5, 10**13]
    assert curve["points"][-1]["left_out"] == "not enough memory"
    assert set(curve["slopes"]) == {"auto", BASELINE}
    exact = [{"size": n, "seconds": {"auto": 3.0 * n**0.5}} for n in (1, 10, 100, 1000)]
    assert growth._slope(exact, "auto") == pytest.approx(0.5)
    assert growth._slope(exact, BASELINE) is None
    results = report.collect([a_cell(spread(2.0))], quick=False, curves=[curve])
    _, tables = report.write(results, tmp_path)
    assert "## Time against parameters" in tables.read_text()
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_peak_memory_is_one_of_the_call():
    def call():
        return torch.zeros(32 * 2**20, dtype=torch.uint8).add_(1)

    megabytes = peak_memory(call, CPU)
    if megabytes is None:
        pytest.skip("this system does not tell the peak memory")
    # Anything that the test process freed earlier hides part of the peak, never adds.
    assert megabytes < 100


def test_the_models_have_their_stated_sizes():
    setting = Setting(CPU)
    sizes = {"mlp": 536e3, "lenet": 545e3, "resnet-w16": 701e3, "resnet-w64": 11.2e6}
    for name, expected in sizes.items():
        num = sum(p.numel() for p in setting.build(name).parameters())
        assert num == pytest.approx(expected, rel=0.005)
    state = torch.random.get_rng_state()
    one, other = setting.build("mlp").state_dict(), setting.build("mlp").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_command_writes_both_files_and_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "run", lambda *_, **__: a_cell(spread(0.5)))
    only = ["--only", "predict/swag/mlp/N=1024", "--no-memory", "--output", str(tmp_path)]
    assert program.main(only) == 0
    assert program.main([*only, "--check"]) == 1
    out = capsys.readouterr().out
    assert "FAILURE predict/swag/mlp/N=1, auto" in out
    assert str(tmp_path / "benchmarks.md") in out
    data = json.loads((tmp_path / "benchmarks.json").read_text())
    assert data["cells"]
    assert (data["environment"]["device"], data["environment"]["tf32"]) == ("cpu", None)


def test_a_name_that_no_cell_has_is_an_error(capsys):
    with pytest.raises(SystemExit):
        program.main(["--only", "predikt"])
    assert "no cell's name contains" in capsys.readouterr().err


# Devices

GPU = torch.device("cuda", 1)


@pytest.fixture
def devices(monkeypatch):
    """Two CUDA devices, as far as names and numbers go; those that were made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (96 GB)")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The program without its measurements, in another folder; what each of them was asked for."""
    calls = {}

    def instead(module, name, result):
        def call(*args, **_):
            calls[module.__name__.partition(".")[2], name] = args
            return result

        monkeypatch.setattr(module, name, call)

    instead(limits, "measure", limits.Limits(1e12, 1e11))
    instead(running, "run", a_cell(spread(2.0)))
    instead(running, "memory", 7.0)
    points = [{"size": 1, "seconds": {"auto": 1.0}}]
    slopes = {"auto": None, BASELINE: None}
    instead(growth, "run", {"name": "x", "title": "x", "points": points, "slopes": slopes})
    few = [cell for cell in all_cells() if cell.name.startswith("predict/swag/mlp")]
    monkeypatch.setattr(program, "all_cells", lambda: few)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    return calls


@pytest.mark.parametrize(
    ("options", "device", "folder"),
    [
        ([], CPU, "benchmarks/results"),
        (["--device", "cpu"], CPU, "benchmarks/results"),
        (["--device", "cpu", "--quick"], CPU, "results/benchmarks"),
        (["--device", "cuda:1"], GPU, "benchmarks/results/nvidia-h200-96-gb"),
        (["--device", "cuda:1", "--quick"], GPU, "results/benchmarks/nvidia-h200-96-gb"),
        (["--device", "cuda"], torch.device("cuda", 0), "benchmarks/results/nvidia-h200-96-gb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_measurement_is_of_the_device(options, device, folder, devices, asked, tmp_path):
    assert program.main([*options, "--full"]) == 0
    assert devices == ([] if device == CPU else [device])
    assert asked["limits", "measure"] == (device,)
    assert asked["running", "run"][1:] == (device,)
    assert asked["growth", "run"][1:] == (device,)
    if "--quick" not in options:
        assert asked["running", "memory"][2:] == (device,)
    env = json.loads((tmp_path / folder / "benchmarks.json").read_text())["environment"]
    text = (tmp_path / folder / "benchmarks.md").read_text()
    if device == CPU:
        assert (env["device"], env["tf32"]) == ("cpu", None)
        assert "TF32" not in text
    else:
        assert env["device"] == "NVIDIA H200 (96 GB)"
        assert env["tf32"] == {"matrix products": False, "convolutions": True}
        assert "NVIDIA H200 (96 GB) (float32 with TF32 in convolutions), " in text


def test_memory_is_measured_in_a_process_that_gets_the_device(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "7.0\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    cell = next(iter(all_cells()))
    assert running.memory(cell, "auto", GPU) == 7
    assert commands[0][3:] == ["--device", "cuda:1", "--memory-of", cell.name, "auto"]
    seen = []
    monkeypatch.setattr(running, "memory_here", lambda *args: seen.append(args))
    program.main(["--device", "cpu", "--memory-of", cell.name, "auto"])
    assert seen[0][1:] == ("auto", CPU)


@pytest.mark.parametrize(
    ("device", "there", "message"),
    [
        ("gpu", 0, "it is 'gpu', expected cpu, cuda or cuda:N"),
        ("cuda:x", 2, "it is 'cuda:x', expected cpu, cuda or cuda:N"),
        ("mps", 0, "it is 'mps', expected cpu, cuda or cuda:N"),
        ("cuda", 0, "it is 'cuda', but there is no CUDA device here"),
        ("cuda:2", 2, "it is 'cuda:2', but the last device is cuda:1 here"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(device, there, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(SystemExit) as error:
        program.main(["--device", device])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument --device: {message}")


def test_convolutions_may_differ_by_more_on_cuda():
    assert Setting(CPU).tolerance < Setting(GPU).tolerance


@pytest.mark.cuda
def test_networks_and_inputs_on_cuda_are_those_of_the_cpu():
    here, there = Setting(CPU, toy=True), Setting(torch.device("cuda", 0), toy=True)
    for name in NETWORKS:
        pairs = zip(here.inputs(name, 3), there.inputs(name, 3), strict=True)
        expected, found = (s.build(name).state_dict() for s in (here, there))
        for a, b in (*pairs, *((expected[entry], found[entry]) for entry in expected)):
            assert b.is_cuda
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("cell", toy_cells(), ids=lambda cell: cell.name)
def test_every_cell_runs_on_cuda(cell):
    torch.manual_seed(0)
    result = running.run(cell, torch.device("cuda", 0), toy=True)
    for name, side in result["sides"].items():
        if name in OURS:
            assert "absent" not in side, side
            assert "disagrees" not in side, side


@pytest.mark.cuda
def test_limits_and_peak_memory_on_cuda():
    device = torch.device("cuda", 0)
    found = limits.measure(device, min_seconds=0.01)
    assert 1e11 < found.operations < 1e16
    assert 1e10 < found.bytes < 1e14
    held = torch.zeros(2**20, device=device)  # 4 MB that are not the call's
    megabytes = peak_memory(lambda: torch.zeros(2**24, device=device).add_(1), device)
    assert megabytes == pytest.approx(64, abs=1)
    assert held.is_cuda
