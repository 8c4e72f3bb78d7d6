"""The benchmark of GPUs runs all of its code on tiny problems, and says what they are."""

import json

import numpy as np
import pytest

from benchmarks import gpu, gpu_code, gpu_tiles


def test_without_a_gpu_it_is_one_sentence_and_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gpu: JAX finds no GPU here, only 'cpu'; accepted: a machine with a")
    assert printed.count("\n") == 1


def test_tiny_problems_run_all_of_it(tmp_path, capsys, monkeypatch):
    def broken(problem, iterations):
        raise RuntimeError("no such kernel")

    # A peer that is there and fails, and one that is not there.
    monkeypatch.setitem(gpu.PEERS, "flash-kmeans", ("json", "json"))
    monkeypatch.setitem(gpu.SYSTEMS, "flash-kmeans", broken)
    monkeypatch.setitem(gpu.PEERS, "flashlib", ("nowhere_at_all", "nowhere-at-all"))
    markdown, measured = tmp_path / "gpu.md", tmp_path / "gpu.json"
    systems = "exact fast exact-kernel flash-kmeans flashlib"
    flags = f"--allow-cpu --profile --lines 51K-512 --repeats 1 --iterations 2 --systems {systems}"
    status = gpu.main([*flags.split(), "--markdown", str(markdown), "--json", str(measured)])
    printed = capsys.readouterr()
    assert status == 0
    assert "flashlib is left out: it is not installed" in printed.err
    assert "exact-kernel is left out: no Hopper GPU is there" in printed.err
    assert "flash-kmeans failed on 51K-512: RuntimeError" in printed.err
    assert printed.out.strip() == markdown.read_text().strip()
    assert "a test of the script, not a measurement" in printed.out
    result = json.loads(measured.read_text())
    assert [r["system"] for r in result["records"]] == ["exact", "fast", "flash-kmeans"]
    assert result["missing"] == ["flashlib"]
    checks = {r["system"]: r["check"] for r in result["records"] if "check" in r}
    assert [*checks] == ["exact", "fast"]
    assert checks["exact"]["different"] == checks["exact"]["wrong"] == 0
    assert 0 < checks["exact"]["all_centroids"] < checks["exact"]["recomputed"] < 0.5
    assert all(0 < use < 1 for use in result["bound_use"].values())
    assert all(rate > 0 for rate in result["limits"].values())


def test_a_wrong_certificate_and_a_broken_bound_are_status_1(capsys, monkeypatch):
    wrong = gpu.Check(10, 1, 1, 0.1, 0.0, 0.0)
    monkeypatch.setattr(gpu, "check", lambda *_: wrong)
    monkeypatch.setattr(gpu, "bound_use", lambda *_: 1.5)
    monkeypatch.setattr(gpu, "limits", lambda *_: dict.fromkeys(gpu_rates(), 1.0))
    monkeypatch.setitem(gpu.SYSTEMS, "exact", lambda problem, iterations: iterations)
    flags = "--allow-cpu --lines 51K-512 --repeats 1 --systems exact"
    assert gpu.main(flags.split()) == 1
    printed = capsys.readouterr().err
    assert "exact: the bound is broken on this device" in printed
    assert "exact on 51K-512: certified labels are wrong" in printed


def gpu_rates():
    return ("bfloat16", "tf32", "float32", "bandwidth")


def test_the_roof_is_the_larger_of_arithmetic_and_traffic():
    line = gpu.Line("line", 1000, 10, 50, None, 1, 1)
    rates = {"bfloat16": 1e6, "tf32": 5e5, "float32": 1e5, "bandwidth": 1e9}
    assert gpu.roof(line, "exact", rates) == (1.0, "bfloat16 products")
    assert gpu.roof(line, "exact-tf32", rates) == (2.0, "tf32 products")
    assert gpu.roof(line, "full", rates) == (10.0, "float32 products")
    assert gpu.roof(line, "fast", rates | {"bandwidth": 1e4}) == (8.0, "bandwidth")
    assert gpu.roof(line, "flashlib", rates | {"bandwidth": 1e4}) == (4.0, "bandwidth")


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        (gpu, ["--repeats", "0"], "'0' is given; accepted: an integer of at least 1"),
        (gpu, ["--lines", "1B-3"], "invalid choice: '1B-3'"),
        (gpu, ["--json", "/nowhere/at/all.json"], "accepted: a file in a folder that exists"),
        (gpu, ["--quick"], "unrecognized arguments"),
        (gpu_code, ["--features", "100"], "100 is given; accepted: a multiple of 64"),
        (gpu_tiles, ["--features", "100"], "100 is given; accepted: a multiple of 64"),
        (gpu_tiles, ["--rows", "1000"], "1000 is given; accepted: a multiple of 256"),
        (gpu_tiles, [], "accepted: a Hopper GPU"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(script, flags, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(flags)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


def test_rows_of_a_mixture_are_not_those_of_a_normal_distribution():
    line = gpu.Line("line", 600, 16, 20, None, 1, 1)
    mixture, normal = gpu.make(line, "mixture"), gpu.make(line, "normal")
    assert mixture.x.shape == (600, 16)
    assert mixture.init.shape == (20, 16)
    assert np.var(mixture.x) == pytest.approx(4 / 3, rel=0.1)
    assert np.var(normal.x) == pytest.approx(1, rel=0.1)
