"""The supervisor: deaths, silence, wishes and signals, with commands that do no work."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jkmeans.processes import heartbeat, spare
from jkmeans.processes.supervisor import EVENTS_FILE, WANTED_FILE, Options, Supervisor

ROOT = Path(__file__).parent.parent

# What every command begins with: `life` counts the generations.
PRELUDE = """
import os, pathlib, signal, sys, time
n, i = int(os.environ["JKMEANS_PROCESSES"]), int(os.environ["JKMEANS_PROCESS_ID"])
folder = pathlib.Path({folder!r})
life = int(os.environ["JKMEANS_HEARTBEAT"].split("-")[-2]) - 1
(folder / f"life-{{i}}-{{life}}-of-{{n}}").touch()
def sleep(): time.sleep(60)
def await_all():
    while len(list(folder.glob(f"life-*-{{life}}-of-*"))) < n: time.sleep(0.01)
"""


def command(tmp_path: Path, body: str) -> list[str]:
    text = PRELUDE.format(folder=str(tmp_path)) + textwrap.dedent(body)
    return [sys.executable, "-c", text]


def supervise(tmp_path: Path, body: str, n: int = 3, **options) -> tuple[int, list[str], list]:
    """Status, what was said, and what the processes wrote."""
    said: list[str] = []
    shown: list[tuple[int, str]] = []
    supervisor = Supervisor(
        Options(command(tmp_path, body), n, logs=tmp_path / "logs", **options),
        said.append,
        lambda number, line: shown.append((number, line)),
    )
    return supervisor.run(), said, shown


def lives(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("life-*"))


def events(tmp_path: Path, kind: str) -> list[dict]:
    lines = (tmp_path / "logs" / EVENTS_FILE).read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def test_a_merged_view_and_a_log_of_each(tmp_path):
    status, said, shown = supervise(tmp_path, "print('hello from', i); print('no newline', end='')")
    assert status == 0
    assert said == []
    assert sorted(shown) == [(i, t) for i in range(3) for t in (f"hello from {i}", "no newline")]
    for i in range(3):
        log = (tmp_path / "logs" / f"process-{i}.log").read_text()
        assert log == f"hello from {i}\nno newline\n"


def test_a_death_is_noticed_at_once_and_the_rest_goes_on_with_those_left(tmp_path):
    body = """
        await_all()
        if life == 0 and i == 1:
            print(time.time(), flush=True)
            os.kill(os.getpid(), 9)
        if life == 0: sleep()
    """
    status, said, shown = supervise(tmp_path, body)
    assert status == 0
    assert len(said) == 1
    assert "process 1 was killed by SIGKILL" in said[0]
    assert "with 2 processes (restart 1 of 10)" in said[0]
    assert lives(tmp_path) == [
        "life-0-0-of-3", "life-0-1-of-2", "life-1-0-of-3", "life-1-1-of-2", "life-2-0-of-3",
    ]  # fmt: skip
    died = float(next(line for number, line in shown if number == 1))
    assert events(tmp_path, "dead")[0]["time"] - died < 1.0


def test_never_fewer_than_asked_for(tmp_path):
    body = """
        await_all()
        if life < 2 and i == n - 1: os.kill(os.getpid(), 9)
        if life < 2: sleep()
    """
    status, said, _ = supervise(tmp_path, body, min_processes=2)
    assert status == 0
    assert [event["n"] for event in events(tmp_path, "start")] == [3, 2, 2]
    assert "process 1 was killed by SIGKILL; going on" in said[1]


@pytest.mark.parametrize("final", [2, 3])
def test_what_would_fail_again_is_not_started_again(tmp_path, final):
    # One is to blame; another loses it first, and says so with 75.
    body = f"""
        if i == 0: sys.exit(75)
        time.sleep(0.3)
        if i == 1: print("the reason", flush=True); sys.exit({final})
        sleep()
    """
    status, said, shown = supervise(tmp_path, body)
    assert status == final
    assert (1, "the reason") in shown
    assert len(lives(tmp_path)) == 3
    assert f"process 1 ended with status {final}" in said[-1]


def test_a_signal_without_a_name_has_a_number(tmp_path):
    body = "os.kill(os.getpid(), signal.SIGRTMIN + 1)"
    status, said, _ = supervise(tmp_path, body, n=1, max_restarts=0)
    assert status == 75
    assert f"process 0 was killed by signal {signal.SIGRTMIN + 1}" in said[-1]


def test_restarts_are_counted(tmp_path):
    status, said, _ = supervise(tmp_path, "sys.exit(1)", n=1, max_restarts=2)
    assert status == 75
    assert len(lives(tmp_path)) == 3
    assert "2 restarts are used up" in said[-1]


def test_losing_another_is_no_death(tmp_path):
    # All say that they lost another: as many start again.
    status, _, _ = supervise(tmp_path, "sys.exit(75 if life == 0 else 0)")
    assert status == 0
    assert [event["n"] for event in events(tmp_path, "start")] == [3, 3]


def test_a_stopped_process_is_noticed_in_the_stated_time(tmp_path):
    body = """
        from jkmeans.processes import heartbeat
        heartbeat.start()
        if life == 0 and i == 0:
            time.sleep(1)
            print(time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        if life == 0: sleep()
    """
    status, said, shown = supervise(tmp_path, body, n=2, hang_seconds=2.5)
    assert status == 0
    assert "process 0 gave no sign of life" in said[0]
    stopped = float(next(line for number, line in shown if number == 0))
    assert 1.5 < events(tmp_path, "silent")[0]["time"] - stopped < 2.5 + 1.5


@pytest.mark.parametrize("how", ["file", "signal"])
def test_growing_again_when_asked(tmp_path, how):
    ask = {
        "file": f'(folder / "logs" / {WANTED_FILE!r}).write_text("3")',
        "signal": "os.kill(os.getppid(), signal.SIGUSR1)",
    }
    body = f"""
        def leave(*_): print("saved", flush=True); os._exit(143)
        signal.signal(signal.SIGTERM, leave)
        await_all()
        if life == 0 and i == 1: os.kill(os.getpid(), 9)
        if life == 1 and i == 0: {ask[how]}
        if life < 2 and n < 3 or life == 0: sleep()
    """
    status, said, shown = supervise(tmp_path, body)
    assert status == 0
    assert [event["n"] for event in events(tmp_path, "start")] == [3, 2, 3]
    assert said[-1] == "starting 3 processes, as asked"
    assert (1, "saved") in shown


def test_spares_are_started_when_all_are_at_work_and_take_the_place_of_the_dead(tmp_path):
    # Without the prelude, which reads its place at once: a spare has none yet.
    # One dies when both spares have said that they are ready, however long that takes.
    text = f"""
import os, pathlib, signal, sys, time
from jkmeans.processes import heartbeat, spare
spare._MODULES = ()
events = pathlib.Path({str(tmp_path / "logs" / EVENTS_FILE)!r})
spare.wait_for_place()
beat = os.environ[heartbeat.VARIABLE]
heartbeat.start()
i, generation = int(os.environ["JKMEANS_PROCESS_ID"]), int(beat.split("-")[-2])
time.sleep(2.5)
print("start is over", time.time(), flush=True)
heartbeat.at_work()
if generation == 1 and i == 1:
    for _ in range(600):
        if events.read_text().count('"event": "spare"') == 2: break
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
if generation == 1: time.sleep(60)
"""
    said: list[str] = []
    shown: list[tuple[int, str]] = []
    options = Options(
        [sys.executable, "-c", text], 2, min_processes=2, spares=2, logs=tmp_path / "logs"
    )
    supervisor = Supervisor(options, said.append, lambda i, line: shown.append((i, line)))
    assert supervisor.run() == 0
    _, second = events(tmp_path, "start")
    ready = events(tmp_path, "spare")
    spares = [event["pid"] for event in ready if event["generation"] == 1]
    assert sorted(second["pids"]) == sorted(spares)
    over = [float(line.split()[-1]) for _, line in shown[:2]]
    assert min(event["time"] for event in ready) > max(over)
    assert not any(spare.READY in line for _, line in shown)


def test_a_wish_that_cannot_be(tmp_path):
    body = f'(folder / "logs" / {WANTED_FILE!r}).write_text("9"); time.sleep(0.5)'
    status, said, _ = supervise(tmp_path, body, n=1)
    assert status == 0
    assert "asks for '9'; accepted: 1 to 1 processes" in said[0]


def test_one_asked_to_leave_by_somebody_else(tmp_path):
    body = """
        def leave(*_): os._exit(143)
        signal.signal(signal.SIGTERM, leave)
        if life == 0 and i == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if life == 0: time.sleep(0.5); os._exit(143)
    """
    status, said, _ = supervise(tmp_path, body)
    assert status == 0
    assert "was asked to leave by somebody else, and saved" in said[0]
    assert [event["n"] for event in events(tmp_path, "start")] == [3, 2]


def launch(tmp_path, body, *flags) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "experiments.launch", *flags, "--"]
    return subprocess.Popen(
        [*arguments, *command(tmp_path, body)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_signals_are_passed_on(tmp_path):
    body = """
        def leave(*_): print("saving", flush=True); time.sleep(0.2); os._exit(143)
        signal.signal(signal.SIGTERM, leave)
        print("ready", flush=True); sleep()
    """
    process = launch(tmp_path, body, "--processes=2")
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["0| ready\n", "1| ready\n"]
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert sorted(out.splitlines()) == ["0| saving", "1| saving"]


BAD = {
    "no command": (["--processes=2"], "there is no command"),
    "no such command": (["--processes=2", "--", "no-such-command"], "cannot start 'no-such-com"),
    "too many": (["--processes=2", "--min_processes=3", "--", "true"], "--min_processes is 3"),
    "none": (["--processes=0", "--", "true"], "processes"),
    "no time to be silent": (
        ["--processes=1", "--hang_seconds=nan", "--", "true"],
        "--hang_seconds",
    ),
    "no time to save": (["--processes=1", "--grace_seconds=nan", "--", "true"], "--grace_seconds"),
    "not said": (["--", "true"], "--processes must be given"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    flags, sentence = BAD[case]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_parent_that_dies_ends_its_processes(tmp_path):
    beat = tmp_path / "beat"
    body = f"""
        import subprocess, sys, os
        text = '''
        import time
        from jkmeans.processes import heartbeat
        heartbeat.start()
        time.sleep(60)
        '''
        import textwrap
        os.environ["{heartbeat.VARIABLE}"] = {str(beat)!r}
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)])
        print(child.pid, flush=True)
        while not os.path.exists({str(beat)!r}): time.sleep(0.05)
        os._exit(0)
    """
    environment = os.environ | {
        "JKMEANS_PROCESSES": "1",
        "JKMEANS_PROCESS_ID": "0",
        heartbeat.VARIABLE: "beat-1-0",  # What `PRELUDE` reads; the child has a file of its own.
    }
    parent = subprocess.run(
        command(tmp_path, body), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        timeout=60,
    )  # fmt: skip
    child = int(parent.stdout)
    until = time.monotonic() + 10
    while time.monotonic() < until and _alive(child):
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_wish_holds_where_one_does_not_leave_in_time(tmp_path):
    body = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN if i == 0 else lambda *_: os._exit(143))
        await_all()
        if life == 0 and i == 1: (folder / "logs" / {WANTED_FILE!r}).write_text("2")
        if life == 0: sleep()
    """
    status, said, _ = supervise(tmp_path, body, grace_seconds=0.5, max_restarts=0)
    assert status == 0
    assert said == ["starting 2 processes, as asked"]
    assert [event["n"] for event in events(tmp_path, "start")] == [3, 2]


def test_a_wish_that_is_not_written_yet_waits(tmp_path):
    body = f"""
        wanted = folder / "logs" / {WANTED_FILE!r}
        if life == 0:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
            wanted.touch()
            time.sleep(0.5)
            wanted.write_text("1")
            sleep()
    """
    status, said, _ = supervise(tmp_path, body, n=1)
    assert status == 0
    assert said == ["starting 1 process, as asked"]


def test_an_exception_of_the_supervisor_leaves_no_process(tmp_path):
    def show(number, line):
        pids.append(int(line))
        if len(pids) == 2:
            raise RuntimeError("the screen is gone")

    pids: list[int] = []
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); sleep()"
    with pytest.raises(RuntimeError, match="the screen is gone"):
        Supervisor(Options(command(tmp_path, body), 2), lambda line: None, show).run()
    assert not any(_alive(pid) for pid in pids)


def test_the_work_goes_on_where_nobody_reads_any_more(tmp_path):
    body = """
        for line in range(20): print(line, flush=True); time.sleep(0.05)
        (folder / f"done-{i}").touch()
    """
    process = launch(tmp_path, body, "--processes=2", f"--logs={tmp_path / 'logs'}")
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(60) == 0, errors
    assert errors == ""
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
    assert len((tmp_path / "logs" / "process-0.log").read_text().splitlines()) == 20


def test_a_clock_that_is_set_is_no_silence(tmp_path):
    beat = tmp_path / "beat"
    listener = heartbeat.Listener(beat)
    assert listener.silence() == 0
    beat.touch()
    for hours in (0, -5, 5):
        os.utime(beat, (time.time() + 3600 * hours,) * 2)
        assert listener.silence() < 0.1
    time.sleep(0.3)
    assert 0.3 <= listener.silence() < 5
    assert not listener.is_at_work()
    listener.end()
    assert not beat.exists()


@pytest.mark.parametrize("at_work", [False, True])
def test_an_orphan_that_does_not_hear_ends_unless_it_has_work_to_save(tmp_path, at_work):
    # Of a supervisor that was killed before the process could look who its parent is.
    text = f"""
import os, signal, time
from jkmeans.processes import heartbeat
heartbeat.ORPHAN_SECONDS = 1.0
def hear(*_): print("heard", flush=True)
signal.signal(signal.SIGTERM, hear)  # As in the middle of a compilation: nothing comes of it.
heartbeat.start()
if {at_work}: heartbeat.at_work()
until = time.monotonic() + 4
while time.monotonic() < until: time.sleep(0.1)
"""
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {
        heartbeat.VARIABLE: str(tmp_path / "beat"),
        heartbeat.PARENT: str(gone.pid),
    }
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "heard\n"
    assert done.returncode == (0 if at_work else 128 + signal.SIGTERM)


def test_a_wish_counts_where_one_dies_of_it(tmp_path):
    body = f"""
        def leave(*_): os._exit(1 if i == 0 else 143)
        signal.signal(signal.SIGTERM, leave)
        await_all()
        if life == 0 and i == 1: (folder / "logs" / {WANTED_FILE!r}).write_text("3")
        if life == 0: sleep()
    """
    status, said, _ = supervise(tmp_path, body, n=4)
    assert status == 0
    assert "process 0 ended with status 1" in said[0]
    # Of the three that are wanted one is lost.
    assert [event["n"] for event in events(tmp_path, "start")] == [4, 2]
