"""What processes say to each other besides collectives: through JAX's coordination service.

Every function here is called by all processes in the same order; with one process it does nothing
and costs nothing. Whatever decides where the program goes next (an interruption, free memory, a
file that one of them cannot read) is agreed on here: a process that went another way would leave
the others waiting in a collective.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jkmeans.errors import CollapseError, LostError, UserError

T = TypeVar("T")

_TOKEN_FILE = ".processes"
_SHARED_SECONDS = 10.0
"""How long a file may take to show on another host: NFS remembers folders for some seconds."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02

# What XLA, gloo, gRPC and the coordination service say where another process is gone.
_LOSS = (
    "Gloo",
    "gloo",
    "NCCL",
    "oordination service",
    "CoordinationService",
    "heartbeat",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "Connection reset",
    "Connection closed",
    "Socket closed",
    "Barrier",
)

_turn = itertools.count()


def _state() -> Any:
    """JAX's record of the processes that were joined; None while JAX is not even imported."""
    if "jax" not in sys.modules:
        return None
    # The one private name: JAX has no public way to its key-value store.
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    """The number of processes that compute together."""
    state = _state()
    return state.num_processes if state is not None and state.client is not None else 1


def number() -> int:
    """The number of this process, from 0."""
    return _state().process_id if count() > 1 else 0


def is_first() -> bool:
    """Whether this is process 0, which writes files and talks to the user."""
    return number() == 0


def gather(value: Any) -> list[Any]:
    """A value of each process, in their order, on every process.

    Args:
      value: small, anything that JSON can hold.

    Raises:
      LostError: a process is gone.
    """
    n = count()
    if n == 1:
        return [value]
    client, me, turn = _state().client, number(), next(_turn)
    folder = f"jkmeans/{turn}/"
    try:
        client.key_value_set(f"{folder}{me}", json.dumps(value))
        if turn > 1:
            # Who has finished the turn before has read the one before that.
            client.key_value_delete(f"jkmeans/{turn - 2}/{me}")
        pause = _FIRST_PAUSE
        # In short steps, between which signals are heard. That a process is gone is JAX's to
        # notice; it ends this one too.
        while len(found := client.key_value_dir_get(folder)) < n:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    except Exception as error:
        if is_loss(error):
            raise LostError(loss_sentence(error)) from error
        raise
    values = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in found}
    return [values[i] for i in range(n)]


def take_leave(seconds: float) -> None:
    """Says that this process ends; process 0 waits for the others to say so, but not for long.

    The service that they talk through ends with process 0, and they may still have to hear from it
    why all end.
    """
    client, deadline = _state().client, time.monotonic() + seconds
    with contextlib.suppress(Exception):
        client.key_value_set(f"jkmeans/left/{number()}", "")
        while (
            is_first()
            and len(client.key_value_dir_get("jkmeans/left/")) < count()
            and time.monotonic() < deadline
        ):
            time.sleep(_LONGEST_PAUSE)


def share(value: T) -> T:
    """The value of process 0, on every process; the others' is not looked at."""
    return gather(value if is_first() else None)[0]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(gather(bool(flag)))


def part_of(n: int) -> tuple[int, int]:
    """First and one-past-last of the n items that are this process's to look at."""
    return n * number() // count(), n * (number() + 1) // count()


def together(call: Callable[[], T]) -> T:
    """Calls on every process; what one of them refuses, all refuse.

    Args:
      call: with no collective inside.

    Raises:
      UserError, CollapseError: of any process; the others say which.
    """
    if count() == 1:
        return call()
    result, error = None, None
    try:
        result = call()
    except (UserError, CollapseError) as found:
        error = found
    failures = gather(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    for i, failure in enumerate(failures):
        if failure is not None:
            kind = CollapseError if failure[0] == "CollapseError" else UserError
            raise kind(f"process {i}: {failure[1]}")
    return result  # type: ignore[return-value]


def on_first(call: Callable[[], Any]) -> Any:
    """Calls on process 0 only, while the others wait; its result (JSON) on every process.

    Raises:
      UserError, CollapseError: of process 0.
    """
    return share(together(lambda: call() if is_first() else None))


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Refuses to go on where processes were given different things.

    Args:
      what: the values are of, for the error.
      values: by name, anything that JSON can hold.

    Raises:
      UserError: names the first difference, and whose it is.
    """
    texts = gather({name: json.dumps(value, default=str) for name, value in values.items()})
    if sentence := difference(texts, what):
        raise UserError(sentence)


def difference(given: list[Mapping[str, Any]], what: str, names: list[str] | None = None) -> str:
    """The sentence about the first difference between what processes were given; "" for none.

    Args:
      given: by process, values by name.
      what: they are of.
      names: of the processes, for the sentence; numbers if None.
    """
    names = names or [str(i) for i in range(len(given))]
    for i, other in enumerate(given):
        for name in sorted({*given[0], *other}):
            here, there = given[0].get(name, "missing"), other.get(name, "missing")
            if here != there:
                return (
                    f"the processes differ in {what}: {name} is {here} in process {names[0]} and "
                    f"{there} in process {names[i]}; accepted: the same in all of them"
                )
    return ""


def same_folder(folder: Path, what: str = "--workdir") -> None:
    """Makes sure that a folder is one and the same on all hosts.

    Process 0 leaves a file there that the others look for.

    Args:
      folder: made if missing.
      what: it is called, in the error.

    Raises:
      UserError: it is not shared, or cannot be written.
    """
    if count() == 1:
        return
    path = folder / _TOKEN_FILE

    def leave_token() -> str:
        token = secrets.token_hex(16)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
        except OSError as error:
            raise UserError(f"cannot write to {what} {folder}: {error.strerror}") from error
        return token

    token = on_first(leave_token)
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (found := _read(path) == token) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = gather([found, socket.gethostname()])
    if is_first():
        path.unlink(missing_ok=True)
    blind = [f"{i} (host {host})" for i, (sees, host) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"{what} {folder} is not shared: what process 0 (host {seen[0][1]}) writes there is "
            f"not seen by process {', '.join(blind)}; accepted: a folder on a file system that all "
            "hosts mount"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


_hosts: list[str] = []


def n_on_this_host() -> int:
    """How many of the processes run on this machine."""
    if not _hosts or len(_hosts) != count():
        _hosts[:] = gather(socket.gethostname())
    return _hosts.count(_hosts[number()])


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer."""
    if isinstance(error, LostError):
        return True
    if count() == 1 or isinstance(error, (UserError, CollapseError, OSError)):
        return False
    text = str(error)
    return any(sign in text for sign in _LOSS)


def loss_sentence(error: BaseException) -> str:
    """What to say of a loss, on one line."""
    detail = " ".join(str(error).split())[:160]
    return (
        f"process {number()} of {count()} (pid {os.getpid()}) lost another one ({detail}); what "
        "was saved is whole: start all processes again"
    )
