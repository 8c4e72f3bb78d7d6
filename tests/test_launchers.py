"""The commands as a user types them: exit status, one sentence, no traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import of_method
from experiments.config_flag import last_of_each
from tests import tiny

ROOT = Path(__file__).parent.parent


def run(program: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    # One device, as users have it; unoptimised code computes the same and is compiled faster.
    flags = "--xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    examples, labels = tiny.blobs()
    np.save(folder / "x.npy", examples)
    np.save(folder / "y.npy", labels)
    bad = examples.copy()
    bad[[17, 40]] = np.nan
    np.save(folder / "nan.npy", bad)
    np.save(folder / "short.npy", labels[:-1])
    np.save(folder / "wide.npy", np.zeros((5, 13), np.float32))
    return folder


def train_flags(files, workdir, *more) -> tuple[str, ...]:
    return (
        "--config=configs/npy.py",
        f"--workdir={workdir}",
        f"--config.data.path={files / 'x.npy'}",
        f"--config.data.labels_path={files / 'y.npy'}",
        "--config.n_clusters=3",
        "--config.network.widths=(8, 8)",
        "--config.network.widths=(16,)",  # Of two the last one holds.
        "--config.network.embedding_dim=4",
        "--config.training.n_pretrain_epochs=2",
        "--config.training.n_epochs=2",
        *more,
    )


@pytest.fixture(scope="module")
def workdir(files):
    """A run made by the command itself, pictures and all."""
    folder = files / "run"
    done = run("train", *train_flags(files, folder))
    assert done.returncode == 0, done.stderr
    assert "acc" in done.stdout
    return folder


@pytest.mark.parametrize("of_file", ["autoencoder", "dec"])
def test_another_method_comes_with_its_settings(of_file, tmp_path):
    """Of two methods without fields of their own, too; the file's own method is left as it is."""
    (tmp_path / "mine.py").write_text(
        "from configs import digits\nfrom jkmeans.methods import with_method\n\n\n"
        "def get_config(seed):\n"
        f"    config = with_method(digits.get_config(), {of_file!r}, centroids__n_iterations=7)\n"
        "    config.seed = int(seed)\n"
        "    return config\n"
    )
    config = of_method.get_config(f"dec:{tmp_path / 'mine.py'}:4")
    assert config.objective.to_dict() == {"name": "dec"}
    assert config.centroids.n_iterations == (7 if of_file == "dec" else 1)
    assert config.seed == 4


def test_a_damaged_checkpoint_has_a_sentence_and_no_traceback(workdir, tmp_path):
    """Also none of reads that Orbax began and nobody waits for."""
    copy = shutil.copytree(workdir, tmp_path / "run")
    newest = max((copy / "checkpoints").iterdir(), key=lambda p: int(p.name))
    (newest / "model" / "array_metadatas" / "process_0").write_bytes(b"")
    done = run("evaluate", "--workdir", str(copy), "--checkpoint", newest.name)
    assert done.returncode == 2, done.stderr
    assert f"checkpoint {newest} cannot be read: Failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_of_a_field_that_is_given_twice_the_last_value_holds(workdir):
    """Tuples, too, which ml_collections would join."""
    assert json.loads((workdir / "config.json").read_text())["network"]["widths"] == [16]
    given = [
        "p",
        "--config=f",
        "--config.a=(1,)",
        "--config.b=1",
        "--config.a=()",
        "--config.b",
        "2",
    ]
    assert last_of_each(given) == ["p", "--config=f", "--config.a=()", "--config.b", "2"]
    for earlier in ("8,8", "[8]", " (8,)", "a"):
        assert last_of_each(["p", "--config.a", earlier, "--config.a=9"]) == ["p", "--config.a=9"]
    apart = ["p", "--config.a", "(1,)", "--config.a", "(2,)", "--workdir", "w", "--workdir", "v"]
    assert last_of_each(apart) == ["p", *apart[3:]]
    # Not values of the same field: an element, a switch.
    for kept in (
        ["--config.a=(1,)", "--config.a[0]=2"],
        ["--noconfig.c", "--config.c"],
        ["--config.d", "-1", "--config.d", "2"],
    ):
        assert last_of_each(kept) == kept


def test_train_evaluate_predict(files, workdir):
    pictures = {p.name for p in (workdir / "report").iterdir()}
    assert {"curves.png", "map.png", "nearest.png", "confusion.png", "sizes.png"} <= pictures
    done = run("evaluate", "--workdir", str(workdir))
    assert done.returncode == 0, done.stderr
    assert "nmi" in done.stdout
    output = files / "clusters.npz"
    done = run(
        "predict", "--workdir", str(workdir), "--input", str(files / "x.npy"),
        "--output", str(output),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        assert len(arrays["labels"]) == tiny.N_EXAMPLES


BAD = {
    "no config": (["--workdir=w"], "--config must be given"),
    "no workdir": (["--config=configs/digits.py"], "--workdir must be given"),
    "no name of a workdir": (
        ["--config=configs/digits.py", "--workdir="],
        "--workdir must be given",
    ),
    "missing config": (
        ["--config=configs/none.py", "--workdir=w", "--config.objective.name=dec"],
        "configs/none.py cannot be loaded (No such file or directory); accepted: a Python file",
    ),
    "unknown flag": (["--config=configs/digits.py", "--wrkdir=w"], "wrkdir"),
    "unknown field": (
        ["--config=configs/digits.py", "--workdir=w", "--config.n_clutsers=3"],
        "config has no field 'n_clutsers'; accepted: augmentation, ",
    ),
    "wrong type": (
        ["--config=configs/digits.py", "--workdir=w", "--config.n_clusters=ten"],
        "config.n_clusters is 'ten'; accepted: an integer of at least 1",
    ),
    "another method, which keeps what is named": (
        [
            "--config=configs/digits.py",
            "--workdir=w",
            "--config.objective.name=n2d",
            "--config.training.n_epochs=3",
        ],
        "config.training.n_epochs is 3, but the network of n2d is only pretrained",
    ),
    "a field of another method, in two words": (
        [
            "--config=configs/digits.py",
            "--workdir=w",
            "--config.objective.name",
            "idec",
            "--config.objective.cluster_weight=-1",
        ],
        "config.objective.cluster_weight is -1.0; accepted:",
    ),
    "a field of the file's method, with another": (
        [
            "--config=configs/digits.py",
            "--workdir=w",
            "--config.objective.centroid_weight=1",
            "--config.objective.name=idec",
        ],
        "config.objective has no field 'centroid_weight'; accepted: cluster_weight, name",
    ),
    "another method in a file of flags": (
        [
            "--config=configs/digits.py",
            "--workdir=w",
            "--flagfile=of_idec",
            "--config.objective.cluster_weight=-1",
        ],
        "config.objective.cluster_weight is -1.0; accepted:",
    ),
    "seconds that nobody waits": (
        ["--config=configs/digits.py", "--workdir=w", "--join_seconds=10000001"],
        "--join_seconds",
    ),
    "a config without a name": (["--config=", "--workdir=w"], "--config"),
    "a config that opens a file": (
        ["--config=opens.py", "--workdir=w"],
        "--config opens.py cannot be loaded (FileNotFoundError: [Errno 2] No such file or "
        "directory: 'nowhere.txt')",
    ),
    "a field of a value": (
        ["--config=configs/digits.py", "--workdir=w", "--config.seed.x=1"],
        "config.seed is a value, without a field 'x'",
    ),
    "bad value": (
        ["--config=configs/digits.py", "--workdir=w", "--config.n_clusters=0"],
        "config.n_clusters is 0; accepted: an integer of at least 1",
    ),
    "devices": (
        ["--config=configs/digits.py", "--workdir=w", "--config.n_devices=3"],
        "n_devices is 3, but JAX sees 1 (cpu)",
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c == "devices" else c for c in BAD]
)
def test_bad_command_lines(case, tmp_path):
    (tmp_path / "of_idec").write_text("--config.objective.name=idec\n")
    (tmp_path / "opens.py").write_text("def get_config():\n    open('nowhere.txt')\n")
    arguments, sentence = BAD[case]
    arguments = [a.replace("--config=configs", f"--config={ROOT}/configs") for a in arguments]
    done = run("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_help_tells_of_the_fields_of_a_config(tmp_path):
    config = f"--config={ROOT}/configs/digits.py"
    changes = ("--config.objective.name=idec", "--help", "--config.seed=7")
    done = run("train", config, *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"fields of {ROOT}/configs/digits.py (" in done.stdout
    assert "objective.cluster_weight = 0.1" in done.stdout
    assert "seed = 7\n" in done.stdout  # What the command line says, wherever it says so.
    assert "γ, of the divergence; a number of at least 0" in done.stdout
    assert "whether a run ends with report/*.png and report.html; True or False" in done.stdout


def test_ctrl_c_while_the_config_is_loaded(tmp_path):
    """Which imports much of the project; imports of compiled modules swallow exceptions."""
    (tmp_path / "slow.py").write_text(
        "import contextlib, time\nprint('here', flush=True)\n"
        "with contextlib.suppress(BaseException):\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "experiments.train", "--config=slow.py", "--workdir=w"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "train: stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--config.data.path={files}/nan.npy"], "NaN or infinity in 2 of 203 rows"),
        (["--config.n_clusters=500"], "n_clusters is 500, but there are 203 examples"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--config.data.path={files}/none.npy"], "none.npy"),
                (["--config.data.labels_path={files}/short.npy"], "202"),
                (["--config.network.name=nowhere:network"], "importing nowhere failed"),
            )
        ),
    ],
)
def test_bad_data(changes, sentence, files, tmp_path):
    changes = [change.format(files=files) for change in changes]
    done = run("train", *train_flags(files, tmp_path / "w"), *changes)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "w").exists()


def test_predict_with_a_wrong_shape_keeps_the_old_output(files, workdir, tmp_path):
    output = tmp_path / "clusters.npz"
    output.write_bytes(b"precious")
    done = run(
        "predict", "--workdir", str(workdir), "--input", str(files / "wide.npy"),
        "--output", str(output),
    )  # fmt: skip
    assert done.returncode == 2
    assert "shape [5, 13]" in done.stderr
    assert "[n, 12]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert output.read_bytes() == b"precious"


def test_predict_for_a_folder_names_damaged_files_and_does_the_others(files, workdir, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("x.npy", "wide.npy", "nan.npy"):
        (folder / name).write_bytes((files / name).read_bytes())
    done = run(
        "predict", "--workdir", str(workdir), "--input", str(folder), "--output",
        str(tmp_path / "found"), "--embeddings",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("predict: 2 of 3 files could not be used, the other 1 are done: nan.npy")
    assert "wide.npy is of shape [5, 13]; accepted: [n, 12]" in last
    with np.load(tmp_path / "found" / "parts" / "x.npy.000000000000.npz") as arrays:
        assert len(arrays["labels"]) == len(arrays["embeddings"]) == tiny.N_EXAMPLES


@pytest.mark.slow
def test_evaluate_without_a_run(tmp_path):
    done = run("evaluate", "--workdir", str(tmp_path))
    assert done.returncode == 2
    assert "holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["train", "evaluate", "predict"])
def test_help_shows_the_command(program):
    done = run(program, "--help")
    assert done.returncode == 0
    assert f"python -m experiments.{program}" in done.stdout
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    "error", ["MemoryError('512 GiB')", "RuntimeError('RESOURCE_EXHAUSTED: 512 GiB')"]
)
def test_what_does_not_fit_is_said_in_one_sentence(error):
    text = f"""
from experiments.launcher import launch
def main(): raise {error}
launch(main, required=(), argv=["job"])
"""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "there is not so much memory" in done.stderr
    assert "512 GiB" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["cluster", "train"])
def test_help_that_nobody_reads_to_its_end(program):
    command = [sys.executable, "-m", f"experiments.{program}", "--help"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
