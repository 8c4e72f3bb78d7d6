"""Flags of benchmarks: wrong ones are answered by one sentence, and exit status 2."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they were written, and what a flag is where it is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one sentence; flags must be written out."""

    def __init__(self, name: str, description: str | None):
        """Help says the whole description, that of the module."""
        super().__init__(
            prog=name, description=description, allow_abbrev=False, formatter_class=_Help
        )

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that holds an integer of at least so much."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is given; accepted: an integer of at least {least}"
            )
        return value

    return convert


def positive(text: str) -> float:
    """The type of a flag that holds a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is given; accepted: a number above 0")
    return value


def not_negative(text: str) -> float:
    """The type of a flag that holds a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is given; accepted: a number of at least 0")
    return value


def new_file(text: str) -> Path:
    """The type of a flag that names a file to write: refused before anything is measured."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is given; accepted: a file in a folder that exists"
        )
    return path


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
