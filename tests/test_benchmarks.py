"""Benchmarks run, say what they measured, and give every contestant the same work."""

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import autoencoder_epoch
from benchmarks.support import epochs


def test_torch_and_jax_are_not_imported_with_the_module():
    modules = "benchmarks.autoencoder_epoch, benchmarks.dec_epoch"
    program = f"import sys, {modules}; assert not {{'torch', 'jax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_contestants_do_the_same_work(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(autoencoder_epoch, "TRIAL_STEPS", 3)
    # One thread: OpenMP's threads wait actively, which takes minutes beside other tests.
    monkeypatch.setattr(epochs, "cores", lambda: [0])
    path = tmp_path / "result.json"
    flags = "--data random --examples 256 --batch-size 256 --repeats 2 --no-compile --json"
    result = epochs.main(autoencoder_epoch.BENCHMARK, [*flags.split(), str(path)])
    assert json.loads(path.read_text()) == result
    assert result["settings"]["n_examples"] == 256
    assert result["settings"]["data"] == "random uint8"
    assert set(result["versions"]) > {"jax", "torch"}
    ours, theirs, clustering = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["jkmeans", "PyTorch", "jkmeans, clustering"]
    for row in result["rows"]:
        assert row["n_steps"] == 1
        assert len(row["seconds"]) == 2
        assert len(row["losses"]) == 3
        assert row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["ratio_min"] <= row["ratio_max"]
    assert ours["ratio"] == 1.0
    # Equal parameters at the start and whole batches: three steps of Adam must agree.
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
    assert clustering["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-3)
    printed = capsys.readouterr().out
    assert "time / jkmeans" in printed
    assert all(row["name"] in printed for row in result["rows"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--repeats", "0"], "'0' is given; accepted: an integer of at least 1"),
        (["--examples", "many"], "accepted: an integer of at least 0"),
        (["--data", "cifar"], "invalid choice"),
        (["--threads", "100000"], "--threads is 100000; accepted: 0 (all) to"),
        (["--speed"], "unrecognized arguments"),
        (["--json", "/nowhere/at/all.json"], "--json is '/nowhere/at/all.json'; accepted:"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit) as caught:
        epochs.main(autoencoder_epoch.BENCHMARK, flags)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("checkpointing", ["--epochs", "5"], "'5' is given; accepted: an integer of at least 6"),
        ("dispatch_kills", ["--lease-seconds", "0"], "'0' is given; accepted: a number above 0"),
        ("exactness", ["--rows", "0"], "'0' is given; accepted: an integer of at least 1"),
        ("kmeans", ["--tol", "-1"], "'-1' is given; accepted: a number of at least 0"),
        ("kmeans", ["--tol", "small"], "'small' is given; accepted: a number of at least 0"),
        ("process_counts", [], "the following arguments are required: --workdir"),
        ("ray_exchanges", ["--kills", "-1"], "'-1' is given; accepted: an integer of at least 0"),
        ("streaming", ["--gib", "inf"], "'inf' is given; accepted: a number above 0"),
        *(
            (name, ["--json", "/nowhere/at/all.json"], "accepted: a file in a folder that exists")
            for name in ("dispatch_kills", "kmeans", "ray_exchanges", "streaming")
        ),
        ("vq_simulation", ["--work", "3"], "unrecognized arguments: --work 3"),
    ],
)
def test_a_wrong_flag_of_any_benchmark_is_a_sentence(name, flags, sentence, capsys, monkeypatch):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{name}: ")
    assert sentence in printed
    assert printed.count("\n") == 1


def test_missing_torch_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        epochs.main(autoencoder_epoch.BENCHMARK, [])
    assert caught.value.code == 2
    assert "pip install -e .[benchmarks]" in capsys.readouterr().err
