"""The layout: every example once, in the same batches on any number of devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkmeans import sharding
from jkmeans.errors import UserError
from jkmeans.sharding import Layout

layouts = st.builds(
    Layout,
    n_examples=st.integers(1, 500),
    batch_size=st.integers(1, 300),
    n_shards=st.integers(1, 9),
    n_devices=st.integers(1, 8),
)


@given(layouts)
@settings(max_examples=200, deadline=None)
def test_every_example_has_exactly_one_row(layout):
    index = layout.row_index()
    assert len(index) == layout.n_rows
    np.testing.assert_array_equal(index[index >= 0], np.arange(layout.n_examples))


@given(layouts)
@settings(max_examples=200, deadline=None)
def test_rows_divide_evenly(layout):
    assert layout.n_rows % layout.n_devices == 0
    assert layout.n_rows // layout.n_devices == layout.shards_per_device * layout.rows_per_shard
    assert layout.rows_per_shard == layout.n_steps * layout.rows_per_step
    assert layout.rows_per_step <= max(1, layout.batch_size // layout.n_shards)


@given(layouts, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_only_padding_at_the_end_depends_on_the_devices(layout, n_devices):
    other = Layout(layout.n_examples, layout.batch_size, layout.n_shards, n_devices)
    ours, theirs = layout.row_index(), other.row_index()
    n = min(len(ours), len(theirs))
    np.testing.assert_array_equal(ours[:n], theirs[:n])
    assert np.all(ours[n:] == -1)
    assert np.all(theirs[n:] == -1)


def test_literature_batches():
    layout = Layout(n_examples=70_000, batch_size=256, n_shards=8, n_devices=1)
    assert (layout.n_steps, layout.effective_batch_size) == (274, 256)


@pytest.mark.parametrize("n_devices", [1, 3, 8])
def test_placed_rows_are_the_examples_and_the_first_again(n_devices):
    examples = np.arange(1, 101, dtype=np.uint8).reshape(50, 2)
    layout = Layout(n_examples=50, batch_size=16, n_shards=8, n_devices=n_devices)
    rows = sharding.place_rows(examples, layout, sharding.make_mesh(n_devices))
    assert rows.dtype == jnp.uint8
    np.testing.assert_array_equal(sharding.gather_examples(rows, layout), examples)
    assert np.all(np.asarray(rows)[layout.row_index() < 0] == examples[0])


def test_relayout_between_device_counts():
    examples = np.arange(50, dtype=np.float32)[:, None]
    eight, three = (Layout(50, 16, 8, n) for n in (8, 3))
    rows = sharding.place_rows(examples, eight, sharding.make_mesh(8))
    moved = sharding.relayout(rows, three, sharding.make_mesh(3))
    assert moved.shape[0] == three.n_rows > eight.n_rows
    np.testing.assert_array_equal(sharding.gather_examples(moved, three), examples)
    back = sharding.relayout(moved, eight, sharding.make_mesh(8))
    np.testing.assert_array_equal(np.asarray(back), np.asarray(rows))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("uint8", "uint8"), ("float16", "float16"), ("float64", "float32"), ("int64", "float32")],
)
def test_device_dtype(given, kept):
    assert sharding.device_dtype(np.dtype(given)) == np.dtype(kept)
    assert sharding.device_dtype(np.dtype(bool)) == np.uint8


@pytest.mark.parametrize(
    ("given", "kept"),
    [("int16", "int16"), ("uint32", "float64"), ("int64", "float64"), ("float64", "float64")],
)
def test_clustered_dtype(given, kept):
    assert sharding.clustered_dtype(np.dtype(given)) == np.dtype(kept)


def test_more_devices_than_exist():
    with pytest.raises(UserError, match=r"n_devices is -1; accepted: 0 \(all of them\) to 8"):
        sharding.make_mesh(-1)
    with pytest.raises(UserError, match=r"n_devices is 9.*JAX sees 8.*accepted: 0"):
        sharding.make_mesh(9)
