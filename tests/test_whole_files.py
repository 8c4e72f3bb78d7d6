"""Files are there when they are whole, or as they were."""

import contextlib
import json
import os

import numpy as np
import pytest

from jkmeans.whole_files import (
    UNREADABLE,
    read_arrays,
    remove_leftovers,
    whole_file,
    write_array,
    write_arrays,
    write_json,
    write_whole,
)


def test_a_file_keeps_what_it_had_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def fail_half_way(path):
        with whole_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "values.json"
    values = {"a": float("nan"), "b": [np.float32(0.5), -np.inf], "c": np.int64(3), "d": tmp_path}
    expected = {"a": None, "b": [0.5, None], "c": 3, "d": str(tmp_path)}
    assert write_json(path, values) == expected
    assert json.loads(path.read_text()) == expected


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 2), np.int8)}
    write_arrays(tmp_path / "arrays.npz", {**arrays, "text": "a text", "number": 3})
    found = read_arrays(tmp_path / "arrays.npz")
    assert set(found) == {*arrays, "text", "number"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert str(found["text"]) == "a text"
    assert int(found["number"]) == 3
    write_array(tmp_path / "array.npy", arrays["a/b"])
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), arrays["a/b"])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed", "an array", "a pickle"])
def test_what_reading_a_damaged_file_raises_is_named(tmp_path, damage):
    path = tmp_path / "arrays.npz"
    rng = np.random.default_rng(0)
    if damage != "missing":
        write_arrays(path, {"a": rng.normal(size=1000)})
    whole = path.read_bytes() if path.exists() else b""
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        path.write_bytes(whole[:4000] + b"!" + whole[4001:])
    elif damage == "an array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "a pickle":
        np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(UNREADABLE):
        read_arrays(path)


def test_every_byte_of_a_header_may_be_wrong(tmp_path):
    path = tmp_path / "arrays.npz"
    write_arrays(path, {"a": np.arange(3.0)})
    whole = path.read_bytes()
    for i in range(200):
        for byte in (0, 0x36, 0xFF):
            path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
            with contextlib.suppress(*UNREADABLE):
                read_arrays(path)


def test_what_a_kill_left_is_removed(tmp_path):
    with contextlib.suppress(ZeroDivisionError), whole_file(tmp_path / "labels.npy"):
        (left,) = tmp_path.iterdir()
        left.rename(tmp_path / "kept")
        raise ZeroDivisionError
    (tmp_path / "kept").rename(left)
    others = [".lock", ".hidden.txt", "labels.npy", ".labels.npy.12345678.x", "a.deadbeef"]
    for name in others:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        write_arrays(tmp_path / "arrays.npz", {"a": np.array([{}], dtype=object)})
    assert not os.listdir(tmp_path)
