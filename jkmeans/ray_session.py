"""A connection to Ray: found quickly or refused in a sentence, and gone at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from jkmeans.errors import UserError
from jkmeans.fields import Field, integer, number, text
from jkmeans.interruption import Interrupted

# To find a cluster: both together stay below ten seconds.
_KNOCK_SECONDS = 2.0
_JOIN_SECONDS = 7.0

_ONE_CORE = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
"""Each worker has one core; fake devices of tests are for the process that started them."""

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Nothing is sent to anybody.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # A warning of what Ray will do one day.
    # What it says of every death; the run says so itself, on one line.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "will be retried|died or was killed while executing",
}


def import_ray() -> Any:
    """Ray, or the sentence that says how to get it.

    Raises:
      UserError: it is not installed.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(
            'Ray is not installed, which this needs; accepted: pip install "jkmeans[ray]"'
        ) from error
    return ray


def options_of_worker(n_gpus: float) -> dict[str, Any]:
    """What Ray is told of an actor with one core and so many GPUs, or a part of one."""
    platform = {"JAX_PLATFORMS": "" if n_gpus else "cpu"}
    if 0 < n_gpus < 1:
        platform["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # It shares the GPU.
    environment = {"env_vars": _ONE_CORE | platform}
    return {"num_cpus": 1, "num_gpus": n_gpus, "runtime_env": environment}


def options_of_keeper(ray: Any) -> dict[str, Any]:
    """What Ray is told of the actor that keeps the state in files: it stays on this machine."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    environment = {"env_vars": _ONE_CORE | {"JAX_PLATFORMS": "cpu"}}
    return {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": environment}


@contextlib.contextmanager
def session(address: str, n_cpus: int, option: str = "config.ray.address") -> Iterator[Any]:
    """A connection to Ray, whose processes are gone at the end if they are ours.

    Args:
      address: ``local`` for a cluster that begins and ends with the session; ``auto`` or host:port
        for one that is there.
      n_cpus: of a local cluster.
      option: what the user calls the address.

    Raises:
      UserError: Ray is not installed, or there is no cluster.
      Interrupted: SIGTERM came while Ray began.
    """
    ray = import_ray()
    if ray.is_initialized():  # The caller's own.
        yield ray
        return
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    if address == "local":
        options["num_cpus"] = n_cpus
    else:
        find_cluster(address, option)
        del options["include_dashboard"]
    failure = None
    with _sigterms_heard(ray) as heard, warnings.catch_warnings():
        # JAX warns of forks; the children of Ray's start other programs at once.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Where a machine is too busy, a plain Exception.
            failure = error
    if heard:  # And perhaps by Ray's processes, which then fail.
        ray.shutdown()
        raise Interrupted(signal.SIGTERM) from failure
    if failure is not None:
        reason = str(failure).split("\n")[0]
        if address == "local":
            raise UserError(
                f"Ray did not begin on this machine ({reason}); accepted: the same command when it "
                f"is less busy, or {option} of a cluster that runs"
            ) from failure
        raise _no_cluster(address, option, reason) from failure
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _sigterms_heard(ray: Any) -> Iterator[list[int]]:
    """Hears SIGTERM while Ray begins; the list gets what came, and whoever listened hears it too.

    Ray's own handlers would end the process with status 15 or 1, by an exception wherever the main
    thread stands, and that gets lost where this is in a callback.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard  # Ray has no handlers there.
        return
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if callable(before):
            before(number, frame)

    with _no_handlers_of(ray):
        if before not in (signal.SIG_IGN, None):  # None is a handler outside Python.
            signal.signal(signal.SIGTERM, hear)
        try:
            yield heard
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _no_handlers_of(ray: Any) -> Iterator[None]:
    """Keeps Ray from installing handlers, all of which it does through one function."""
    utilities, name = getattr(getattr(ray, "_private", None), "utils", None), "set_sigterm_handler"
    theirs = getattr(utilities, name, None)
    if theirs is None:  # Another Ray than those we know.
        yield
        return
    setattr(utilities, name, lambda handler: None)
    try:
        yield
    finally:
        setattr(utilities, name, theirs)


def gpus_of_worker(value: Any) -> float:
    """GPUs of a worker as Ray can deal them: see `ACCEPTED_GPUS`.

    Raises:
      TypeError, ValueError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    whole = math.isfinite(value) and value == int(value)
    if not 1e-4 <= value <= 1 and not (whole and value >= 0):
        raise ValueError
    return round(float(value), 4)  # All that Ray can tell apart.


ACCEPTED_GPUS = "0, a number from 0.0001 to 1, or a whole number"
"""What can be dealt to a worker."""


def ray_fields(sent: str, ahead: str) -> dict[str, Field]:
    """The group ``ray`` of a config: how `jkmeans.asynchronous` runs what is to be computed.

    Args:
      sent: what workers send to the server, in the plural.
      ahead: what a worker computes while that is under way, in the plural.
    """
    return {
        "ray.address": text(
            "'local' for a cluster on this machine that begins and ends with the run; 'auto', or "
            "host:port, for one that is there and has this machine in it"
        ),
        "ray.checkpoint_exchanges": integer(
            2, f"{sent} that the death of the server may cost, at most; they are computed anew"
        ),
        "ray.max_restarts": integer(-1, "times that a process may come back; -1 for any number"),
        "ray.ahead": integer(
            0,
            f"how many {ahead} a worker computes while an exchange is under way, at most; 0: none",
        ),
        "ray.evaluate_seconds": number(
            "between two evaluations of the shared version", positive=True
        ),
        "ray.patience_seconds": number("how long the end of a run waits for a worker that hangs"),
        "ray.gpus_per_worker": Field(
            gpus_of_worker,
            ACCEPTED_GPUS,
            "GPUs of a worker; below 1 they are shared, 0 for the CPU",
        ),
    }


def room_for_workers(ray: Any, n_gpus: float) -> int:
    """Workers of one core, and so many GPUs, that the cluster, as it is now, has room for."""
    resources = ray.cluster_resources()
    room = resources.get("CPU", 0)
    if n_gpus:
        room = min(room, resources.get("GPU", 0) / n_gpus)
    return int(room)


def refuse_no_room(ray: Any, n_gpus: float, accepted: str) -> None:
    """Refuses a cluster that has no room for a single worker.

    Args:
      ray: in a session.
      n_gpus: of a worker.
      accepted: what the user can change.

    Raises:
      UserError: it has none.
    """
    resources = ray.cluster_resources()
    if not room_for_workers(ray, n_gpus):
        raise UserError(
            f"the Ray cluster has {resources.get('CPU', 0):.0f} CPUs and "
            f"{resources.get('GPU', 0):g} GPUs, and no worker of one CPU and {n_gpus:g} GPUs has "
            f"room in it; accepted: {accepted}"
        )


def find_cluster(address: str, option: str) -> None:
    """Asks whether a cluster answers, in a few seconds: ``ray.init`` itself would wait for long."""
    if address == "auto":
        # One that was killed leaves its address behind, and so may RAY_ADDRESS.
        reason = "none runs on this machine, or what RAY_ADDRESS names does not answer"
    else:
        _knock(address, option)
        reason = (
            "what listens there is no cluster that has this machine in it, or wants a token and "
            "RAY_AUTH_MODE=token is not set"
        )
    # A process of its own tries to join, because it can be given up.
    program = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        subprocess.run(
            [sys.executable, "-c", program, address],
            check=True,
            capture_output=True,
            timeout=_JOIN_SECONDS,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise _no_cluster(address, option, reason) from error


def _knock(address: str, option: str) -> None:
    """Asks whether anything listens at host:port."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or "/" in address or not port.isdecimal():
        raise UserError(f"{option} is {address!r}; accepted: 'local', 'auto' or host:port")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, option, str(error)) from error


def _no_cluster(address: str, option: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster at {option} {address!r} ({reason}); accepted: 'local', or the "
        "address of a cluster that runs ('ray start --head' begins one)"
    )
