import gzip
import hashlib
import os
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pooch
import pytest
import requests
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from jkmeans import datasets, named_data
from jkmeans.errors import UserError

FILES = {
    "train-images-idx3-ubyte.gz": (6, 28, 28),
    "train-labels-idx1-ubyte.gz": (6,),
    "t10k-images-idx3-ubyte.gz": (4, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (4,),
}
IMAGES = "train-images-idx3-ubyte.gz"


def _contents(file):
    """The array of a tiny stand-in for a file of MNIST; different in each file."""
    shape = FILES[file]
    start = list(FILES).index(file)
    return (np.arange(np.prod(shape)) * 7 + start).astype(np.uint8).reshape(shape)


def _idx(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def _write(folder, name="mnist", files=FILES):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / name / file).write_bytes(gzip.compress(_idx(_contents(file))))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for $JKMEANS_DATA and the cache, and checksums that fit the tiny files."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    monkeypatch.setenv("JKMEANS_DATA", str(data))
    monkeypatch.setenv("JKMEANS_CACHE", str(cache))
    for name in ("mnist", "fashion-mnist"):
        for file in FILES:
            md5 = hashlib.md5(_idx(_contents(file))).hexdigest()
            monkeypatch.setitem(named_data.MD5[name], file, md5)
    return data, cache


@pytest.fixture
def internet(monkeypatch):
    """A stand-in for pooch's downloader: what it serves by file, and the addresses asked for."""

    class Internet:
        def __init__(self):
            self.asked = []
            self.served = {file: gzip.compress(_idx(_contents(file))) for file in FILES}
            self.broken_mirrors = ()

        def __call__(self, url, output_file, _):
            self.asked.append(url)
            mirror, file = url.rsplit("/", 1)
            content = self.served.get(file)
            if content is None or mirror + "/" in self.broken_mirrors:
                with open(output_file, "wb") as part:
                    part.write(b"half of")
                raise requests.ConnectionError("no route to host")
            with open(output_file, "wb") as part:
                part.write(content)

    internet = Internet()
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **_: internet)
    return internet


def _real(name):
    """Skip unless the original files of the set are on this machine."""
    if any(named_data._find(name, file) is None for file in FILES):
        pytest.skip(f"{name} is neither in $JKMEANS_DATA nor in the cache")


class TestDigits:
    def test_what_scikit_learn_ships(self):
        digits = datasets.load("digits")
        assert digits.name == "digits"
        assert digits.examples.shape == (1797, 8, 8)
        assert digits.examples.dtype == np.uint8
        assert digits.examples.flags.c_contiguous
        assert digits.scale == 1 / 16
        assert digits.labels.dtype == np.int32
        assert (digits.n_examples, digits.example_shape) == (1797, (8, 8))
        original = load_digits()
        np.testing.assert_array_equal(digits.examples, original.images)
        np.testing.assert_array_equal(digits.labels, original.target)

    def test_first_so_many(self):
        few, everything = datasets.load("digits", n_examples=100), datasets.load("digits")
        np.testing.assert_array_equal(few.examples, everything.examples[:100])
        np.testing.assert_array_equal(few.labels, everything.labels[:100])
        assert datasets.load("digits", n_examples=1797).n_examples == 1797


class TestOriginals:
    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
    def test_counts(self, name):
        _real(name)
        whole = datasets.load(name)
        assert whole.examples.shape == (70_000, 28, 28)
        assert whole.examples.dtype == np.uint8
        assert whole.examples.flags.c_contiguous
        assert (whole.examples.min(), whole.examples.max()) == (0, 255)
        assert whole.scale == 1 / 255
        assert whole.labels.shape == (70_000,)
        assert whole.labels.dtype == np.int32
        test = datasets.load(name, split="test")
        assert test.n_examples == 10_000
        np.testing.assert_array_equal(whole.examples[60_000:], test.examples)
        np.testing.assert_array_equal(whole.labels[60_000:], test.labels)
        np.testing.assert_array_equal(np.unique(whole.labels), np.arange(10))

    def test_known_class_counts(self):
        # From the papers: MNIST's are uneven, Fashion-MNIST has 6,000 and 1,000 of each class.
        _real("mnist")
        _real("fashion-mnist")
        train = datasets.load("mnist", split="train")
        assert np.bincount(train.labels).tolist() == [
            *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
        ]
        np.testing.assert_array_equal(train.labels[:5], [5, 0, 4, 1, 9])
        fashion = datasets.load("fashion-mnist")
        assert np.bincount(fashion.labels).tolist() == [7000] * 10

    def test_the_checksum_is_that_of_the_set(self, tmp_path, monkeypatch):
        # One set's files in the other's folder have the right form and the wrong content.
        _real("fashion-mnist")
        source = named_data._find("fashion-mnist", "t10k-labels-idx1-ubyte.gz").parent
        (tmp_path / "mnist").symlink_to(source)
        monkeypatch.setenv("JKMEANS_DATA", str(tmp_path))
        with pytest.raises(UserError, match="has the checksum 8181f5470baa50b63fa0f6fddb340f0a"):
            datasets.load("mnist", split="test")


class TestWhereFilesComeFrom:
    def test_splits(self, places, internet):
        data, _ = places
        _write(data)
        images = [_contents(file) for file in FILES if "images" in file]
        labels = [_contents(file) for file in FILES if "labels" in file]
        for split, parts in (("all", (0, 1)), ("train", (0,)), ("test", (1,))):
            loaded = datasets.load("mnist", split=split)
            np.testing.assert_array_equal(
                loaded.examples, np.concatenate([images[i] for i in parts])
            )
            np.testing.assert_array_equal(loaded.labels, np.concatenate([labels[i] for i in parts]))
        assert internet.asked == []

    def test_the_data_folder_goes_before_the_cache(self, places, internet):
        data, cache = places
        _write(data)
        _write(cache)
        (cache / "mnist" / IMAGES).write_bytes(b"must not be read")
        assert datasets.load("mnist").n_examples == 10
        assert internet.asked == []

    def test_the_cache_fills_in_for_the_data_folder_file_by_file(self, places, internet):
        data, cache = places
        _write(cache)
        _write(data, files=[IMAGES])
        assert datasets.load("mnist").n_examples == 10
        assert internet.asked == []

    @pytest.mark.parametrize("value", [None, ""])
    def test_without_a_data_folder(self, places, internet, monkeypatch, tmp_path, value):
        _, cache = places
        # Unset does not mean the current folder.
        (tmp_path / "mnist").mkdir()
        (tmp_path / "mnist" / IMAGES).write_bytes(b"must not be read")
        monkeypatch.chdir(tmp_path)
        if value is None:
            monkeypatch.delenv("JKMEANS_DATA")
        else:
            monkeypatch.setenv("JKMEANS_DATA", value)
        _write(cache)
        assert datasets.load("mnist").n_examples == 10
        assert internet.asked == []

    def test_the_cache_is_the_users_unless_set(self, places, monkeypatch, tmp_path):
        monkeypatch.setattr(pooch, "os_cache", lambda project: str(tmp_path / "home" / project))
        monkeypatch.delenv("JKMEANS_CACHE")
        _write(tmp_path / "home" / "jkmeans")
        assert datasets.load("mnist").n_examples == 10

    def test_a_split_needs_only_its_own_files(self, places, internet):
        data, _ = places
        _write(data, files=[file for file in FILES if "t10k" in file])
        assert datasets.load("mnist", split="test").n_examples == 4
        assert internet.asked == []

    def test_what_is_missing_is_downloaded_into_the_cache_once(self, places, internet):
        data, cache = places
        _write(data, name="fashion-mnist", files=[IMAGES])
        assert datasets.load("fashion-mnist").n_examples == 10
        assert sorted(os.listdir(cache / "fashion-mnist")) == sorted(set(FILES) - {IMAGES})
        assert [url.rsplit("/", 1)[1] for url in internet.asked] == [
            file for file in FILES if file != IMAGES
        ]
        assert all(url.startswith("https://") for url in internet.asked)
        datasets.load("fashion-mnist")
        assert len(internet.asked) == 3

    def test_the_next_mirror_is_asked_when_one_fails(self, places, internet):
        first, second = named_data._MIRRORS["mnist"]
        internet.broken_mirrors = (first,)
        assert datasets.load("mnist", split="test").n_examples == 4
        assert sum(url.startswith(second) for url in internet.asked) == 2

    @pytest.mark.parametrize(
        ("served", "reason"),
        [
            (None, "ConnectionError"),
            (b"<html>please log in</html>", "not the file expected"),
            (gzip.compress(_idx(_contents(IMAGES)))[:-20], "not the file expected"),
            (gzip.compress(_idx(_contents(IMAGES) + 1)), "not the file expected"),
        ],
        ids=["offline", "page", "truncated", "changed"],
    )
    def test_a_failed_download_leaves_nothing_and_says_what_to_do(
        self, places, internet, served, reason
    ):
        data, cache = places
        internet.served[IMAGES] = served
        _write(data, files=["t10k-images-idx3-ubyte.gz"])
        with pytest.raises(UserError) as caught:
            datasets.load("mnist")
        message = str(caught.value)
        assert reason in message
        assert (
            f"put {IMAGES}, train-labels-idx1-ubyte.gz, t10k-labels-idx1-ubyte.gz "
            f"into {cache / 'mnist'} or {data / 'mnist'}."
        ) in message
        assert "\n" not in message
        assert os.listdir(cache / "mnist") == []
        assert len(internet.asked) == len(named_data._MIRRORS["mnist"])

    def test_an_interrupted_download_leaves_nothing(self, places, internet):
        _, cache = places

        def interrupt(url, output_file, _):
            with open(output_file, "wb") as part:
                part.write(b"half of")
            raise KeyboardInterrupt

        internet.__class__.__call__ = lambda self, *arguments: interrupt(*arguments)
        with pytest.raises(KeyboardInterrupt):
            datasets.load("mnist")
        assert os.listdir(cache / "mnist") == []

    def test_a_download_appears_under_its_name_in_one_step(self, places, internet, monkeypatch):
        _, cache = places

        def refuse(source, target):
            assert os.path.dirname(os.path.dirname(source)) == os.path.dirname(target)
            raise OSError("no rename today")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match="no rename today"):
            datasets.load("mnist")
        assert os.listdir(cache / "mnist") == []

    def test_a_cache_that_cannot_be_made(self, places, internet, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("JKMEANS_CACHE", str(tmp_path / "file"))
        with pytest.raises(UserError, match=r"could not be downloaded .*Not a directory"):
            datasets.load("mnist")


class TestDamagedFiles:
    @pytest.mark.parametrize("place", [0, 1], ids=["data", "cache"])
    def test_wrong_checksum(self, places, place):
        folder = places[place]
        _write(folder)
        changed = _idx(_contents(IMAGES) + 1)
        (folder / "mnist" / IMAGES).write_bytes(gzip.compress(changed))
        with pytest.raises(UserError) as caught:
            datasets.load("mnist")
        message = str(caught.value)
        assert str(folder / "mnist" / IMAGES) in message
        assert hashlib.md5(changed).hexdigest() in message
        assert hashlib.md5(_idx(_contents(IMAGES))).hexdigest() in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (gzip.compress(_idx(_contents(IMAGES)))[:-20], "is truncated or damaged"),
            (gzip.compress(b"x" * 9999)[:14] + b"\xff" * 50, "is truncated or damaged"),
            (b"not gzip at all", "is truncated or damaged"),
            (b"", "starts with the bytes \\(none\\); accepted: 00000803"),
            (gzip.compress(b""), "starts with the bytes \\(none\\)"),
            (gzip.compress(_idx(_contents(IMAGES))[:10]), "starts with the bytes .*00000803"),
            (gzip.compress(_idx(_contents(IMAGES)[0, 0])), "starts with the bytes 00000801"),
            (
                gzip.compress(_idx(_contents(IMAGES))[:-1]),
                "holds 4,719 bytes after unpacking; accepted: 4,720",
            ),
            (gzip.compress(_idx(_contents(IMAGES)) + b"\0"), "holds 4,721 bytes"),
        ],
        ids=[
            *("cut .gz", "bad deflate", "no gzip", "empty", "empty .gz"),
            *("short header", "wrong magic", "short", "long"),
        ],
    )
    def test_damaged(self, places, content, message):
        data, _ = places
        _write(data)
        (data / "mnist" / IMAGES).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            datasets.load("mnist")
        assert str(data / "mnist" / IMAGES) in str(caught.value)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "cifar"}, "called 'cifar'; accepted: digits, mnist, fashion-mnist, npy"),
            ({"name": "digits", "split": "valid"}, "called 'valid'; accepted: all, train, test"),
            ({"name": "digits", "split": "train"}, "'digits' has no split 'train'.*'all'"),
            ({"name": "npy", "split": "test", "path": "x.npy"}, "'npy' has no split 'test'"),
            ({"name": "npy"}, "'npy' needs a path"),
            ({"name": "digits", "path": "x.npy"}, "path 'x.npy' cannot be used with .*'digits'"),
            ({"name": "mnist", "labels_path": "y.npy"}, "labels_path 'y.npy' cannot be used"),
            ({"name": "digits", "n_examples": -1}, "n_examples is -1; accepted:"),
            ({"name": "digits", "n_examples": 1.5}, "n_examples is 1.5; accepted:"),
            (
                {"name": "digits", "n_examples": 1798},
                "n_examples is 1,798, but digits has 1,797 examples",
            ),
        ],
    )
    def test_bad(self, arguments, message):
        with pytest.raises(UserError, match=message):
            datasets.load(**arguments)


class TestNpy:
    def _save(self, folder, array, file="x.npy"):
        np.save(folder / file, array)
        return str(folder / file)

    @pytest.mark.parametrize("dtype", datasets.DTYPES)
    def test_stays_a_memory_map_of_its_own_type(self, tmp_path, dtype):
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        array = (np.arange(24) % 2).reshape(4, 3, 2).astype(dtype)
        loaded = datasets.load("npy", path=self._save(tmp_path, array))
        assert isinstance(loaded.examples, np.memmap)
        assert not loaded.examples.flags.writeable
        assert loaded.examples.dtype == dtype
        assert (loaded.name, loaded.scale, loaded.labels) == ("npy", 1.0, None)
        assert (loaded.n_examples, loaded.example_shape) == (4, (3, 2))
        np.testing.assert_array_equal(loaded.examples, array)

    def test_labels_and_first_so_many(self, tmp_path):
        array = np.arange(12.0).reshape(6, 2)
        array[4] = np.nan  # beyond what is taken
        labels = np.array([3, -1, 2, 2, 5, 0], dtype=np.int64)
        arguments = {
            "path": self._save(tmp_path, array),
            "labels_path": self._save(tmp_path, labels, "y.npy"),
        }
        loaded = datasets.load("npy", n_examples=4, **arguments)
        assert isinstance(loaded.examples, np.memmap)
        np.testing.assert_array_equal(loaded.examples, array[:4])
        assert loaded.labels.dtype == np.int32
        np.testing.assert_array_equal(loaded.labels, labels[:4])
        with pytest.raises(UserError, match=r"x\.npy has NaN or infinity in 1 of 6 rows"):
            datasets.load("npy", **arguments)
        with pytest.raises(UserError, match=r"x\.npy has 6 examples"):
            datasets.load("npy", n_examples=7, **arguments)

    @pytest.mark.parametrize("array", [np.asfortranarray(np.eye(4, 3)), np.eye(4, 3, dtype=">f4")])
    def test_fortran_order_and_foreign_byte_order_are_converted(self, tmp_path, array):
        loaded = datasets.load("npy", path=self._save(tmp_path, array)).examples
        assert loaded.flags.c_contiguous
        assert loaded.dtype.isnative
        assert loaded.dtype.itemsize == array.itemsize
        np.testing.assert_array_equal(loaded, np.eye(4, 3))

    def test_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        self._save(tmp_path, np.eye(3))
        assert datasets.load("npy", path="~/x.npy").n_examples == 3

    @pytest.mark.parametrize("argument", ["path", "labels_path"])
    @pytest.mark.parametrize("kept", [0, 5, 60, 150])
    def test_truncated(self, tmp_path, argument, kept):
        paths = {
            "path": self._save(tmp_path, np.eye(100)),
            "labels_path": self._save(tmp_path, np.arange(100), "y.npy"),
        }
        os.truncate(paths[argument], kept)
        with pytest.raises(UserError, match=r"is not a \.npy file, or is truncated") as caught:
            datasets.load("npy", **paths)
        assert paths[argument] in str(caught.value)

    def test_not_a_npy_file(self, tmp_path):
        np.savez(tmp_path / "x.npz", x=np.eye(3))
        (tmp_path / "x.csv").write_text("1,2\n3,4\n" * 99)
        # A header that names no dtype NumPy knows.
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00\x14\x00{'descr': 'nothing'}")
        for file in ("x.npz", "x.csv", "x.npy"):
            with pytest.raises(UserError, match=r"is not a \.npy file"):
                datasets.load("npy", path=str(tmp_path / file))

    def test_missing_and_unreadable(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*x\.npy \(No such file"):
            datasets.load("npy", path=str(tmp_path / "x.npy"))
        with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
            datasets.load("npy", path=str(tmp_path))

    def test_objects_are_never_unpickled(self, tmp_path):
        path = self._save(tmp_path, np.array([[{}], [1]], dtype=object))
        with pytest.raises(UserError, match=r"x\.npy is of dtype object; accepted: float16"):
            datasets.load("npy", path=path)

    def test_no_rows(self, tmp_path):
        path = self._save(tmp_path, np.zeros((0, 4)))
        with pytest.raises(UserError, match=r"of shape \[0, 4\], which holds no data"):
            datasets.load("npy", path=path)


def _from_arrays(array, name):
    return datasets.from_arrays(array, name=name).examples


def _check_examples(array, name):
    return datasets.check_examples(array, name=name)


@pytest.mark.parametrize("check", [_from_arrays, _check_examples])
class TestChecksOnExamples:
    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 2), complex), "mine is of dtype complex128; accepted: float16"),
            (np.array([["a", "b"]]), "mine is of dtype <U1"),
            (np.zeros((2, 2), object), "mine is of dtype object"),
            (np.zeros((2, 2), np.uint64), "mine is of dtype uint64"),
            (np.zeros((2, 2), np.longdouble), "mine is of dtype"),
            (np.zeros((2, 2), "datetime64[s]"), "mine is of dtype datetime64"),
            (np.zeros((2, 2), [("a", "f4")]), "mine is of dtype"),
            (np.float32(3), r"mine is of shape \[\]; accepted: \[n, ...\]"),
            (np.zeros(5), r"mine is of shape \[5\]; accepted: \[n, ...\]"),
            (np.zeros((0, 5)), r"mine is of shape \[0, 5\], which holds no data"),
            (np.zeros((5, 0)), r"mine is of shape \[5, 0\], which holds no data"),
            (np.zeros((5, 3, 0)), r"mine is of shape \[5, 3, 0\], which holds no data"),
            ([[1, 2], [3]], "mine cannot be read as an array"),
            (scipy.sparse.eye_array(3, format="csr"), "mine is a sparse matrix"),
            (np.ma.masked_equal(np.eye(3), 0), "mine is a masked array"),
        ],
    )
    def test_bad(self, check, array, message):
        with pytest.raises(UserError, match=message):
            check(array, "mine")

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**22])
    def test_not_finite(self, check, dtype, value, chunk_bytes, monkeypatch):
        monkeypatch.setattr(datasets, "_CHUNK_BYTES", chunk_bytes)
        array = np.ones((1000, 3, 2), getattr(ml_dtypes, dtype, dtype))
        array[[17, 400, 999], [2, 0, 1], [1, 0, 0]] = value
        array[17, 0, 0] = value
        with pytest.raises(
            UserError,
            match=r"mine has NaN or infinity in 3 of 1,000 rows, the first is row 17 \(counted",
        ):
            check(array, "mine")

    @pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**22])
    def test_overflow_of_float32(self, check, chunk_bytes, monkeypatch):
        monkeypatch.setattr(datasets, "_CHUNK_BYTES", chunk_bytes)
        array = np.ones((1000, 3))
        array[[5, 900], [1, 2]] = 1e39, -1e300
        with pytest.raises(
            UserError,
            match=r"overflow float32 in 2 of 1,000 rows, the first is row 5 .*3\.4e\+38",
        ):
            check(array, "mine")
        array[700] = np.nan
        with pytest.raises(UserError, match=r"NaN or infinity in 1 of 1,000 rows, .* row 700"):
            check(array, "mine")

    def test_the_largest_float32_is_accepted(self, check):
        array = np.full((2, 2), np.finfo(np.float32).max, dtype=np.float64)
        assert check(array, "mine") is array
        assert check(np.full((2, 2), 1e-320), "mine") is not None

    @pytest.mark.parametrize("dtype", datasets.DTYPES)
    def test_accepted_and_not_copied(self, check, dtype):
        array = np.ones((3, 2), getattr(ml_dtypes, dtype, dtype))
        assert check(array, "mine") is array

    def test_lists_and_views_become_arrays_in_c_order(self, check):
        array = np.arange(12.0).reshape(3, 4)
        checked = check(array.T, "mine")
        assert checked.flags.c_contiguous
        np.testing.assert_array_equal(checked, array.T)
        np.testing.assert_array_equal(check(array.tolist(), "mine"), array)
        swapped = check(array.astype(">f8"), "mine")
        assert swapped.dtype.isnative
        np.testing.assert_array_equal(swapped, array)


@given(
    n=st.integers(1, 30),
    width=st.integers(1, 5),
    chunk_bytes=st.integers(1, 200),
    bad=st.sets(st.integers(0, 29)),
)
def test_the_scan_finds_each_bad_row_whatever_the_chunks(n, width, chunk_bytes, bad):
    bad = sorted(row for row in bad if row < n)
    array = np.ones((n, width), np.float32)
    array[bad, [row % width for row in bad]] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "_CHUNK_BYTES", chunk_bytes)
        if not bad:
            assert datasets.check_examples(array) is array
            return
        with pytest.raises(
            UserError, match=f"in {len(bad)} of {n} rows, the first is row {bad[0]} "
        ):
            datasets.check_examples(array)


def test_the_scan_takes_little_memory():
    array = np.zeros((2**21, 2))  # 32 MiB, and 16 MiB as float32
    tracemalloc.start()
    datasets.check_examples(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_integers_are_not_scanned():
    class Unreadable(np.ndarray):
        def __getitem__(self, _):
            raise AssertionError("the data was read")

    array = np.zeros((5, 2), np.uint8).view(Unreadable)
    datasets._check_values(array, 1 / 255, "input")
    with pytest.raises(AssertionError):
        datasets._check_values(array, 2.0, "input")


class TestFromArrays:
    def test_defaults(self):
        array = np.eye(3, dtype=np.float32)
        made = datasets.from_arrays(array)
        assert (made.name, made.scale, made.labels) == ("array", 1.0, None)
        assert made.examples is array

    def test_memory_maps_stay_so(self, tmp_path):
        np.save(tmp_path / "x.npy", np.eye(3))
        array = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert isinstance(datasets.from_arrays(array).examples, np.memmap)

    @pytest.mark.parametrize("labels", [[-(2**31), 0, 2**31 - 1], np.array([0, 5, 255], np.uint8)])
    def test_labels(self, labels):
        made = datasets.from_arrays(np.eye(3), labels)
        assert made.labels.dtype == np.int32
        np.testing.assert_array_equal(made.labels, labels)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 1], "labels of mine has 2 entries for 3 examples"),
            ([0, 1, 2, 3], "labels of mine has 4 entries for 3 examples"),
            ([], "labels of mine is of dtype float64"),
            (np.zeros(0, int), "labels of mine has 0 entries for 3 examples"),
            ([0.0, 1.0, 2.0], "labels of mine is of dtype float64; accepted: integers"),
            ([True, False, True], "labels of mine is of dtype bool"),
            (["a", "b", "c"], "labels of mine is of dtype <U1"),
            ([[0], [1], [2]], r"labels of mine is of shape \[3, 1\]; accepted: \[3\]"),
            (5, r"labels of mine is of shape \[\]"),
            ([[0, 1], [2], [3]], "labels of mine cannot be read as an array"),
            ([0, 1, 2**31], "labels of mine has values from 0 to 2,147,483,648"),
            ([0, 1, -(2**31) - 1], "labels of mine has values from -2,147,483,649 to 1"),
        ],
    )
    def test_bad_labels(self, labels, message):
        with pytest.raises(UserError, match=message):
            datasets.from_arrays(np.eye(3), labels, name="mine")

    @pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, 1e39, 1e-60, "large", None])
    def test_bad_scale(self, scale):
        with pytest.raises(UserError, match=r"the scale of mine is .*; accepted: a finite"):
            datasets.from_arrays(np.eye(3), name="mine", scale=scale)

    @pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
    def test_overflow_by_the_scale(self, dtype):
        array = np.ones((4, 2), dtype)
        array[2] = 1000
        assert datasets.from_arrays(array, scale=1e35).scale == 1e35
        with pytest.raises(UserError, match=r"float32 when scaled by 1e\+36 in 1 of 4 .* row 2 "):
            datasets.from_arrays(array, scale=1e36)


class TestExpectedShape:
    def test_both_shapes_are_named(self):
        with pytest.raises(UserError, match=r"pixels is of shape \[5, 784\]; .* \[n, 28, 28\]"):
            datasets.check_examples(np.zeros((5, 784)), expected_shape=(28, 28), name="pixels")

    @pytest.mark.parametrize("shape", [(28, 28), (5, 28, 27), (5, 28, 28, 1), (28,)])
    def test_refused(self, shape):
        with pytest.raises(UserError, match=r"input is of shape .*; accepted: \[n, 28, 28\]"):
            datasets.check_examples(np.zeros(shape), expected_shape=[28, 28])

    def test_accepted(self):
        array = np.zeros((5, 28, 28), np.uint8)
        assert datasets.check_examples(array, expected_shape=[28, 28]) is array


def test_a_dataset_cannot_be_changed():
    made = datasets.from_arrays(np.eye(3))
    with pytest.raises(AttributeError):
        made.scale = 2.0


def test_the_import_is_light():
    heavy = "{'pooch', 'requests', 'sklearn', 'scipy', 'jax', 'matplotlib'}"
    code = f"import sys, jkmeans.datasets; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("examples", "scale", "expected"),
    [
        (np.array([[3, 250]], np.uint8), 1 / 255, (0.0, 1.0)),  # Of the type: nothing is read.
        (np.array([[1, 0]], np.uint8), 1.0, (0.0, 1.0)),  # Of the values.
        (np.array([[1, 0]], bool), 0.5, (0.0, 0.5)),
        (np.array([[-3, 7]], np.int16), 0.5, (-1.5, 3.5)),
        (np.linspace(-2, 5, 35).reshape(7, 5), 2.0, (-4.0, 10.0)),
    ],
)
def test_range_of_values(examples, scale, expected, monkeypatch):
    monkeypatch.setattr(datasets, "_CHUNK_BYTES", 80)  # Two rows of five float64.
    data = datasets.Dataset("x", examples, scale, None)
    assert data.value_range() == pytest.approx(expected)
    parts = [data.value_range((i, 3)) for i in range(3)]
    read = [part for part in parts if part != (0.0, 0.0)]
    whole = min(low for low, _ in read), max(high for _, high in read)
    assert whole == pytest.approx(expected)
