"""Ctrl-C and SIGTERM, by real signals."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jkmeans.interruption import Interrupted, Interruption

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def send(number):
    os.kill(os.getpid(), number)
    # Python runs its handler at the next safe place of the main thread.
    time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with Interruption() as interruption:
        assert [signal.getsignal(n) for n in SIGNALS] != before
        assert not interruption.requested
        assert not interruption.announced()
        send(number)
        assert interruption.requested
        assert interruption.announced()  # Once.
        assert not interruption.announced()
        assert interruption.requested
        with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught:
            interruption.leave()
        assert caught.value.exit_status == {"SIGTERM": 143, "SIGINT": 130}[number.name]
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_handlers_are_restored_after_an_error():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(ValueError, match="mine"), Interruption():
        raise ValueError("mine")
    assert [signal.getsignal(n) for n in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_each_use_begins_anew():
    with Interruption() as first:
        send(signal.SIGTERM)
    with Interruption() as second:
        assert first.requested
        assert not second.requested


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = f"""
import os, time
from jkmeans.interruption import Interruption
with Interruption() as interruption:
    os.kill(os.getpid(), {int(first)})
    print("alive", interruption.requested, flush=True)
    try:
        os.kill(os.getpid(), {int(second)})
        time.sleep(30)
    finally:
        print("not reached", flush=True)
"""
    # The module alone: importing the package would cost seconds of imports.
    done = subprocess.run(
        [sys.executable, "-c", _ALONE + program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "alive True\n"
    assert done.returncode == 128 + second


_ALONE = """
import importlib.util, pathlib, sys, types
package = types.ModuleType("jkmeans")
package.__path__ = [str(pathlib.Path("jkmeans").absolute())]
sys.modules["jkmeans"] = package
"""


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_outside_the_main_thread_signals_are_left_alone():
    before = [signal.getsignal(n) for n in SIGNALS]
    seen = []

    def work():
        with Interruption() as interruption:
            seen.append([signal.getsignal(n) for n in SIGNALS])
            seen.append(interruption.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]
    assert [signal.getsignal(n) for n in SIGNALS] == before
