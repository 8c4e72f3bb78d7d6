"""What launchers make of ``--config``: another method's config, help, and sentences about errors.

The flag itself is that of ml_collections: ``--config FILE``, and ``--config.field=value`` for any
field of what the file's ``get_config()`` returns.
"""

import importlib
import os
import runpy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

_OF_METHOD = os.path.join(os.path.dirname(__file__), "of_method.py")
_KINDS = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple: (1, 2)"}


def of_method(argv: Sequence[str]) -> list[str]:
    """The command line with the config of the method that ``--config.objective.name`` asks for.

    A method has fields and settings of its own, which must be there before the command line changes
    any: ``--config FILE`` becomes ``--config experiments/of_method.py:METHOD:FILE``.
    """
    argv = list(argv)
    named, file = _last(argv, "config.objective.name"), _last(argv, "config")
    if named is None or file is None:
        return argv
    from jkmeans.methods import METHODS

    (_, name), (index, path) = named, file
    if name in METHODS and os.path.isfile(path.split(":", 1)[0]):  # Else it is answered as it is.
        argv[index] = argv[index][: -len(path)] + f"{_OF_METHOD}:{name}:{path}"
    return argv


def last_of_each(argv: Sequence[str]) -> list[str]:
    """The command line without values of fields that a later one replaces.

    The flags of ml_collections would join two tuples to one; of anything else the last value holds.
    """
    kept: list[str] = []
    later: set[str] = set()
    for index in reversed(range(len(argv))):
        name, equals, _ = argv[index].partition("=")
        field = name.lstrip("-")
        if name.startswith("-") and field.startswith("config."):
            apart = not equals and bool(kept) and not kept[-1].startswith("-")
            if field in later and (equals or apart):
                if apart:
                    kept.pop()  # Its value.
                continue
            later.add(field)
        kept.append(argv[index])
    return kept[::-1]


def sentence(argv: Sequence[str], error: Exception, fields: str) -> str:
    """What was wrong with a command line, which value, and what is accepted.

    Args:
      argv: with a ``--config`` or without.
      error: what parsing it raised.
      fields: as of `experiments.launcher.launch`.
    """
    file = _last(argv, "config")
    illegal = isinstance(error, flags.IllegalFlagValueError)
    if file is None or (isinstance(error, flags.Error) and not illegal):
        return one_line(error)  # Of another flag, and the file is not run again.
    try:
        config = load(file[1])
    except Exception as of_file:
        return _not_loaded(file[1], of_file)
    for name, value in _overrides(argv):
        node, path = config, "config"
        for field in name.split(".")[1:]:
            if not hasattr(node, "keys"):
                return f"{path} is a value, without a field {field!r}; accepted: --{path}=…"
            if field not in node:
                return f"{path} has no field {field!r}; accepted: {', '.join(sorted(node))}"
            node, path = node[field], f"{path}.{field}"
        if illegal and f"--{name}={value}:" in str(error):
            known = _fields_of(fields, config).get(name.split(".", 1)[1])
            kind = known.accepted if known else _KINDS.get(type(node))
            return f"{name} is {value!r}; accepted: {kind}" if kind else one_line(error)
    return one_line(error)


def help_of_fields(argv: Sequence[str], fields: str, config: Any) -> str:
    """A line for each field of the config: its value, and what is known about it.

    Args:
      argv: with a ``--config`` or without.
      fields: as of `experiments.launcher.launch`.
      config: what the command line gives.
    """
    file = _last(argv, "config")
    if file is None:
        return "With --config FILE --help: the fields of that config, and what they accept."
    try:
        config.keys()  # A file that could not be loaded says so when it is first used.
    except Exception as error:
        return sentence(argv, error, fields)
    known = _fields_of(fields, config)
    lines = [f"fields of {_as_given(file[1])} (--config.NAME=VALUE changes one):", ""]
    for name, value in _leaves(config):
        about = known.get(name)
        lines.append(f"  {name} = {value!r}")
        if about:
            lines.append(f"      {about.meaning}; {about.accepted}")
    return "\n".join(lines)


def load(file: str) -> Any:
    """The config of ``FILE`` or ``FILE:ARGUMENT``; raises whatever the file raises."""
    path, *arguments = file.split(":", 1)
    if os.path.isdir(path):
        raise IsADirectoryError(None, "it is a folder", path)
    return runpy.run_path(path)["get_config"](*arguments)


def one_line(error: Exception) -> str:
    """The words of an error without line breaks, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _as_given(file: str) -> str:
    """The file as it was typed, before `of_method`."""
    of_method = f"{_OF_METHOD}:"
    return file[len(of_method) :].split(":", 1)[1] if file.startswith(of_method) else file


def _not_loaded(file: str, error: Exception) -> str:
    file = _as_given(file)
    about = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, OSError) and error.filename == file.split(":", 1)[0]:
        about = error.strerror
    return (
        f"--config {file} cannot be loaded ({about}); accepted: a Python file with a function "
        "get_config()"
    )


def _fields_of(fields: str, config: Any) -> Mapping[str, Any]:
    if not fields:
        return {}
    module, _, name = fields.partition(":")
    found: Any = getattr(importlib.import_module(module), name)
    try:
        return found if isinstance(found, Mapping) else found(config)
    except Exception:  # The config is so wrong that nothing is known about it.
        return {}


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if hasattr(value, "keys"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _overrides(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names ``config.….…`` in the command line, without indices, and what is said of each."""
    for argument, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        field = name.lstrip("-").removeprefix("no")
        if name.startswith("-") and field.startswith("config.") and "[" not in field:
            yield field, value if equals else after


def _last(argv: Sequence[str], flag: str) -> tuple[int, str] | None:
    """Where the last value of a flag stands in the command line, and the value."""
    found = None
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in (f"-{flag}", f"--{flag}"):
            continue
        if equals:
            found = index, value
        elif index + 1 < len(argv):
            found = index + 1, argv[index + 1]
    return found
