"""Blobs: the same on any number of devices, and distributed as they say."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.generation import BLOCK_ROWS, make_blobs
from jkmeans.sharding import make_mesh

N = 2 * BLOCK_ROWS + 104  # 8 divides it; shards begin within blocks.


@pytest.mark.parametrize("n_devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_same_bits_on_any_number_of_devices(n_devices):
    alone = make_blobs(3, N, 3, 4)
    mesh = make_mesh(n_devices)
    shared = make_blobs(3, N, 3, 4, mesh=mesh)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert len(shared.x.addressable_shards) == n_devices
    assert {shard.data.shape for shard in shared.x.addressable_shards} == {(N // n_devices, 3)}


def test_rows_that_the_mesh_does_not_divide():
    mesh = make_mesh(8)
    n = N - 3
    alone = make_blobs(3, N, 3, 4)
    plain = make_blobs(3, n, 3, 4, mesh=mesh)
    assert plain.x.shape == (n, 3)
    assert plain.labels.shape == (n,)
    np.testing.assert_array_equal(np.asarray(plain.x), np.asarray(alone.x)[:n])
    np.testing.assert_array_equal(np.asarray(plain.labels), np.asarray(alone.labels)[:n])
    padded = make_blobs(3, n, 3, 4, mesh=mesh, pad=True)
    assert padded.x.shape == (N, 3)
    assert not padded.x.sharding.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(padded.x)[:n], np.asarray(alone.x)[:n])
    np.testing.assert_array_equal(np.asarray(padded.labels)[:n], np.asarray(alone.labels)[:n])
    np.testing.assert_array_equal(np.asarray(padded.labels)[n:], -1)


def test_fewer_rows_than_devices():
    """With the emitters that users have; of those that tests are compiled by, bits differ here."""
    program = """
import numpy as np
from jkmeans.generation import make_blobs
from jkmeans.sharding import make_mesh
print(np.asarray(make_blobs(0, 3, 2, 2, mesh=make_mesh(8)).x).tobytes().hex())
print(np.asarray(make_blobs(0, 3, 2, 2).x).tobytes().hex())
"""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    sharded, whole = done.stdout.split()
    assert len(whole) == 2 * 4 * 3 * 2
    assert sharded == whole


def test_points_are_normal_around_their_centers():
    centers = np.asarray([[0.0, 100.0, -5.0], [50.0, -50.0, 1.0], [7.0, 7.0, 7.0]])
    std = np.asarray([1.0, 3.0, 0.0])
    shares = np.asarray([2.0, 1.0, 1.0])
    n = 20_000
    x, labels, given = (
        np.asarray(a)
        for a in make_blobs(jax.random.key(1), n, 3, centers, cluster_std=std, weights=shares)
    )
    np.testing.assert_array_equal(given, centers)
    counts = np.bincount(labels, minlength=3)
    # Four standard deviations of a binomial.
    np.testing.assert_allclose(counts / n, shares / 4, atol=4 * 0.5 / np.sqrt(n))
    from scipy import stats

    for c in range(2):
        noise = (x[labels == c] - centers[c]) / std[c]
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
        correlation = np.corrcoef(noise.T) - np.eye(3)
        assert np.abs(correlation).max() < 4 / np.sqrt(counts[c])
    np.testing.assert_array_equal(x[labels == 2], np.broadcast_to(centers[2], (counts[2], 3)))
    # Blocks do not repeat each other.
    assert len(np.unique(x[labels == 0, 0])) > 0.99 * counts[0]


def test_blobs_of_share_zero_have_no_points():
    labels = np.asarray(make_blobs(0, 5000, 1, 4, weights=np.asarray([0.0, 1.0, 1.0, 0.0])).labels)
    assert set(np.unique(labels)) == {1, 2}


def test_centers_lie_in_the_box_and_seeds_differ():
    one = make_blobs(0, 10, 2, 200, center_box=(3.0, 4.0))
    centers = np.asarray(one.centers)
    assert 3 <= centers.min() < 3.1
    assert 3.9 < centers.max() <= 4
    other = make_blobs(1, 10, 2, 200, center_box=(3.0, 4.0))
    assert not np.isin(np.asarray(other.x), np.asarray(one.x)).any()
    same = make_blobs(jax.random.key(0), 10, 2, 200, center_box=(3.0, 4.0))
    np.testing.assert_array_equal(np.asarray(same.x), np.asarray(one.x))


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_small_types(dtype):
    blobs = make_blobs(0, 100, 2, 3, dtype=dtype)
    assert blobs.x.dtype == blobs.centers.dtype == dtype
    wide = make_blobs(0, 100, 2, 3)
    np.testing.assert_array_equal(
        np.asarray(blobs.x.astype(jnp.float32)),
        np.asarray(wide.x.astype(dtype).astype(jnp.float32)),
    )


def test_float64():
    with jax.enable_x64(True):
        blobs = make_blobs(0, 100, 2, 3, dtype=jnp.float64)
        assert blobs.x.dtype == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_samples": 0}, "n_samples is 0"),
        ({"n_samples": 2.5}, "n_samples is 2.5"),
        ({"n_features": -1}, "n_features is -1"),
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"n_clusters": np.zeros((3, 5))}, r"centers are of shape \(3, 5\); accepted: \[k, 2\]"),
        ({"n_clusters": np.full((3, 2), np.nan)}, "NaN"),
        ({"cluster_std": -1.0}, "cluster_std is -1.0"),
        ({"cluster_std": np.ones(2)}, "or 3 of them"),
        ({"center_box": (1.0, 0.0)}, "center_box is"),
        ({"weights": np.ones(4)}, "accepted: 3 numbers"),
        ({"weights": np.zeros(3)}, "all 0"),
        ({"dtype": jnp.int32}, "dtype is int32"),
        ({"key": "zero"}, "key is 'zero'"),
    ],
)
def test_bad_arguments(arguments, sentence):
    good = {"key": 0, "n_samples": 10, "n_features": 2, "n_clusters": 3}
    with pytest.raises(ValueError, match=sentence):
        make_blobs(**(good | arguments))


def test_data_sets_offer_it():
    from jkmeans import datasets

    np.testing.assert_array_equal(
        np.asarray(datasets.make_blobs(0, 10, 2, 3).x), np.asarray(make_blobs(0, 10, 2, 3).x)
    )
