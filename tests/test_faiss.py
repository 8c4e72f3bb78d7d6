"""Centroids as the coarse quantizer of FAISS: the documented code, lists, and recall."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jkmeans import kmeans
from jkmeans.interop import to_faiss

DOCUMENT = Path(__file__).parent.parent / "docs" / "faiss.md"
N, D, K, N_QUERIES = 20_000, 16, 64, 200


@pytest.fixture(scope="module")
def faiss():
    module = pytest.importorskip("faiss", reason="needs faiss-cpu")
    module.omp_set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def vectors():
    """Correlated vectors without clusters, as embeddings are, and queries like them."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(D, D)) * np.geomspace(3, 0.3, D)
    x = (generator.normal(size=(N + N_QUERIES, D)) @ mixing).astype(np.float32)
    return x[:N], x[N:]


@pytest.fixture(scope="module")
def result(vectors):
    x = jax.numpy.asarray(vectors[0])
    fit = jax.jit(lambda x: kmeans.fit(jax.random.key(0), x, K, max_iter=25))
    return jax.tree.map(np.asarray, fit(x))


def recall(index, nprobe, queries, truth) -> float:
    index.nprobe = nprobe
    _, found = index.search(queries, truth.shape[1])
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])
    )


def test_recall_is_that_of_faiss_training(faiss, vectors, result):
    x, queries = vectors
    exact = faiss.IndexFlatL2(D)
    exact.add(x)
    _, truth = exact.search(queries, 10)

    ours = faiss.IndexIVFFlat(to_faiss(result.centroids), D, K, faiss.METRIC_L2)
    ours.train(x[:1])
    assert ours.is_trained
    ours.add(x)
    theirs = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, K, faiss.METRIC_L2)
    theirs.cp.niter = 25
    theirs.cp.max_points_per_centroid = N
    theirs.train(x)
    theirs.add(x)
    for nprobe in (1, 4, 16):
        # Six seeds of FAISS itself: .505 to .535 with one list, .897 to .915 with four.
        assert recall(ours, nprobe, queries, truth) > recall(theirs, nprobe, queries, truth) - 0.04
    assert recall(ours, K, queries, truth) == 1.0


def test_lists_are_clusters(faiss, vectors, result):
    x, _ = vectors
    quantizer = to_faiss(result.centroids)
    assert quantizer.ntotal == K
    _, lists = quantizer.search(x, 1)
    differ = np.flatnonzero(lists[:, 0] != result.labels)
    # Only where two centroids are equally far to rounding.
    to_both = [
        np.sum((x[differ].astype(np.float64) - result.centroids[labels][differ]) ** 2, axis=1)
        for labels in (lists[:, 0], result.labels)
    ]
    np.testing.assert_allclose(*to_both, rtol=1e-4)
    assert len(differ) < 10


def test_training_leaves_the_centroids_alone(faiss, vectors, result):
    index = faiss.IndexIVFPQ(to_faiss(result.centroids), D, K, 4, 4)
    index.train(vectors[0])
    np.testing.assert_array_equal(
        faiss.downcast_index(index.quantizer).reconstruct_n(0, K),
        result.centroids.astype(np.float32),
    )


def test_the_documented_code_runs(faiss, vectors, result, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "runs" / "c").mkdir(parents=True)
    np.save(tmp_path / "embeddings.npy", vectors[0])
    np.save(tmp_path / "runs" / "c" / "centroids.npy", result.centroids)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks[0], names)
    # A vector's nearest neighbour is itself.
    np.testing.assert_array_equal(names["neighbours"][:, 0], np.arange(5))
    exec(blocks[1], names)
    assert names["index"].ntotal == N


def test_inner_product(faiss):
    centroids = np.eye(3)
    index = to_faiss(centroids, inner_product=True)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    _, found = index.search(np.asarray([[0.1, 0.2, 0.9]], np.float32), 1)
    assert found[0, 0] == 2


@pytest.mark.parametrize(
    ("centroids", "sentence"),
    [
        (np.zeros(3), r"shape \(3,\); accepted: \[k, d\]"),
        (np.zeros((0, 3)), "accepted: "),
        (np.full((2, 2), np.nan), "NaN or infinity"),
        (np.full((2, 2), 1e300), "NaN or infinity as float32"),
    ],
)
def test_bad_centroids(faiss, centroids, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_faiss(centroids)
