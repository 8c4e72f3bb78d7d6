"""Fields of configs: what a value may be, and the sentence that says so."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Field(NamedTuple):
    """One field of a config.

    Attributes:
      convert: the value as its proper type; raises TypeError or ValueError for anything else.
      accepted: what is accepted, in words, for the error.
      meaning: one line for the reader.
    """

    convert: Callable[[Any], Any]
    accepted: str
    meaning: str


class TooLargeError(ValueError):
    """A value above a bound that ``accepted`` need not name; the message is what is accepted."""


def accepted_of(field: Field, error: Exception) -> str:
    """What to say is accepted, where the conversion of a value raised this error."""
    return str(error) if isinstance(error, TooLargeError) else field.accepted


def integer(least: int, meaning: str, most: int = 2**31 - 1) -> Field:
    """A field that holds an integer from ``least`` to ``most``."""

    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if value > most:
            raise TooLargeError(f"an integer from {least} to {most}")
        if value < least:
            raise ValueError
        return value

    # That there is an upper bound is news only to those who meet it.
    bound = f"of at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
    return Field(convert, f"an integer {bound}", meaning)


def number(meaning: str, *, positive: bool = False) -> Field:
    """A field that holds a number of at least 0, or above 0."""

    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError
        return float(value)

    return Field(convert, f"a number {'above' if positive else 'of at least'} 0", meaning)


def boolean(meaning: str) -> Field:
    """A field that holds True or False."""

    def convert(value):
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Field(convert, "True or False", meaning)


def choice(choices, meaning: str, *, or_function: bool = False) -> Field:
    """A field that holds one of some words, or the user's ``module:function``."""

    def convert(value):
        if not isinstance(value, str):
            raise TypeError
        if value not in choices and not (or_function and ":" in value):
            raise ValueError
        return value

    accepted = ", ".join(map(repr, choices)) + (" or 'module:function'" if or_function else "")
    return Field(convert, accepted, meaning)


def text(meaning: str) -> Field:
    """A field that holds text."""

    def convert(value):
        if not isinstance(value, str):
            raise TypeError
        return value

    return Field(convert, "text", meaning)


def integers(meaning: str) -> Field:
    """A field that holds a tuple of integers of at least 1."""

    def convert(value):
        if not isinstance(value, list | tuple):
            raise TypeError
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise TypeError
        if any(v < 1 for v in value):
            raise ValueError
        return tuple(value)

    return Field(convert, "a tuple of integers of at least 1", meaning)


def words(choices, meaning: str) -> Field:
    """A field that holds a tuple of some words, each once and at least one."""

    def convert(value):
        if not isinstance(value, list | tuple) or any(not isinstance(v, str) for v in value):
            raise TypeError
        if not value or len(set(value)) < len(value) or any(v not in choices for v in value):
            raise ValueError
        return tuple(value)

    return Field(convert, f"a tuple of some of {', '.join(map(repr, choices))}", meaning)


def texts(meaning: str, each: str = "texts") -> Field:
    """A field that holds a tuple of any texts; ``each`` says what they are."""

    def convert(value):
        if not isinstance(value, list | tuple) or any(not isinstance(v, str) for v in value):
            raise TypeError
        return tuple(value)

    return Field(convert, f"a tuple of {each}", meaning)


def numbers(meaning: str) -> Field:
    """A field that holds a tuple of finite numbers."""

    def convert(value):
        if not isinstance(value, list | tuple):
            raise TypeError
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            raise TypeError
        if not all(map(math.isfinite, value)):
            raise ValueError
        return tuple(map(float, value))

    return Field(convert, "a tuple of finite numbers", meaning)
