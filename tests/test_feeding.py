"""Host feeding: the chunks hold the examples that the order asks for, on any mesh."""

import jax
import numpy as np
import pytest

from jkmeans.feeding import HostFeeder
from jkmeans.sharding import Layout, make_mesh

N, SHAPE = 53, (2, 3)


def layout_of(n_devices, n_examples=N):
    return Layout(n_examples=n_examples, batch_size=16, n_shards=8, n_devices=n_devices)


def array(dtype=np.float32, n=N):
    values = np.arange(n * 6).reshape(n, *SHAPE)
    return (values % 2 if dtype == np.bool_ else values).astype(dtype)


def shuffled(layout, seed=0):
    """An order as an epoch makes one: every device visits each of its rows once."""
    rng = np.random.default_rng(seed)
    rows = layout.n_rows // layout.n_devices
    columns = [rng.permutation(rows).reshape(layout.n_steps, -1) for _ in range(layout.n_devices)]
    return np.concatenate(columns, axis=1).astype(np.int32)


def wanted(layout, order, examples):
    """The examples of an order, by the definition; row by row."""
    index = layout.row_index()
    rows_per_device = layout.n_rows // layout.n_devices
    columns = order.shape[1] // layout.n_devices
    found = np.empty((*order.shape, *examples.shape[1:]), examples.dtype)
    counts = np.zeros(order.shape, bool)
    for step, column in np.ndindex(*order.shape):
        row = column // columns * rows_per_device + order[step, column]
        counts[step, column] = index[row] >= 0
        found[step, column] = examples[max(index[row], 0)]
    return found, counts


def chunk_bytes(layout, n_steps, itemsize=4):
    return n_steps * (layout.n_rows // layout.n_steps) * 6 * itemsize


@pytest.mark.parametrize("n_devices", [1, 3, 8])
@pytest.mark.parametrize(("n_steps", "first"), [(1, 0), (2, 0), (2, 1), (3, 2), (100, 0)])
def test_chunks_are_the_examples_of_the_order(n_devices, n_steps, first):
    layout, examples = layout_of(n_devices), array()
    assert layout.n_steps == 4
    mesh = make_mesh(n_devices)
    order = shuffled(layout)
    feeder = HostFeeder(examples, layout, mesh, chunk_bytes(layout, n_steps))
    parts = list(feeder.chunks(order, first))
    lengths = [len(rows) for rows, _ in parts]
    assert sum(lengths) == layout.n_steps - first
    assert all(length == min(n_steps, 4) for length in lengths[:-1])
    for rows, values in parts:
        # The second axis is sharded: a device receives its own columns only.
        for part in (rows, values):
            shares = [s.data.shape[1] for s in part.addressable_shards]
            assert shares == [order.shape[1] // n_devices] * n_devices
            assert {s.device for s in part.addressable_shards} == set(mesh.devices.flat)
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in parts]), order[first:])
    found = np.concatenate([values for _, values in parts])
    expected, counts = wanted(layout, order, examples)
    np.testing.assert_array_equal(found, expected[first:])
    if first == 0:  # Every example comes once.
        ones = found[counts].reshape(-1, 6)
        np.testing.assert_array_equal(ones[np.argsort(ones[:, 0])], examples.reshape(N, 6))


def test_a_chunk_of_less_than_a_step_is_a_step():
    layout = layout_of(1)
    feeder = HostFeeder(array(), layout, make_mesh(1), 1)
    assert [len(rows) for rows, _ in feeder.chunks(shuffled(layout))] == [1] * 4


@pytest.mark.parametrize("n_devices", [1, 3, 8])
def test_row_order(n_devices):
    layout = layout_of(n_devices)
    feeder = HostFeeder(array(), layout, make_mesh(n_devices), 10**6)
    order = feeder.in_row_order()
    assert order.shape == (layout.n_steps, layout.n_rows // layout.n_steps)
    per_device = order.reshape(layout.n_steps, n_devices, -1).transpose(1, 0, 2)
    rows = np.arange(layout.n_rows // n_devices)
    np.testing.assert_array_equal(per_device.reshape(n_devices, -1), np.tile(rows, (n_devices, 1)))


@pytest.mark.parametrize(
    ("dtype", "on_device"),
    [
        (np.uint8, np.uint8),
        (np.bool_, np.uint8),
        (np.int16, np.int16),
        (np.float16, np.float16),
        (np.float32, np.float32),
        (np.float64, np.float32),
        (np.int64, np.float32),
    ],
)
def test_types(dtype, on_device):
    layout, examples = layout_of(2, 41), array(dtype, 41)
    feeder = HostFeeder(examples, layout, make_mesh(2), 10**6)
    order = shuffled(layout)
    ((_, values),) = feeder.chunks(order)
    assert values.dtype == on_device
    np.testing.assert_array_equal(values, wanted(layout, order, examples)[0].astype(on_device))


def test_chunks_are_measured_in_bytes_on_the_device():
    layout = layout_of(1)
    feeder = HostFeeder(array(np.uint8), layout, make_mesh(1), chunk_bytes(layout, 2, 1))
    assert [len(rows) for rows, _ in feeder.chunks(shuffled(layout))] == [2, 2]


def test_memory_maps_are_read_by_rows(tmp_path):
    class Counting(np.memmap):
        """Notes the largest number of rows read at once."""

        largest = 0

        def __getitem__(self, index):
            Counting.largest = max(Counting.largest, np.size(index))
            return super().__getitem__(index)

        def __array__(self, *arguments, **options):
            raise AssertionError("the whole file is read")

    examples = array()
    np.save(tmp_path / "x.npy", examples)
    layout = layout_of(2)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r").view(Counting)
    feeder = HostFeeder(mapped, layout, make_mesh(2), chunk_bytes(layout, 1))
    order = shuffled(layout)
    found = np.concatenate([np.asarray(values) for _, values in feeder.chunks(order)])
    np.testing.assert_array_equal(found, wanted(layout, order, examples)[0])
    assert 0 < Counting.largest <= order.shape[1]


def test_vectors_and_scalars():
    for shape in ((5,), ()):
        layout = layout_of(2)
        examples = np.random.default_rng(0).normal(size=(N, *shape)).astype(np.float32)
        feeder = HostFeeder(examples, layout, make_mesh(2), 10**6)
        order = shuffled(layout)
        ((_, values),) = feeder.chunks(order)
        np.testing.assert_array_equal(values, wanted(layout, order, examples)[0])


def test_leaving_early_and_an_error_of_the_reader():
    layout, order = layout_of(1), shuffled(layout_of(1))
    feeder = HostFeeder(array(), layout, make_mesh(1), 1)
    chunks = feeder.chunks(order)
    next(chunks)
    chunks.close()  # Waits for the reader: nothing is left behind.

    broken = np.zeros((N // 2, *SHAPE), np.float32)  # A file that has shrunk.
    feeder = HostFeeder(broken, layout, make_mesh(1), 10**6)
    with pytest.raises(IndexError):
        jax.block_until_ready(list(feeder.chunks(order)))
