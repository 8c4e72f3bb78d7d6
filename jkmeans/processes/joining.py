"""How processes find each other: from flags, or from what SLURM, Open MPI or Kubernetes tell them.

Before JAX connects them there is a roll call over the coordinator's port: each process says its
number, host, versions and configuration to process 0, which answers all with one verdict. JAX alone
would end a process by an abort where another one does not come, without a word on which.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jkmeans.errors import LostError, UserError
from jkmeans.processes import agreement
from jkmeans.versions import PACKAGES, versions

COUNT, NUMBER, COORDINATOR = "JKMEANS_PROCESSES", "JKMEANS_PROCESS_ID", "JKMEANS_COORDINATOR"
"""Environment variables that say what the flags of the same names say."""
_KNOCK_SECONDS = 2.0
_LEAVE_SECONDS = 3.0
_MOST_BYTES = 2**22
_HELLO = "jkmeans roll call"

# Of the engines: where each writes the number of a process, and how many there are.
_ENGINES = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", COUNT),
}


class Place(NamedTuple):
    """The place of a process among the others.

    Attributes:
      number: from 0.
      count: of all of them.
      coordinator: ``host:port`` of process 0.
      origin: who says so: "flags", "environment", "SLURM", "Open MPI" or "Kubernetes".
      local_devices: numbers of the devices of its host that are its own; None for all.
    """

    number: int
    count: int
    coordinator: str
    origin: str
    local_devices: list[int] | None = None


def find_place(
    count: int = 0,
    number: int = -1,
    coordinator: str = "",
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process; None where it works alone.

    Args:
      count: processes in all; 0 for what the environment says, 1 for alone whatever it says.
      number: of this one, from 0; −1 for what the environment says.
      coordinator: host:port of process 0; "" for what the environment says.
      environment: variables `COUNT`, `NUMBER` and `COORDINATOR`, or those of an engine.

    Raises:
      UserError: what is said is not complete, or contradicts itself.
    """
    if count == 1:
        return None
    origin = "flags" if count else "environment"
    if not count and COUNT in environment:
        count = _integer(COUNT, environment[COUNT], 1)
    if number < 0 and NUMBER in environment:
        number = _integer(NUMBER, environment[NUMBER], 0)
    for engine, (engine_number, engine_count) in _ENGINES.items():
        if engine_number not in environment or (number >= 0 and count):
            continue
        if not count and engine_count in environment:
            count = _integer(engine_count, environment[engine_count], 1)
        if number < 0 and count > 1:
            number = _integer(engine_number, environment[engine_number], 0)
            origin = engine if origin == "environment" else origin
    for name in (COORDINATOR, "JAX_COORDINATOR_ADDRESS"):
        coordinator = coordinator or environment.get(name, "")
    devices = None
    if origin in _ENGINES or (not count and _in_kubernetes(environment)):
        found = _asked_of_jax(coordinator)
        coordinator, devices = coordinator or found[0] or "", found[3]
        if not count and found[1] is not None and found[2] is not None:
            count, number, origin = found[1], found[2], "Kubernetes"
    if not count or (count == 1 and number < 1):
        if not count and (number > 0 or (number == 0 and coordinator)):
            raise UserError(
                f"--process_id is {number}, but nothing says how many processes there are; "
                "accepted: --processes too"
            )
        return None
    if number < 0 or not coordinator:
        lacking = "--process_id" if number < 0 else "--coordinator"
        raise UserError(
            f"--processes is {count}, but {lacking} is not given and no engine that jkmeans knows "
            f"says it; accepted: --process_id and --coordinator with it, or, to start {count} on "
            f"this machine, python -m experiments.launch --processes {count} -- …"
        )
    if number >= count:
        raise UserError(
            f"--process_id is {number}, but --processes is {count}; accepted: 0 to {count - 1}"
        )
    _split_address(coordinator)
    return Place(number, count, coordinator, origin, devices)


def _integer(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}; accepted: an integer of at least {least}")
    return int(text)


def _in_kubernetes(environment: Mapping[str, str]) -> bool:
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def _asked_of_jax(coordinator: str) -> tuple:
    """Coordinator, count, number and devices, as JAX's own detection of engines finds them."""
    try:
        from jax._src.clusters import ClusterEnv

        return ClusterEnv.auto_detect_unset_distributed_params(
            coordinator or None, None, None, None, None, 60
        )
    except (ImportError, AttributeError, TypeError):  # A JAX whose insides have moved.
        return None, None, None, None
    except Exception as error:
        raise UserError(
            f"the engine did not say where process 0 is ({' '.join(str(error).split())[:200]}); "
            "accepted: --coordinator=host:port"
        ) from error


def _split_address(coordinator: str) -> tuple[str, int]:
    host, separator, port = coordinator.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator is {coordinator!r}; accepted: host:port of process 0, such as "
            "node0:29400"
        )
    return host.strip("[]"), int(port)


def prepare_environment(stuck_seconds: int) -> None:
    """What XLA must know before JAX's first use: how long a collective may take."""
    flag = "--xla_cpu_collective_timeout_seconds"
    given = os.environ.get("XLA_FLAGS", "")
    if flag not in given:
        os.environ["XLA_FLAGS"] = f"{given} {flag}={stuck_seconds}".strip()


def identity(values: Mapping[str, Any]) -> dict[str, str]:
    """What processes must have in common: versions, and ``values`` by name."""
    flat = {f"the version of {name}": v for name, v in versions(*PACKAGES).items()}
    return flat | {name: json.dumps(value, default=str) for name, value in values.items()}


def join(
    place: Place,
    values: Mapping[str, Any],
    *,
    join_seconds: float = 300.0,
    lost_seconds: int = 30,
) -> None:
    """Joins the other processes; JAX then sees the devices of all.

    Must come before anything is computed.

    Args:
      place: of this process.
      values: what must be the same in all processes, by name; JSON.
      join_seconds: how long processes wait for each other.
      lost_seconds: a process not heard of for so long counts as dead.

    Raises:
      UserError: the port is in use, a process is missing or cannot be reached (where the user gave
        the address), or processes differ.
      LostError: one is missing, and an engine will start all again.
    """
    started = time.monotonic()
    host, port = _split_address(place.coordinator)
    roll_call(place, values, join_seconds)

    import jax

    seconds = int(max(30, started + join_seconds - time.monotonic()))
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # It would hear SIGTERM in our place until a loop hears for itself, and nobody asks it.
        jax.config.update("jax_enable_preemption_service", False)
    with _quiet():
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.number,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=lost_seconds,
            shutdown_timeout_seconds=30,
            coordinator_bind_address=f"{_bound(host)}:{port}",
        )


def roll_call(place: Place, values: Mapping[str, Any], seconds: float) -> None:
    """Waits until all processes have said who they are, and that they were given the same.

    Args:
      place: of this process.
      values: what must be the same in all processes, by name; JSON.
      seconds: to wait at most.

    Raises:
      UserError, LostError: as `join`.
    """
    host, port = _split_address(place.coordinator)
    mine = {
        "hello": _HELLO,
        "number": place.number,
        "count": place.count,
        "host": socket.gethostname(),
        "identity": identity(values),
    }
    call = _call_roll if place.number == 0 else _answer_roll
    refusal, kind = call(place, host, port, mine, time.monotonic() + seconds)
    if refusal:
        lost = kind == "lost" and place.origin != "flags"
        raise (LostError if lost else UserError)(refusal)


@contextlib.contextmanager
def _quiet():
    """JAX warns of proxies in the environment, which the roll call has just got past."""
    import logging

    logger = logging.getLogger("jax._src.distributed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _bound(host: str) -> str:
    """The address that process 0 listens on: nobody else's where all run on this machine."""
    return "127.0.0.1" if host in ("localhost", "127.0.0.1") else "[::]"


def _call_roll(
    place: Place, host: str, port: int, mine: dict[str, Any], deadline: float
) -> tuple[str, str]:
    """Process 0: waits for the others, and tells all of them the verdict."""
    only_here = _bound(host) == "127.0.0.1"
    dual = not only_here and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("127.0.0.1" if only_here else "", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=min(place.count, 1024),
        )
    except OSError as error:
        sentence = (
            f"process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}): "
            "another program uses it; accepted: --coordinator with a free port, the same for all "
            "processes"
        )
        return sentence, "lost"
    here: dict[int, dict[str, Any]] = {0: mine}
    lines: dict[int, socket.socket] = {}
    waiting: list[socket.socket] = []
    refusal, kind = "", "user"
    with listener:
        while len(here) < place.count and not refusal:
            if (left := deadline - time.monotonic()) <= 0:
                refusal, kind = _missing(place, here), "lost"
                break
            listener.settimeout(min(left, 1.0))
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            other = _heard(line, _KNOCK_SECONDS)
            if other is None or other.get("hello") != _HELLO:
                line.close()  # Somebody who knocked at the wrong door.
                continue
            i = other["number"]
            waiting.append(line)
            if other["count"] != place.count:
                refusal = (
                    f"process {i} (host {other['host']}) was told that there are {other['count']} "
                    f"processes, and process 0 that there are {place.count}; accepted: the same "
                    "--processes"
                )
            elif i == 0 or (i in here and not _gone(lines[i])):
                refusal = (
                    f"two processes have the number {i}, on {here[i]['host']} and "
                    f"{other['host']}; accepted: --process_id from 0 to {place.count - 1}, each "
                    "once"
                )
            else:
                here[i], lines[i] = other, line
        if not refusal:
            everybody = [here[i] for i in range(place.count)]
            refusal = agreement.difference(
                [one["identity"] for one in everybody],
                "what they were started with",
                [f"{one['number']} (host {one['host']})" for one in everybody],
            )
        verdict = {"hello": _HELLO, "refusal": refusal, "kind": kind}
        for line in waiting:
            with contextlib.suppress(OSError):
                line.sendall(json.dumps(verdict).encode() + b"\n")
            line.close()
    return refusal, kind


def _missing(place: Place, here: Mapping[int, Mapping[str, Any]]) -> str:
    missing = [str(i) for i in range(place.count) if i not in here]
    shown = ", ".join(missing[:20]) + (" and more" if len(missing) > 20 else "")
    came = ", ".join(f"{i} (host {here[i]['host']})" for i in sorted(here)[:20])
    return (
        f"{len(missing)} of {place.count} processes did not come to {place.coordinator} in time "
        f"(--join_seconds): {shown}; there were {came}; accepted: every number from 0 to "
        f"{place.count - 1} started once, on hosts that reach that address"
    )


def _answer_roll(
    place: Place, host: str, port: int, mine: dict[str, Any], deadline: float
) -> tuple[str, str]:
    """Every other process: tells process 0 who it is, and waits for the verdict."""
    trouble = "nothing answers"
    pause = 0.02
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), min(left, _KNOCK_SECONDS)) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                # Longer than process 0 waits, whose answer says who was missing.
                verdict = _heard(line, left + _KNOCK_SECONDS + 5)
            if verdict is not None and verdict.get("hello") == _HELLO:
                if not verdict["refusal"]:
                    _await_listener(host, port, deadline)
                return verdict["refusal"], verdict["kind"]
            trouble = "what answers there is not process 0 of jkmeans, or it went away"
        except OSError as error:
            trouble = f"no connection: {error.strerror or error}"
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    sentence = (
        f"process {place.number} of {place.count} (host {mine['host']}) did not reach process 0 at "
        f"{place.coordinator} in time (--join_seconds): {trouble}; accepted: the address of the "
        "host where process 0 runs, and a port that is open between hosts"
    )
    return sentence, "lost"


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Waits until JAX's service listens where the roll was called.

    Its client, which would find nobody there, tries again only after a second.
    """
    until = min(deadline, time.monotonic() + _KNOCK_SECONDS)
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((host, port), _KNOCK_SECONDS):
            return
        time.sleep(0.01)


def _heard(line: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The JSON object that comes as one line; None where something else comes, or nothing."""
    deadline = time.monotonic() + seconds
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
            line.settimeout(max(0.01, deadline - time.monotonic()))
            if not (more := line.recv(65536)):
                return None
            data += more
        found = json.loads(data)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _gone(line: socket.socket) -> bool:
    """Whether the other end has hung up."""
    try:
        line.settimeout(0.01)
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def leave() -> None:
    """Waits for the others, at the end of work that is done, and ends this process with status 0.

    At once: everything is written, and what JAX takes down at its exit takes seconds in which a
    process gives no more signs of life. Nothing happens in a process that works alone.
    """
    if agreement.count() > 1:
        agreement.gather("done")
        end_at_once(0)


def end_at_once(status: int) -> None:
    """Ends this process, where there are others, without JAX's wait for them.

    JAX's exit handler would wait for a dead process for minutes.
    """
    if agreement.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if status not in (1, LostError.exit_status):
            agreement.take_leave(_LEAVE_SECONDS)
        os._exit(status)
