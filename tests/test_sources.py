import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jkmeans.errors import UserError
from jkmeans.sources import base, open_source, open_weights

ROWS, FEATURES = 23, 3


@pytest.fixture
def rows():
    return np.arange(ROWS * FEATURES, dtype=np.float32).reshape(ROWS, FEATURES)


def read_in_pieces(source, size):
    out = np.zeros((source.n_rows, source.n_features), source.dtype)
    for start in range(0, source.n_rows, size):
        source.read_into(start, out[start : start + size])
    return out


def npy(folder, rows):
    np.save(folder / "x.npy", rows)
    return folder / "x.npy"


def memory_map(folder, rows):
    return np.load(npy(folder, rows), mmap_mode="r")


def view_of_memory_map(folder, rows):
    padded = np.concatenate([rows[:2] + 1, rows])
    return np.load(npy(folder, padded), mmap_mode="r")[2:]


def npy_by_column(folder, rows):
    return npy(folder, np.asfortranarray(rows))


def npy_of_foreign_byte_order(folder, rows):
    return npy(folder, rows.astype(">f4"))


def npy_folder(folder, rows):
    # In the order of the alphabet, part-10 would come before part-2.
    for number, part in zip((1, 2, 10), np.split(rows, [4, 11]), strict=True):
        np.save(folder / f"part-{number}.npy", part)
    return str(folder)


def mixed_list(folder, rows):
    return [rows[:5], npy(folder, rows[5:6]), jnp.asarray(rows[6:])]


def zarr_path(folder, rows):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(folder / "x.zarr"), shape=rows.shape, dtype="f4", chunks=(7, 2))
    array[:] = rows
    return folder / "x.zarr"


def zarr_array(folder, rows):
    import zarr

    return zarr.open(str(zarr_path(folder, rows)), mode="r")


def parquet_columns(folder, rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({f"f{i}": rows[:, i] for i in range(rows.shape[1])})
    parquet.write_table(table, folder / "x.parquet", row_group_size=6)
    return folder / "x.parquet"


def parquet_vectors(folder, rows, kind="fixed"):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    width = rows.shape[1] if kind == "fixed" else -1
    column = arrow.array(list(rows), arrow.list_(arrow.float32(), width))
    parquet.write_table(arrow.table({"v": column}), folder / "x.parquet", row_group_size=6)
    return folder / "x.parquet"


def parquet_lists(folder, rows):
    return parquet_vectors(folder, rows, "variable")


def parquet_folder(folder, rows):
    first = parquet_columns(folder, rows[:9])
    os.rename(first, folder / "2.parquet")
    os.rename(parquet_columns(folder, rows[9:]), folder / "10.parquet")
    return folder


KINDS = [
    npy,
    memory_map,
    view_of_memory_map,
    npy_by_column,
    npy_of_foreign_byte_order,
    npy_folder,
    mixed_list,
    zarr_path,
    zarr_array,
    parquet_columns,
    parquet_vectors,
    parquet_lists,
    parquet_folder,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_rows(kind, tmp_path, rows):
    source = open_source(kind(tmp_path, rows))
    assert (source.n_rows, source.n_features, source.dtype) == (ROWS, FEATURES, np.float32)
    for size in (1, 5, 6, ROWS):
        np.testing.assert_array_equal(read_in_pieces(source, size), rows)
    # Out of order, as a fit that goes on in the middle reads.
    np.testing.assert_array_equal(source.read(13, 17), rows[13:17])
    np.testing.assert_array_equal(source.read(2, 9), rows[2:9])
    assert source.fingerprint() == open_source(rows).fingerprint()


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "int8", "uint8", "int16", "int64", "bool"]
)
def test_every_dtype_survives_and_converts(dtype, tmp_path, rows):
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    np.save(tmp_path / "x.npy", rows.astype(dtype))
    source = open_source(str(tmp_path / "x.npy"))
    assert source.dtype == dtype
    np.testing.assert_array_equal(source.read(3, 9), rows.astype(dtype)[3:9])
    converted = np.empty((6, FEATURES), np.float32)
    source.read_into(3, converted)
    np.testing.assert_array_equal(converted, rows.astype(dtype).astype(np.float32)[3:9])


def test_conversion_in_pieces(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("jkmeans.sources.base.SCRATCH_BYTES", 4 * FEATURES * 8)
    monkeypatch.setattr("jkmeans.sources.npy.SCRATCH_BYTES", 40)
    for order in "CF":
        np.save(tmp_path / "x.npy", rows.astype(np.float64, order=order))
        out = np.empty((ROWS - 1, FEATURES), np.float32)
        open_source(tmp_path / "x.npy").read_into(1, out)
        np.testing.assert_array_equal(out, rows[1:])


def test_columns_of_parquet(tmp_path, rows):
    path = parquet_columns(tmp_path, rows)
    np.testing.assert_array_equal(
        open_source(path, columns=["f2", "f0"]).read(0, ROWS), rows[:, [2, 0]]
    )
    with pytest.raises(UserError, match="no column 'g': it has f0, f1, f2"):
        open_source(path, columns=["g"])
    with pytest.raises(UserError, match="only Parquet has columns"):
        open_source(npy(tmp_path, rows), columns=["f0"])


def test_the_index_of_a_data_frame_is_no_feature(tmp_path, rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    index = np.arange(len(rows))[::-1]
    columns = {"a": rows[:, 0], "b": rows[:, 1], "c": rows[:, 2], "__index_level_0__": index}
    # As pandas leaves it, which need not be here; a range that it has only described is no name.
    about = {"index_columns": ["__index_level_0__", {"kind": "range", "name": None}]}
    table = arrow.table(columns).replace_schema_metadata({"pandas": json.dumps(about)})
    parquet.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.n_features == 3
    np.testing.assert_array_equal(source.read(0, ROWS), rows)
    # Who asks for it has it.
    asked = open_source(tmp_path / "x.parquet", columns=["__index_level_0__"])
    np.testing.assert_array_equal(asked.read(0, ROWS)[:, 0], index)


def test_what_parquet_cannot_hold(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"

    def write(**columns):
        parquet.write_table(arrow.table(columns), path)

    write(name=["a", "b"], x=[1.0, 2.0])
    with pytest.raises(UserError, match=r"column 'name' .* is of type string"):
        open_source(path)
    write()
    with pytest.raises(UserError, match="no column is taken"):
        open_source(path)
    write(x=[1.0, 2.0], y=[1.0, 2.0])
    with pytest.raises(UserError, match=r"column 'x' .* more than once"):
        open_source(path, columns=["x", "x"])
    twice = arrow.Table.from_arrays([arrow.array([1.0]), arrow.array([2.0])], names=["x", "x"])
    parquet.write_table(twice, path)
    with pytest.raises(UserError, match=r"column 'x' .* more than once"):
        open_source(path)
    write(x=[1.0, 2.0, None], y=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match=r"column 'x' is null in 1 rows .* row 2"):
        open_source(path).read(0, 3)
    write(v=[[1.0, 2.0], [3.0]])
    with pytest.raises(UserError, match=r"another length than the first .* row 1 .* 2 values"):
        open_source(path).read(0, 2)
    write(v=[[1.0, 2.0], [3.0, None]])
    with pytest.raises(UserError, match=r"row 1 .* holds null"):
        open_source(path).read(0, 2)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a Parquet file, or is truncated"):
        open_source(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"shape \[4\]; accepted: \[rows, features\]"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]"),
        (np.zeros((0, 3)), "at least one row"),
        (np.array([["a", "b"]]), "dtype <U1"),
        (np.zeros((2, 2), complex), "dtype complex128"),
        (np.zeros((2, 2), "M8[s]"), "dtype datetime64"),
    ],
)
def test_what_is_no_matrix_of_numbers(array, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(array)
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.npy")


def test_unreadable_files(tmp_path, rows):
    with pytest.raises(UserError, match=r"does not exist; accepted: a \.npy file") as caught:
        open_source(tmp_path / "nothing.npy")
    assert "array, or" not in str(caught.value)  # Who gives a path may have nothing but paths.
    with pytest.raises(UserError, match=r"exist; accepted: digits, mnist, a \.npy file"):
        open_source(tmp_path / "mnst", named=("digits", "mnist"))
    with pytest.raises(UserError, match=r"no \.npy or \.parquet files"):
        open_source(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    with pytest.raises(UserError, match=r"is not a \.npy file"):
        open_source(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(UserError, match="dtype object"):
        open_source(tmp_path / "x.npy")
    zarr = pytest.importorskip("zarr")
    zarr.create_group(str(tmp_path / "g.zarr"))
    with pytest.raises(UserError, match="Zarr group"):
        open_source(tmp_path / "g.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match="no Zarr array"):
        open_source(tmp_path / "empty.zarr")


def test_truncated_and_grown_files(tmp_path, rows):
    path = npy(tmp_path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="is truncated: it has"):
        open_source(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(UserError, match="longer than it says"):
        open_source(path)

    path.write_bytes(whole)
    source = open_source(path)
    source.check_unchanged()
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"changed while it was being read .*had 404 bytes"):
        source.check_unchanged()
    os.truncate(path, len(whole) - 5)
    with pytest.raises(UserError, match="truncated while it was being read"):
        source.read(0, ROWS)


def test_a_file_written_to_or_replaced_is_noticed(tmp_path, rows):
    path = npy(tmp_path, rows)
    source = open_source([path, rows])
    source.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="it was written to"):
        source.check_unchanged()
    source = open_source(path)
    np.save(tmp_path / "other.npy", rows)
    os.replace(tmp_path / "other.npy", path)
    with pytest.raises(UserError, match="changed while it was being read"):
        source.check_unchanged()


def test_parts_must_fit_each_other(rows):
    with pytest.raises(UserError, match=r"has 2 features of float32, but .* has 3 of float32"):
        open_source([rows, rows[:, :2]])
    with pytest.raises(UserError, match="of float64, but"):
        open_source([rows, rows.astype(np.float64)])


def test_fingerprints_tell_data_apart(rows):
    same = open_source(rows).fingerprint()
    assert open_source(rows.copy()).fingerprint() == same
    assert open_source(rows[:-1]).fingerprint() != same
    assert open_source(rows.astype(np.float64)).fingerprint() != same
    assert open_source(rows.view(np.int32)).fingerprint() != same
    assert open_source(rows + 1).fingerprint() != same
    # Wherever one number differs.
    many = np.zeros((2_000_000, 3), np.uint8)
    same = open_source(many).fingerprint()
    for row in (1, 777_777, 1_600_000, 1_999_998):
        many[row, 2] = 1
        assert open_source(many).fingerprint() != same
        many[row, 2] = 0


def test_fingerprints_of_more_than_a_gibibyte_are_of_a_sample(rows, monkeypatch):
    read = []
    monkeypatch.setattr(base, "_WHOLE_BYTES", 2**10)
    monkeypatch.setattr(base, "_SAMPLED_BYTES", 2**8)
    source = open_source(np.zeros((1000, 4), np.float32))
    monkeypatch.setattr(source, "read", lambda a, b: read.append((a, b)) or np.zeros((b - a, 4)))
    source.fingerprint()
    assert (read[0], read[-1]) == ((0, 2), (998, 1000))
    assert len(read) == 8


def test_weights(tmp_path):
    weights = np.arange(5, dtype=np.float32)
    np.save(tmp_path / "w.npy", weights)
    for what in (
        weights,
        jnp.asarray(weights),
        list(weights),
        tmp_path / "w.npy",
        weights[:, None],
    ):
        np.testing.assert_array_equal(open_weights(what, 5).read(1, 5), weights[1:, None])
    np.testing.assert_array_equal(open_weights(2.5, 5).read(1, 5), np.full((4, 1), 2.5))
    with pytest.raises(UserError, match="array of weights has 5 weights; accepted: one for each"):
        open_weights(weights, 6)
    with pytest.raises(UserError, match=r"w\.npy has 5 weights; accepted: one for each of the 6"):
        open_weights(tmp_path / "w.npy", 6)
    with pytest.raises(UserError, match=r"of weights is of shape \[5, 2\]; accepted as weights"):
        open_weights(np.ones((5, 2)), 5)


def test_a_view_of_a_copy_on_write_map_shows_what_was_written(tmp_path, rows):
    changed = np.load(npy(tmp_path, rows), mmap_mode="c")
    changed[3] = -1
    assert (open_source(changed).read(3, 4) == -1).all()


def test_nothing_optional_is_imported():
    code = (
        "import sys, jkmeans.sources, jkmeans.streaming\n"
        "print([m for m in ('zarr', 'pyarrow', 'torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
