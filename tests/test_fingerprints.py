"""Checksums: of every bit, on any layout, of the same value as the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkmeans import fingerprints as module
from jkmeans.fingerprints import fingerprints


def by_the_formula(values):
    word = {1: np.uint8, 2: np.uint16}.get(values.itemsize, np.uint32)
    words = np.frombuffer(values.tobytes(), word)
    return sum((2 * 2654435761 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, jnp.bfloat16, np.uint16, np.int32, np.uint8, bool]
)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 3), P("a")),
        ((16, 6), P("b")),
        ((16, 6), P("a", "b")),
        ((8, 4, 3), P(None, "a")),
        ((4, 6, 4), P("b", None, "a")),
        ((16,), P(("a", "b"))),
        ((7,), P()),
        ((), P()),
    ],
)
def test_any_layout_has_the_sum_of_the_formula(shape, spec, dtype):
    values = np.asarray(np.random.default_rng(0).normal(size=shape) * 50 + 60).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.enable_x64(True):
        placed = jax.device_put(values, NamedSharding(mesh, spec))
    assert fingerprints([values, placed]) == [by_the_formula(values)] * 2


def test_more_than_a_block(monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert fingerprints([values]) == [by_the_formula(values)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_each_bit_and_a_swap_are_seen(dtype):
    values = np.random.default_rng(0).normal(size=(5, 2)).astype(dtype)
    changed = [values[[1, 0, 2, 3, 4]]]
    for byte in range(values.itemsize):
        for bit in range(8):
            one = values.copy()
            one.view(np.uint8).reshape(5, 2, -1)[3, 1, byte] ^= np.uint8(1 << bit)
            changed.append(one)
    assert fingerprints([values])[0] not in fingerprints(changed)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, jnp.bfloat16, bool])
def test_that_of_rows_is_of_every_bit_however_many_processes_read(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    rows = np.maximum(np.random.default_rng(0).normal(size=(203, 3, 2)) * 9, 0).astype(dtype)
    whole = module.fingerprint_of_rows(rows)
    assert module.fingerprint_of_rows(np.asfortranarray(rows)) == whole
    for i in (0, 100, 202):
        other = rows.copy()
        other[i, 2, 1] = not other[i, 2, 1]
        assert module.fingerprint_of_rows(other) != whole
    assert module.fingerprint_of_rows(rows[::-1]) != whole
    # Of three processes each has a part of the sum.
    parts = []
    monkeypatch.setattr(module.processes, "count", lambda: 3)
    monkeypatch.setattr(module.processes, "gather", lambda value: parts.append(value) or [0])
    for number in range(3):
        monkeypatch.setattr(module.processes, "number", lambda number=number: number)
        module.fingerprint_of_rows(rows)
    assert all(parts)
    assert sum(parts) % 2**32 == whole
