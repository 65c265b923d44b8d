"""The command line's arguments, and what its errors look like."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never

from funcbayes import __version__
from funcbayes.cli import config
from funcbayes.cli.config import METHOD_NAMES, OPTIONS, Configuration
from funcbayes.cli.errors import UsageError

DATA_NAMES = ("digits", "breast-cancer", "diabetes", "two-moons", "gap")

_DESCRIPTION = """\
Trains a small network on images or a table, turns it into a Bayesian one by
each method, and compares what they predict on data that nothing was trained or
chosen on.

The plain network is always there as the baseline. SWAG, Laplace, VI and dropout
start from it; the ensemble trains five networks of its own. Classification: a
good method is right, calibrated (low NLL, Brier and ECE), and unsure about
classes that were held out of the training (AUROC near 1, FPR95 near 0).
Regression: it has a small error, and intervals that hold as much as they say
(low NLL and CRPS, coverage near 90 %).
"""

_EPILOG = """\
data sets:
  digits         handwritten digits, 8 and 9 held out    images, classification
  breast-cancer  tumours, by their cells' nuclei         table, classification
  diabetes       progress of a disease, by ten figures   table, regression
  two-moons      two half circles, with a map            plane, classification
  gap            a noisy curve with a gap in it          line, regression
  FILE.csv       a table with a header; its types are guessed, and said
  FILE.npz       arrays x (rows of numbers, or images) and y

examples:
  funcbayes compare
      all methods on the digits data; about a minute on two cores
  funcbayes compare --data gap --seeds 5
      mean and standard deviation over five splits and trainings
  funcbayes compare --data houses.csv --target price --method swag
      one method on a table of your own
  funcbayes compare --ood-classes 0 --samples 100 --output results/zero
      zeros held out, 100 posterior samples a prediction
  funcbayes compare --config results/zero/config.toml
      the same figures again

what is written to the output folder:
  results.json   every figure, choices, versions and machine; after each method
  report.html    table, pictures and how to read them, in one file
  *.png          the pictures: calibration, held-out classes, intervals, maps
  config.toml    every option, for --config
Ctrl-C leaves the same of the methods that were finished.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        """One sentence, without the usage in front of it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0, 2 for bad arguments, bad data or a missing package, 130 after
        Ctrl-C, and 1 where `funcbayes bench` found a disagreement.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(with_bench=argv[:1] == ["bench"])
    try:
        arguments = vars(parser.parse_args(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    command = arguments.pop("command")
    if command is None:
        parser.print_help()
        return 0
    try:
        # Not at the top: `--help` and a typo should not wait for matplotlib and its friends.
        if command == "bench":
            from funcbayes.cli import bench

            return bench.run(**arguments)
        output, file = arguments.pop("output"), arguments.pop("config")
        given = {name: arguments[name.replace("-", "_")] for name in OPTIONS}
        configuration = config.resolve(given, file)
        from funcbayes.cli import compare

        return compare.run(configuration, output=output)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        message = str(error)
    except UsageError as error:
        message = str(error)
    print(f"funcbayes {command}: error: {message}", file=sys.stderr)
    return 2


def _parser(*, with_bench: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="funcbayes", description="Bayesian deep learning for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"funcbayes {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_compare(commands)
    bench = commands.add_parser(
        "bench", help="time this machine beside plain Python loops", allow_abbrev=False
    )
    if with_bench:
        from funcbayes.cli.bench import add_arguments

        add_arguments(bench)
    return parser


def _add_compare(commands: Any) -> None:
    defaults = Configuration()
    compare = commands.add_parser(
        "compare",
        help="train a network and compare all methods on it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = compare.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="NAME|FILE",
        help=f"a data set below, or a .csv or .npz file (default: {defaults.data})",
    )
    data.add_argument(
        "--target",
        metavar="COLUMN",
        help="the column of a .csv file to predict (default: one of a usual name)",
    )
    data.add_argument(
        "--task",
        type=_checked("task"),
        metavar="KIND",
        help="classification or regression, for a file (default: what its target looks like)",
    )
    data.add_argument(
        "--ood-classes",
        nargs="+",
        metavar="LABEL",
        help="classes held out of the training as out-of-distribution (default: 8 9 for digits, "
        "else none)",
    )

    what = compare.add_argument_group("methods")
    what.add_argument(
        "--method",
        type=_checked("method", alone=True),
        action="append",
        metavar="NAME",
        help=f"a method to compare with the plain network: {', '.join(METHOD_NAMES)}; repeat it "
        "for several (default: all)",
    )
    what.add_argument(
        "--samples",
        type=_checked("samples"),
        metavar="S",
        help="posterior samples a prediction; more take longer and are less noisy; a linearised "
        f"network draws ten times as many outputs (default: {defaults.samples})",
    )
    what.add_argument(
        "--epochs",
        type=_checked("epochs"),
        metavar="E",
        help="passes over the training data of the plain network and of the ensemble's members; "
        "SWAG and VI go on in proportion (default: 60 for digits, else what makes some 1500 "
        "steps)",
    )

    how = compare.add_argument_group("run")
    how.add_argument(
        "--seed",
        type=_checked("seed"),
        metavar="N",
        help="splits, weights and draws follow from it: the same seed gives the same figures "
        f"(default: {defaults.seed})",
    )
    how.add_argument(
        "--seeds",
        type=_checked("seeds"),
        metavar="N",
        help="how many seeds, from --seed on; figures are then means and standard deviations "
        f"(default: {defaults.seeds})",
    )
    how.add_argument(
        "--device",
        type=_checked("device"),
        metavar="NAME",
        help="cpu, cuda, cuda:N, or auto for CUDA where there is a device "
        f"(default: {defaults.device})",
    )
    how.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a TOML file of these options by their names, such as samples = 30; the command "
        "line wins over it",
    )
    how.add_argument(
        "--output",
        type=Path,
        default=Path("funcbayes-results"),
        metavar="FOLDER",
        help="where the files go; made if it is not there (default: %(default)s)",
    )


def _checked(name: str, *, alone: bool = False) -> Callable[[str], Any]:
    """A type for argparse, whose errors are those of the configuration."""

    def parse(text: str) -> Any:
        try:
            value = config.check(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value[0] if alone else value

    return parse
