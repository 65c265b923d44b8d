"""Arguments of the command line: every error is one sentence, and nothing is left behind."""

import subprocess
import sys

import pytest

from funcbayes.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digit"], "there is no data set 'digit': did you mean 'digits'?"),
        (["--data", "mnist"], "there is no data set 'mnist': choose from digits"),
        (["--data", "gone.csv"], "gone.csv"),
        (["--method", "swagg"], "there is no method 'swagg': did you mean 'swag'?"),
        (["--method", "x"], "there is no method 'x': choose from swag, laplace, laplace-head, "),
        (["--method", "laplace-kron"], "did you mean 'laplace-kronecker'?"),
        (["--method", "laplace-diag"], "did you mean 'laplace-diagonal'?"),
        (["--task", "classify"], "--task: there is no task 'classify': did you mean 'classifica"),
        (["--samples", "0"], "--samples: it is '0', expected an integer of at least 1"),
        (["--samples", "many"], "--samples: it is 'many', expected an integer of at least 1"),
        (["--epochs", "-3"], "--epochs: it is '-3', expected an integer of at least 1"),
        (["--seeds", "0"], "--seeds: it is '0', expected an integer of at least 1"),
        (["--seed", "-1"], "--seed: it is '-1', expected an integer of at least 0"),
        (["--seed", "1.5"], "--seed: it is '1.5', expected an integer of at least 0"),
        (["--device", "gpu"], "--device: it is 'gpu', expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "--device: it is 'cuda:x', expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device: it is 'cuda:99', but there "),
        (["--config", "gone.toml"], "--config: 'gone.toml' cannot be read"),
        (["--target", "price"], "--target: it is for files"),
        (["--ood-classes", "12"], "class 12 is not in the data, whose classes are 0, 1, 2, 3"),
        (["--data", "gap", "--ood-classes", "1"], "the target is a number and has no classes"),
        (
            ["--ood-classes", *"123456789"],
            "9 of 10 classes are held out, expected at most 8: at least two must stay",
        ),
        (["--ood-classes"], "--ood-classes: expected at least one argument"),
        (["--sample", "3"], "unrecognized arguments: --sample 3"),
        (["--samples", "1000000000"], "SWAG would keep as many networks"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, message, tmp_path, capsys):
    output = tmp_path / "results"
    assert main(["compare", "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("funcbayes")
    assert not output.exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_an_output_that_is_a_file_stays_one(below, tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("mine")
    assert main(["compare", "--output", str(path / below)]) == 2
    assert "is a file, expected a folder: name another one" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_an_output_that_cannot_be_written_to(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["compare", "--output", str(tmp_path)]) == 2
    assert "cannot be written to: name another folder" in capsys.readouterr().err


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    # As on a first import, whatever other tests have imported.
    for module in ("compare", "table"):
        monkeypatch.delitem(sys.modules, f"funcbayes.cli.{module}", raising=False)
        monkeypatch.delattr(f"funcbayes.cli.{module}", raising=False)
    assert main(["compare"]) == 2
    assert (
        "error: rich is not installed: run `pip install 'funcbayes[report]'`"
        in capsys.readouterr().err
    )


def test_help_teaches(capsys):
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("examples:", "results.json", "--ood-classes", "AUROC", "default: 30", "gap"):
        assert word in text
    assert main(["bench", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"]])
def test_help_fits_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_bench_gets_its_arguments(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("funcbayes.cli.bench.run", lambda **arguments: seen.update(arguments) or 1)
    assert main(["bench", "--quick", "--output", str(tmp_path)]) == 1
    assert seen == {"quick": True, "device": "auto", "output": tmp_path}


def test_an_unknown_command_is_one_sentence(capsys):
    assert main(["compete"]) == 2
    assert "invalid choice: 'compete'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("funcbayes 0")


def test_help_does_not_wait_for_the_report_extra():
    code = (
        "import sys\nfrom funcbayes.cli import main\n"
        "assert main(['compare', '--help']) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('matplotlib', 'sklearn', 'torchmetrics')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
