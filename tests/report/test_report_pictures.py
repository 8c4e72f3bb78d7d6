import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from jkmeans.report.examples import NEAREST
from jkmeans.report.pictures import PICTURES, write_report
from tests import tiny
from tests.reports import DEGENERATE, IN_PICTURES, CountedRows, history, run


def check_pictures(paths, folder, names):
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        pixels = imread(path)[..., :3]
        height, width = pixels.shape[:2]
        assert 300 <= height <= 3500
        assert 500 <= width <= 3500
        assert pixels.std() > 0.02, f"{path.name} is blank"


def test_all_pictures(tmp_path):
    arguments = run()
    class_names = ["T-shirt", r"$\bag$", "boot", "coat"]
    paths = write_report(tmp_path / "report", **arguments, class_names=class_names, title="t")
    check_pictures(paths, tmp_path / "report", PICTURES)
    # The summary is wide, for the top of a page.
    height, width = imread(paths[-1]).shape[:2]
    assert width > 2 * height


def test_names_that_are_no_utf8(tmp_path):
    arguments = run(n=40, k=2, p=2)
    name = b"caf\xe9.npy".decode(errors="surrogateescape")
    write_report(tmp_path, **arguments, class_names=[name] * 4, title=name)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(PICTURES)


def test_vectors_without_truth(tmp_path):
    arguments = run(shape=(6,)) | {"truth": None, "metrics": history(truth=False)}
    paths = write_report(tmp_path, **arguments)
    check_pictures(paths, tmp_path, ["curves", "map", "nearest", "sizes", "summary"])


@pytest.mark.slow
def test_500_clusters_of_colour_images(tmp_path):
    arguments = run(n=1000, k=500, p=2, shape=(4, 5, 3), dtype=np.uint8)
    paths = write_report(tmp_path, **arguments)
    check_pictures(paths, tmp_path, PICTURES)


@pytest.mark.parametrize("name", tiny.all_but_slow(DEGENERATE, *IN_PICTURES))
def test_degenerate_runs(tmp_path, name):
    arguments = DEGENERATE[name]()
    paths = write_report(tmp_path, **arguments)
    expected = [n for n in PICTURES if n != "curves" or arguments["metrics"]]
    assert [path.stem for path in paths] == expected
    for path in paths:
        assert min(imread(path).shape[:2]) >= 300


def test_report_reads_only_the_examples_it_shows(tmp_path):
    arguments = run(n=400, k=4, p=2)

    examples = CountedRows(arguments["examples"])
    write_report(tmp_path, **arguments | {"examples": examples})
    assert 0 < examples.read <= 2 * 4 * NEAREST  # in nearest.png and in summary.png


def test_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    old = tmp_path / "curves.png"
    old.write_bytes(b"old")

    def fail(self, file, **kwargs):
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, **run(n=20, p=2))
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


def test_picture_that_no_longer_applies_is_removed(tmp_path):
    for name in ("confusion.png", "curves.png", "notes.png"):
        (tmp_path / name).write_bytes(b"old")
    write_report(tmp_path, **run(n=20, p=2) | {"truth": None, "metrics": []})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"map.png", "nearest.png", "sizes.png", "summary.png", "notes.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": np.zeros(3)}, "distances has 3 rows, but there are 120 labels"),
        ({"labels": np.full(120, 4)}, "integers from 0 to 3"),
        ({"labels": np.full(120, -1)}, "integers from 0 to 3"),
        ({"labels": np.zeros(120)}, "integers from 0 to 3"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report", **run() | change)
    assert not (tmp_path / "report").exists()


def test_no_global_state(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from jkmeans.report import write_report\n"
        "x = np.arange(8.0).reshape(4, 2)\n"
        f"write_report({str(tmp_path)!r}, metrics=[], embeddings=x, labels=np.array([0, 0, 1, 1]),"
        " distances=np.zeros(4), centroids=x[::2], examples=x)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
