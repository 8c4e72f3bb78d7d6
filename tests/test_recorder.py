import io
import json
import math
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from jkmeans.errors import UserError
from jkmeans.recorder import (
    RECENT_EPOCHS,
    Recorder,
    format_duration,
    read_metrics,
    remaining_seconds,
    results_table,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fake_terminal(monkeypatch, name="stderr"):
    """Makes stderr a terminal of 100 columns.

    Not a fixture: pytest puts its own stderr back between the set-up and the test.
    """
    stream = Terminal()
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stream


def events(workdir):
    """All TensorBoard events of a run, read from the record format itself."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(workdir):
    return {
        (value.tag, event.step): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
    }


def run_epochs(workdir, epochs, n_epochs=10, **kwargs):
    with Recorder(workdir, n_epochs=n_epochs, **kwargs) as recorder:
        for epoch in epochs:
            recorder.epoch("cluster", epoch, {"loss": 1.0 / epoch}, 100, 0.5)


# --- plain lines -----------------------------------------------------------------------------


def test_plain_line(tmp_path, capsys):
    metrics = {
        "loss": 0.02134,
        "loss/centroid": 7.0,
        "label_change": 0.0123,
        "empty_clusters": 0,
        "acc": 0.8231,
    }
    with Recorder(tmp_path, n_epochs=80, position=0) as recorder:
        recorder.epoch("cluster", 12, metrics, n_examples=24_690, seconds=2.0)
    output = capsys.readouterr()
    # 24,690 examples in 2 s; 68 epochs of 2 s are 136 s.
    assert output.err == (
        "cluster   12/80  loss 0.0213  changed 1.2%  empty 0  acc 0.823  "
        "12,345 examples/s  2m 16s left\n"
    )
    assert output.out == ""


def test_plain_line_of_a_diverged_epoch_says_nan(tmp_path, capsys):
    with Recorder(tmp_path, n_epochs=2, position=0) as recorder:
        recorder.epoch("pretrain", 1, {"loss": float("nan")}, 10, 0.0)
    line = capsys.readouterr().err
    assert "loss nan" in line
    assert "examples/s" not in line  # no rate can be computed from zero seconds


def test_say_prints_a_line_as_it_is(tmp_path, capsys):
    with Recorder(tmp_path, n_epochs=2, position=0) as recorder:
        recorder.waiting(0.5)
        recorder.say("saved [bold]checkpoint[/bold] 4")
    assert capsys.readouterr().err == "saved [bold]checkpoint[/bold] 4\n"


# --- remaining time --------------------------------------------------------------------------


def test_remaining_seconds_by_hand():
    assert remaining_seconds([2.0, 4.0], epochs_left=5) == 15.0
    assert remaining_seconds([2.0], epochs_left=0) == 0.0


def test_remaining_time_follows_the_epochs_of_the_same_phase(tmp_path, capsys):
    with Recorder(tmp_path, n_epochs=10, position=0) as recorder:
        recorder.epoch("pretrain", 1, {}, 100, 10.0)
        recorder.epoch("pretrain", 2, {}, 100, 20.0)
        recorder.epoch("cluster", 3, {}, 100, 1.0)
        recorder.epoch("cluster", 4, {}, 100, 3.0)
    left = [line.split("  ")[-1] for line in capsys.readouterr().err.splitlines()]
    # 9 × 10 s; 8 × 15 s; 7 × 1 s, without the pretraining epochs; 6 × 2 s.
    assert left == ["1m 30s left", "2m 00s left", "7s left", "12s left"]


def test_remaining_time_forgets_old_epochs(tmp_path, capsys):
    with Recorder(tmp_path, n_epochs=100, position=0) as recorder:
        recorder.epoch("cluster", 1, {}, 100, 1000.0)
        for epoch in range(2, 2 + RECENT_EPOCHS):
            recorder.epoch("cluster", epoch, {}, 100, 0.5)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"  {math.ceil(0.5 * (100 - 1 - RECENT_EPOCHS))}s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.2, "1s"),
        (59, "59s"),
        (59.5, "1m 00s"),
        (80, "1m 20s"),
        (3599, "59m 59s"),
        (7500, "2h 05m"),
        (3 * 86400 + 4 * 3600, "3d 04h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


# --- metrics.jsonl ---------------------------------------------------------------------------


def test_metrics_are_on_disk_after_each_epoch(tmp_path):
    metrics = {
        "loss": jnp.float32(0.5),
        "inertia": np.float64(3.0),
        "empty_clusters": jnp.int32(2),
        "acc": float("nan"),
        "nmi": float("inf"),
        "ari": jnp.bfloat16(0.25),
    }
    with Recorder(tmp_path / "new", n_epochs=3, position=0) as recorder:
        recorder.epoch("pretrain", 1, metrics, 30, 2.0)
        # Before the recorder is closed: a run may be killed at any time.
        text = (tmp_path / "new" / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert text.endswith("}\n")
    assert record["epoch"] == 1
    assert record["phase"] == "pretrain"
    assert record["seconds"] == 2.0
    assert record["examples_per_second"] == 15.0
    assert record["loss"] == 0.5
    assert record["inertia"] == 3.0
    assert record["empty_clusters"] == 2
    assert isinstance(record["empty_clusters"], int)
    assert record["acc"] is None
    assert record["nmi"] is None
    assert record["ari"] == 0.25
    assert record["time"].endswith("+00:00")
    assert read_metrics(tmp_path / "new") == [record]


def test_resumed_run_drops_the_epochs_that_run_again(tmp_path):
    run_epochs(tmp_path, range(1, 7), position=0)
    before = read_metrics(tmp_path)
    run_epochs(tmp_path, [5], position=4, resumed=True)
    after = read_metrics(tmp_path)
    assert [record["epoch"] for record in after] == [1, 2, 3, 4, 5]
    assert after[:4] == before[:4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resumed_run_drops_a_torn_line_before_it_writes(tmp_path):
    run_epochs(tmp_path, [1, 2], position=0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"epoch": 3, "phase": "clu\xc3')
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2]
    run_epochs(tmp_path, [3], position=2, resumed=True)
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_new_run_starts_new_records(tmp_path):
    run_epochs(tmp_path, [1, 2], position=0)
    run_epochs(tmp_path, [1], position=0)
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1]


def test_interrupted_rewrite_loses_no_record(tmp_path, monkeypatch):
    run_epochs(tmp_path, [1, 2, 3], position=0)
    before = read_metrics(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Recorder(tmp_path, n_epochs=10, position=1, resumed=True)
    assert read_metrics(tmp_path) == before


def test_read_metrics_of_an_empty_run(tmp_path):
    assert read_metrics(tmp_path) == []
    run_epochs(tmp_path, [], position=0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"phase": "cluster"}'])
def test_read_metrics_names_a_broken_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path)


def test_metric_may_not_shadow_a_field(tmp_path):
    with (
        Recorder(tmp_path, n_epochs=1, position=0) as recorder,
        pytest.raises(ValueError, match="seconds"),
    ):
        recorder.epoch("cluster", 1, {"seconds": 1.0}, 1, 1.0)
    assert read_metrics(tmp_path) == []


# --- TensorBoard -----------------------------------------------------------------------------


def test_tensorboard_holds_the_metrics_by_epoch(tmp_path):
    with Recorder(tmp_path, n_epochs=3, position=0) as recorder:
        recorder.epoch("pretrain", 1, {"loss": 0.5, "acc": float("nan")}, 30, 2.0)
        recorder.epoch("cluster", 2, {"loss/centroid": 0.25}, 30, 2.0)
    assert scalars(tmp_path) == {
        ("pretrain/loss", 1): 0.5,
        ("pretrain/examples_per_second", 1): 15.0,
        ("cluster/loss/centroid", 2): 0.25,
        ("cluster/examples_per_second", 2): 15.0,
    }


def test_tensorboard_of_a_resumed_run_purges_what_runs_again(tmp_path):
    run_epochs(tmp_path, range(1, 7), position=0)
    run_epochs(tmp_path, [5], position=4, resumed=True)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == e.session_log.START]
    # TensorBoard drops the steps from this one on.
    assert starts == [5]


# --- the progress bar ------------------------------------------------------------------------


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = fake_terminal(monkeypatch)
    with Recorder(tmp_path, n_epochs=80, position=40, resumed=True) as recorder:
        recorder.epoch("cluster", 41, {"loss": 0.5, "acc": 0.25}, 1000, 2.0)
        recorder.say("a [line] in between")
        recorder.waiting(0.5)
        assert recorder._bar is not None
        assert recorder._bar.tasks[0].completed == 41.5
        recorder.waiting(None)
        assert recorder._bar.tasks[0].completed == 41
    text = terminal.getvalue()
    assert "cluster" in text
    assert "41/80" in text
    assert "500 examples/s" in text
    assert "1m 18s left" in text or "1m 17s left" in text  # 39 epochs of 2 s
    assert "loss 0.500  acc 0.250" in text
    assert "a [line] in between\n" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_bar_leaves_a_piped_stdout_alone(tmp_path, monkeypatch):
    terminal = fake_terminal(monkeypatch)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with Recorder(tmp_path, n_epochs=2, position=0):
        print("a result for the pipe")
    assert pipe.getvalue() == "a result for the pipe\n"
    assert "a result" not in terminal.getvalue()


def test_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    terminal = fake_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    run_epochs(tmp_path, [1], position=0)
    assert "\x1b" not in terminal.getvalue()
    assert "examples/s" in terminal.getvalue()


def test_close_twice_and_after_an_interrupt(tmp_path, monkeypatch):
    fake_terminal(monkeypatch)
    stop = Progress.stop

    def interrupted(self):
        stop(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "stop", interrupted)
    recorder = Recorder(tmp_path, n_epochs=2, position=0)
    recorder.epoch("cluster", 1, {"loss": 1.0}, 1, 1.0)
    with pytest.raises(KeyboardInterrupt):
        recorder.close()
    assert recorder._metrics.closed
    recorder.close()
    assert scalars(tmp_path)[("cluster/loss", 1)] == 1.0


# --- results ---------------------------------------------------------------------------------


ROWS = {"acc": 0.82312, "inertia": 1.5e7, "clusters": 12345, "stopped": "converged"}


def test_results_table_plain(capsys):
    results_table(ROWS, "digits")
    assert capsys.readouterr().out == (
        "digits\n"
        "  acc       0.8231\n"
        "  inertia   1.5e+07\n"
        "  clusters  12,345\n"
        "  stopped   converged\n"
    )


def test_times_in_a_results_table(capsys):
    """To a tenth, as they are measured; shorter ones with as many digits as there are."""
    results_table({"train_seconds": 27.2, "seconds": 0.7, "fit_seconds": 0.012}, "digits")
    cells = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert cells == ["27.2", "0.7", "0.012"]


def test_results_table_on_a_terminal(monkeypatch):
    stream = fake_terminal(monkeypatch, "stdout")
    results_table(ROWS, "digits [k=10]")
    text = stream.getvalue()
    assert "digits [k=10]" in text
    assert "│" in text
    for cell in ("0.8231", "1.5e+07", "12,345", "converged"):
        assert cell in text


def test_import_is_light():
    program = (
        "import sys, jkmeans.recorder, jkmeans.report.kmeans\n"
        "heavy = {'matplotlib', 'tensorboardX', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
