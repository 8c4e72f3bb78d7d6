import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jkmeans.kmeans import KMeansResult
from jkmeans.kmeans.spherical import cosine_distances, spherical, unit_rows

ROWS, SAME = PartitionSpec("data"), PartitionSpec()
RESULT_SPECS = KMeansResult(SAME, ROWS, ROWS, SAME, SAME, SAME, SAME, SAME)
KEY = jax.random.key(0)
run = jax.jit(spherical, static_argnames=("n_clusters", "n_init", "empty"))


def by_hand(x, start, weights):
    """Dhillon and Modha's iteration, literally, in float64."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    concepts = start / np.linalg.norm(start, axis=1, keepdims=True)
    for _ in range(100):
        labels = (x @ concepts.T).argmax(axis=1)
        sums = np.stack(
            [(weights[:, None] * x)[labels == k].sum(axis=0) for k in range(len(start))]
        )
        new = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        if np.abs(new - concepts).max() < 1e-12:
            break
        concepts = new
    return labels, concepts, (weights * (1 - (x @ concepts.T).max(axis=1))).sum()


def test_agrees_with_the_definition(blobs):
    weights = np.random.default_rng(0).uniform(0.5, 2, len(blobs)).astype(np.float32)
    result = run(KEY, blobs, 6, init=blobs[:6], weights=weights)
    labels, concepts, inertia = by_hand(blobs.astype(np.float64), blobs[:6], weights)
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_allclose(result.centroids, concepts, atol=1e-5)
    np.testing.assert_allclose(result.inertia, inertia, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, rtol=1e-6)
    assert result.n_empty == result.n_relocated == 0


def test_lengths_do_not_matter(blobs):
    lengths = np.exp(np.random.default_rng(0).uniform(-30, 30, (len(blobs), 1))).astype(np.float32)
    plain = run(KEY, blobs, 6, init=blobs[:6])
    scaled = run(KEY, blobs * lengths, 6, init=blobs[:6])
    np.testing.assert_array_equal(plain.labels, scaled.labels)
    np.testing.assert_allclose(plain.inertia, scaled.inertia, rtol=1e-4)


def test_named_initialisations_and_restarts(blobs):
    several = run(KEY, blobs, 6, n_init=4)
    first = run(KEY, blobs, 6)
    assert several.inertia <= first.inertia
    # Stationary: each centroid is the direction of its rows' sum.
    unit = blobs / np.linalg.norm(blobs, axis=1, keepdims=True)
    for k in range(6):
        total = unit[np.asarray(several.labels) == k].sum(axis=0)
        np.testing.assert_allclose(several.centroids[k], total / np.linalg.norm(total), atol=1e-5)


def test_zeros_opposites_and_empty_clusters():
    x = np.array([[1, 0], [2, 0], [0, 3], [0, 0], [-1, 1e-3]], np.float32)
    result = run(KEY, x, 3, init=np.array([[1, 0.1], [0, 1], [0, -1]], np.float32))
    np.testing.assert_array_equal(np.asarray(result.labels)[[0, 1, 2, 4]], [0, 0, 1, 2])
    assert result.n_relocated == 1
    np.testing.assert_allclose(result.inertia, 1, atol=1e-6)  # the row of zeros
    start = np.array([[1, 0.1], [0, 1], [0, -1]], np.float32)
    result = run(KEY, x, 3, init=start, empty="keep")
    assert (result.n_relocated, result.n_empty) == (0, 1)
    np.testing.assert_allclose(result.centroids[2], start[2])
    # Opposite rows cancel out: the centroid stays where it was.
    pair = np.array([[1, 0], [-1, 0]], np.float32)
    result = run(KEY, pair, 1, init=np.array([[0, 1]], np.float32))
    np.testing.assert_allclose(result.centroids, [[0, 1]])
    np.testing.assert_allclose(result.inertia, 2)


def test_small_distances_keep_their_digits():
    angle = 1e-4
    x = unit_rows(np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32))
    found = cosine_distances(x, x[:1], np.zeros(2, np.int32))
    np.testing.assert_allclose(found, [0, angle**2 / 2], rtol=1e-3)


def test_eight_devices(on_eight_devices, blobs):
    weights = np.ones(320, np.float32)
    weights[300:] = 0

    def f(x, weights):
        return spherical(KEY, x, 6, weights=weights, n_init=2, axis_name="data")

    eight = on_eight_devices(f, RESULT_SPECS)(blobs, weights)
    one = run(KEY, blobs, 6, weights=weights, n_init=2)
    np.testing.assert_array_equal(eight.labels, one.labels)
    np.testing.assert_allclose(eight.inertia, one.inertia, rtol=1e-5)
    assert eight.n_iter == one.n_iter


def test_errors(blobs):
    with pytest.raises(ValueError, match=r"init has shape \(5, 5\): expected \(6, 5\)"):
        spherical(KEY, blobs, 6, init=blobs[:5])
    with pytest.raises(ValueError, match="init='best': expected an array or one of"):
        spherical(KEY, blobs, 6, init="best")
    with pytest.raises(ValueError, match="empty='drop': expected one of farthest, keep"):
        spherical(KEY, blobs, 6, empty="drop")
