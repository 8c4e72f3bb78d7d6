"""Blocks of fixed shapes: the bits of a row depend on nothing but its file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkmeans import evaluation, training
from jkmeans.blocks import FEWEST_ROWS, MOST_BYTES, MOST_ROWS, block_rows, blocks
from tests import tiny


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((12,), MOST_ROWS), ((28, 28), MOST_ROWS), ((224, 224, 3), 64), ((10**8,), FEWEST_ROWS)],
)
def test_a_block_is_as_large_as_fits(shape, rows):
    assert block_rows(shape) == rows
    assert rows == FEWEST_ROWS or rows * 4 * np.prod(shape) <= MOST_BYTES


@given(n=st.integers(1, 5000), n_devices=st.integers(1, 8))
def test_every_row_lies_at_its_place_in_one_block(n, n_devices):
    examples = np.arange(1, n + 1, dtype=np.float64)[:, None]
    place = {}
    for block in blocks(examples, n_devices):
        chunk, count = block.read(0, block.n_rows), block.n_examples
        assert chunk.dtype == np.float32
        assert not chunk[count:].any()
        size = block.n_rows // n_devices
        assert size * n_devices == len(chunk)
        np.testing.assert_array_equal(block.read(size - 1, len(chunk)), chunk[size - 1 :])
        assert size & (size - 1) == 0
        for i, row in enumerate(chunk[:count, 0]):
            # The shape of the block, and where in it: what the bits may depend on.
            place[int(row)] = size, i % size
    assert list(place) == list(range(1, n + 1))
    whole = n - n % MOST_ROWS
    for row in (1, whole, whole + 1, n):
        if 1 <= row <= n:
            size = MOST_ROWS if row <= whole else place[n][0]
            assert place[row] == (size, (row - 1) % MOST_ROWS)
    rest = n - whole
    assert not rest or place[n][0] == max(FEWEST_ROWS, 1 << (rest - 1).bit_length())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "x.npy", tiny.blobs()[0])
    training.train_and_evaluate(
        tiny.config(data__path=str(folder / "x.npy"), training__n_epochs=1, n_devices=1),
        folder / "work",
    )
    return folder / "work"


def test_bits_do_not_depend_on_devices_or_on_where_a_file_is_cut(workdir):
    examples = tiny.blobs(n=3 * MOST_ROWS + 77)[0]
    one = evaluation.predict(evaluation.load_model(workdir, n_devices=1), examples)
    for n_devices in (3, 8):
        model = evaluation.load_model(workdir, n_devices=n_devices)
        many = evaluation.predict(model, examples)
        for column, other in zip(one, many, strict=True):
            assert column.tobytes() == other.tobytes()
        parts = [
            evaluation.predict(model, examples[start:stop])
            for start, stop in ((0, 2 * MOST_ROWS), (2 * MOST_ROWS, None))
        ]
        for i, column in enumerate(one):
            assert np.concatenate([part[i] for part in parts]).tobytes() == column.tobytes()
