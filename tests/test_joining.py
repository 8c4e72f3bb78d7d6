"""How processes find each other, and what they are told where they do not."""

import socket
import threading
import time

import pytest

from jkmeans.errors import LostError, UserError
from jkmeans.processes import agreement
from jkmeans.processes.joining import Place, find_place, roll_call
from tests.test_processes import free_port

SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[07-09]", "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
KUBERNETES = {
    "JKMEANS_PROCESSES": "16", "JKMEANS_COORDINATOR": "job-0.job:29400",
    "JOB_COMPLETION_INDEX": "5",
}  # fmt: skip
OURS = {
    "JKMEANS_PROCESSES": "2", "JKMEANS_PROCESS_ID": "1", "JKMEANS_COORDINATOR": "127.0.0.1:29400",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (OURS, Place(1, 2, "127.0.0.1:29400", "environment")),
        (KUBERNETES, Place(5, 16, "job-0.job:29400", "Kubernetes")),
        # The supervisor inside a job of an engine has the last word.
        (SLURM | OURS, Place(1, 2, "127.0.0.1:29400", "environment")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, None),
        ({"JKMEANS_PROCESSES": "1", "JKMEANS_PROCESS_ID": "0"}, None),
    ],
)
def test_the_place_that_the_environment_gives(environment, place):
    found = find_place(environment=environment)
    assert found == place or (found and found._replace(local_devices=None) == place)


@pytest.mark.parametrize(
    ("environment", "number", "count", "host"),
    [(SLURM, 2, 3, "node07:"), (OPEN_MPI, 1, 4, "10.96.0.1:")],
)
def test_engines_that_jax_knows(monkeypatch, environment, number, count, host):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place = find_place()
    assert place is not None
    assert (place.number, place.count) == (number, count)
    assert place.coordinator.startswith(host)
    assert find_place(count=1) is None  # Alone, whatever the engine says.


def test_flags_come_before_the_environment():
    place = find_place(4, 3, "node0:1234", SLURM)
    assert place == Place(3, 4, "node0:1234", "flags")


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        (
            (4, -1, ""),
            {},
            r"--processes is 4, but --process_id .* experiments.launch --processes 4",
        ),
        ((4, 1, ""), {}, "--coordinator is not given"),
        ((4, 4, "a:1"), {}, "--process_id is 4, but --processes is 4; accepted: 0 to 3"),
        ((4, 1, "node0"), {}, "--coordinator is 'node0'; accepted: host:port"),
        ((4, 1, "node0:99999"), {}, "--coordinator is 'node0:99999'"),
        ((0, 1, ""), {}, "--process_id is 1, but nothing says how many"),
        ((0, -1, ""), {"JKMEANS_PROCESSES": "two"}, "JKMEANS_PROCESSES is 'two'"),
    ],
)
def test_places_that_are_not_complete(flags, environment, sentence):
    with pytest.raises(UserError, match=sentence):
        find_place(*flags, environment)


def call(places, seconds=10.0, values=None):
    """What the roll call told each process: None, or its error."""
    told = [None] * len(places)

    def one(i, place):
        try:
            roll_call(place, {"config.seed": 0} if values is None else values[i], seconds)
        except (UserError, LostError) as error:
            told[i] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def places(numbers, count, origin="flags"):
    coordinator = f"localhost:{free_port()}"
    return [Place(number, count, coordinator, origin) for number in numbers]


def test_all_come_in_any_order():
    assert call(places((3, 0, 2, 1), 4)) == [None] * 4


def test_who_is_missing_is_said_to_all_that_came():
    told = call(places((0, 2), 4), seconds=1.0)
    for error in told:
        assert isinstance(error, UserError)
        assert "2 of 4 processes did not come" in str(error)
        assert ": 1, 3; there were 0 (host " in str(error)


def test_an_engine_is_to_start_all_again():
    for error in call(places((0, 2), 3, "SLURM"), seconds=0.5):
        assert isinstance(error, LostError)


def test_no_coordinator():
    started = time.monotonic()
    (error,) = call(places((1,), 2), seconds=0.5)
    assert time.monotonic() - started < 5
    assert "process 1 of 2" in str(error)
    assert "did not reach process 0 at localhost:" in str(error)


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (error,) = call([Place(0, 2, f"localhost:{port}", "flags")])
    assert isinstance(error, UserError)
    assert f"cannot listen on port {port}" in str(error)


def test_a_difference_is_named_with_both_sides():
    given = [{"config.seed": 0}, {"config.seed": 0}, {"config.seed": 7}]
    for error in call(places((0, 1, 2), 3), values=given):
        assert isinstance(error, UserError)
        assert "config.seed is 0 in process 0" in str(error)
        assert "7 in process 2" in str(error)


def test_other_versions(monkeypatch):
    def version(name):
        return "0.1" if name == "jax" and threading.current_thread().name == "old" else "0.2"

    monkeypatch.setattr("jkmeans.versions.metadata.version", version)
    first, second = places((0, 1), 2)
    errors = []

    def old():
        with pytest.raises(UserError) as caught:
            roll_call(second, {}, 10)
        errors.append(str(caught.value))

    thread = threading.Thread(target=old, name="old")
    thread.start()
    with pytest.raises(UserError, match=r"the version of jax is 0\.2 in process 0"):
        roll_call(first, {}, 10)
    thread.join()
    assert "0.1 in process 1" in errors[0]


def test_two_with_one_number():
    told = call(places((0, 1, 1), 3), seconds=5)
    assert all("two processes have the number 1" in str(error) for error in told)


def test_another_count():
    first, second = places((0, 1), 3)
    told = call([first, second._replace(count=2)], seconds=5)
    assert all("was told that there are 2 processes" in str(error) for error in told)


def test_a_stranger_at_the_door_does_no_harm():
    both = places((0, 1), 2)
    port = int(both[0].coordinator.rpartition(":")[2])
    told = []
    thread = threading.Thread(target=lambda: told.extend(call(both[:1])))
    thread.start()
    for _ in range(100):
        try:
            with socket.create_connection(("localhost", port)) as line:
                line.sendall(b"GET / HTTP/1.1\r\n\r\n\n")
            break
        except OSError:
            time.sleep(0.05)
    assert call(both[1:]) == [None]
    thread.join()
    assert told == [None]


def test_one_process_agrees_with_itself(tmp_path):
    agreement.agree("anything", {"a": 1})
    agreement.same_folder(tmp_path)
    assert agreement.gather(3) == [3]
    assert agreement.on_first(lambda: 4) == 4
    assert agreement.part_of(10) == (0, 10)
    assert not any(tmp_path.iterdir())
