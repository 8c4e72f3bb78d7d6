"""k-means over several processes: the same bits whatever the layout of processes and devices."""

import functools
import json
import socket
import subprocess
import sys

import pytest


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def fits(n_processes: int, n_devices: int, flags: str) -> list[dict]:
    """What each process found."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.processes",
                *map(str, (number, n_processes, port, n_devices, flags)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(n_processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def one_process():
    """What one process finds, by the flags of XLA."""
    return functools.cache(lambda flags: fits(1, 4, flags)[0])


FAST_TO_COMPILE, AS_USERS_RUN_IT = "--xla_backend_optimization_level=0", ""


@pytest.mark.parametrize(
    ("n_processes", "n_devices", "flags"),
    [
        (2, 2, FAST_TO_COMPILE),
        pytest.param(2, 2, AS_USERS_RUN_IT, marks=pytest.mark.slow),
        pytest.param(4, 1, AS_USERS_RUN_IT, marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_any_layout_of_processes(one_process, n_processes, n_devices, flags):
    for found in fits(n_processes, n_devices, flags):
        assert found == one_process(flags)
