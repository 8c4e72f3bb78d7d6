"""Names in a config that stand for functions: one of ours, or the user's ``module:function``."""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jkmeans.errors import UserError

# In place of the source of what was written in a session.
_SESSION = os.urandom(16)


def resolve(
    name: str, known: Mapping[str, Callable], field: str, names: Iterable[str] = ()
) -> Callable:
    """The function that ``name`` stands for.

    Args:
      name: a key of ``known``, or ``module:function`` of an importable module.
      known: the functions of this project by name.
      field: the config field, for the error.
      names: what the field accepts, for the error, where that is more than the keys of ``known``.

    Raises:
      UserError: no such name, module or function. What else the module raises while it is
        imported propagates, with a note that says why it was imported.
    """
    accepted = f"accepted: {', '.join(map(repr, names or known))} or 'module:function'"
    if name in known:
        return known[name]
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name or module_name.startswith("."):
        raise UserError(f"{field} is {name!r}; {accepted}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"{field} is {name!r}, but importing {module_name} failed ({error}); {accepted}"
        ) from error
    except Exception as error:
        # The user's own error: its traceback says more than a sentence of ours could.
        error.add_note(f"while importing {module_name}, because {field} is {name!r}")
        raise
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"{field} is {name!r}, but {module_name} has no function {function_name!r}; {accepted}"
        )
    return function


def is_users(name: str) -> bool:
    """Whether a name is the user's ``module:function``, and not one of ours."""
    return ":" in name


def source_digest(name: str) -> str:
    """Tells sources of the module of a ``module:function`` apart.

    Where there is no file, as in a session, it is another one in each process.
    """
    path = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    source = Path(path).read_bytes() if path else _SESSION
    return hashlib.blake2b(source, digest_size=16).hexdigest()
