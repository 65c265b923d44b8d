"""The command line's arguments, and what its errors look like."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Never

from funcbayes import __version__
from funcbayes.cli.errors import UsageError

DATA_NAMES = ("digits",)
METHOD_NAMES = ("swag", "laplace", "vi", "dropout", "ensemble")

_DESCRIPTION = """\
Trains a small convolutional network on images, turns it into a Bayesian one by each method,
and compares what they predict.

The plain network is always there as the baseline. SWAG, Laplace, VI and dropout start from
it; the ensemble trains five networks of its own. Some classes are held out of the training:
a good method is unsure about them (AUROC near 1, FPR95 near 0) and right and calibrated on
the others (low NLL, Brier and ECE).
"""

_EPILOG = """\
examples:
  funcbayes compare
      all methods on the digits data; about a minute on two cores
  funcbayes compare --method swag --method laplace --seed 1
      two methods, other weights and splits
  funcbayes compare --ood-classes 0 --samples 100 --output results/zero
      zeros held out, 100 posterior samples a prediction

what is written to the output folder:
  results.json      configuration, versions and every figure; after each method
  reliability.png   accuracy against confidence
  ood.png           entropy of the test images against that of the held-out classes
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
        The exit code: 0, 2 for bad arguments or a missing package, 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        # Not at the top: `--help` and a typo should not wait for matplotlib and its friends.
        from funcbayes.cli import compare

        return compare.run(
            compare.Configuration(
                data=arguments.data,
                # In the order of the table, each once.
                methods=tuple(m for m in METHOD_NAMES if m in (arguments.method or METHOD_NAMES)),
                samples=arguments.samples,
                seed=arguments.seed,
                epochs=arguments.epochs,
                ood_classes=tuple(sorted(set(arguments.ood_classes))),
            ),
            output=arguments.output,
        )
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        message = str(error)
    except UsageError as error:
        message = str(error)
    print(f"funcbayes compare: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="funcbayes", description="Bayesian deep learning for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"funcbayes {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="train a network and compare all methods on it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument(
        "--data",
        type=_one_of(DATA_NAMES, "data set"),
        default="digits",
        metavar="NAME",
        help=f"what to train on: {', '.join(DATA_NAMES)} (default: %(default)s, scikit-learn's "
        "1797 handwritten digits of 8x8 pixels)",
    )
    compare.add_argument(
        "--method",
        type=_one_of(METHOD_NAMES, "method"),
        action="append",
        metavar="NAME",
        help=f"a method to compare with the plain network: {', '.join(METHOD_NAMES)}; repeat it "
        "for several (default: all)",
    )
    compare.add_argument(
        "--samples",
        type=_integer(1),
        default=30,
        metavar="S",
        help="posterior samples a prediction; more take longer and are less noisy "
        "(default: %(default)s)",
    )
    compare.add_argument(
        "--epochs",
        type=_integer(1),
        default=60,
        metavar="E",
        help="passes over the training images of the plain network and of the ensemble's "
        "members (default: %(default)s)",
    )
    compare.add_argument(
        "--seed",
        type=_integer(0),
        default=0,
        metavar="N",
        help="splits, weights and draws follow from it: the same seed gives the same figures "
        "(default: %(default)s)",
    )
    compare.add_argument(
        "--ood-classes",
        type=_integer(0),
        nargs="+",
        default=[8, 9],
        metavar="C",
        help="classes held out of the training as out-of-distribution (default: 8 9)",
    )
    compare.add_argument(
        "--output",
        type=Path,
        default=Path("funcbayes-results"),
        metavar="FOLDER",
        help="where results.json and the pictures go; made if it is not there "
        "(default: %(default)s)",
    )
    return parser


def _one_of(names: Collection[str], kind: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        close = difflib.get_close_matches(text, names, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise argparse.ArgumentTypeError(
            f"there is no {kind} '{text}': {hint}choose from {', '.join(names)}"
        )

    return parse


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(
                f"it is '{text}', expected an integer of at least {least}"
            )
        return value

    return parse
