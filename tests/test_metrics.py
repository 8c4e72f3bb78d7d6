import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    mutual_info_score,
    normalized_mutual_info_score,
)

from jkmeans import metrics
from jkmeans.errors import UserError

METRICS = (
    metrics.clustering_accuracy,
    metrics.normalized_mutual_information,
    metrics.adjusted_rand_index,
    metrics.purity,
)
FUNCTIONS = (*METRICS, metrics.match, metrics.matched_confusion, metrics.summarize)

# Two classes of three and three; cluster 7 holds all of class 0, clusters 2 and 5 share class 1.
TRUTH = np.array([0, 0, 0, 1, 1, 1])
LABELS = np.array([7, 7, 7, 2, 2, 5])


def _random(seed, n=200, n_classes=4, n_clusters=6):
    rng = np.random.default_rng(seed)
    truth = rng.integers(n_classes, size=n)
    # Half of the labels follow the truth, so that the scores are neither zero nor one.
    labels = np.where(rng.random(n) < 0.5, truth, rng.integers(n_clusters, size=n))
    return truth, labels


def _entropy(*counts):
    share = np.array(counts) / np.sum(counts)
    return -np.sum(share * np.log(share))


class TestByHand:
    def test_accuracy_counts_an_unmatched_cluster_as_wrong(self):
        assert metrics.clustering_accuracy(TRUTH, LABELS) == pytest.approx(5 / 6)

    def test_accuracy_needs_a_global_matching(self):
        # Greedy takes 4 (class 0, cluster 0) and is left with 0; the best is 3 + 3.
        truth = np.array([0] * 4 + [1] * 3 + [0] * 3)
        labels = np.array([0] * 4 + [0] * 3 + [1] * 3)
        assert metrics.clustering_accuracy(truth, labels) == pytest.approx(6 / 10)

    def test_accuracy_with_fewer_clusters_than_classes(self):
        truth = np.array([0, 0, 1, 2])
        assert metrics.clustering_accuracy(truth, np.zeros(4, int)) == pytest.approx(2 / 4)

    def test_purity_lets_clusters_share_a_class(self):
        assert metrics.purity(TRUTH, LABELS) == 1.0
        # Clusters {0, 0, 1} and {1, 1, 0}: majorities of two each.
        assert metrics.purity([0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]) == pytest.approx(4 / 6)
        # Not symmetric: one cluster of two halves has purity 1/2.
        assert metrics.purity([0, 0, 1, 1], [0, 0, 0, 0]) == pytest.approx(1 / 2)

    def test_nmi_is_twice_the_information_over_the_sum_of_entropies(self):
        # The clusters determine the classes, so I = H(truth) = log 2.
        expected = 2 * np.log(2) / (np.log(2) + _entropy(3, 2, 1))
        assert metrics.normalized_mutual_information(TRUTH, LABELS) == pytest.approx(expected)

    def test_ari(self):
        # Pairs in the same class and cluster: 3 + 1 = 4; in the same class: 6; in the same cluster:
        # 4; all: 15. Expected by chance 6·4/15 = 1.6, at most (6 + 4)/2 = 5.
        expected = (4 - 1.6) / (5 - 1.6)
        assert metrics.adjusted_rand_index(TRUTH, LABELS) == pytest.approx(expected)

    def test_match(self):
        assert metrics.match(TRUTH, LABELS) == {7: 0, 2: 1}
        assert list(metrics.match([5, 5, -1, -1], [1, 1, 9, 9])) == [9, 1]
        assert metrics.match([3, 3, 4], [0, 0, 0]) == {0: 3}

    def test_matched_confusion_with_more_clusters_than_classes(self):
        truth = np.array([0] * 5 + [1] * 7)
        # 3 → 0 and 9 → 1; of the two beyond, 8 has three examples and 1 has two.
        labels = np.array([3, 3, 3, 8, 1, 9, 9, 9, 9, 1, 8, 8])
        matrix, classes, clusters = metrics.matched_confusion(truth, labels)
        np.testing.assert_array_equal(classes, [0, 1])
        np.testing.assert_array_equal(clusters, [3, 9, 8, 1])
        np.testing.assert_array_equal(matrix, [[3, 0, 1, 1], [0, 4, 2, 1]])

    def test_matched_confusion_with_fewer_clusters_than_classes(self):
        truth = np.array([0, 1, 1, 2, 2, 2])
        labels = np.array([6, 6, 6, 4, 4, 4])
        matrix, classes, clusters = metrics.matched_confusion(truth, labels)
        np.testing.assert_array_equal(classes, [1, 2, 0])
        np.testing.assert_array_equal(clusters, [6, 4])
        np.testing.assert_array_equal(matrix, [[2, 0], [0, 3], [1, 0]])

    def test_summarize(self):
        summary = metrics.summarize(TRUTH, LABELS)
        assert summary == {
            "acc": pytest.approx(5 / 6),
            "nmi": pytest.approx(2 * np.log(2) / (np.log(2) + _entropy(3, 2, 1))),
            "ari": pytest.approx(2.4 / 3.4),
            "purity": 1.0,
        }
        assert all(type(value) is float for value in summary.values())


@pytest.mark.parametrize("seed", range(5))
class TestAgainstReferences:
    def test_accuracy_equals_the_best_of_all_matchings(self, seed):
        truth, labels = _random(seed, n=60)
        best = max(
            accuracy_score(truth, [to.index(label) if label in to else -1 for label in labels])
            for to in itertools.permutations(range(6), 4)
        )
        assert metrics.clustering_accuracy(truth, labels) == pytest.approx(best)

    def test_scikit_learn(self, seed):
        truth, labels = _random(seed)
        summary = metrics.summarize(truth, labels)
        assert summary["nmi"] == pytest.approx(normalized_mutual_info_score(truth, labels))
        assert summary["ari"] == pytest.approx(adjusted_rand_score(truth, labels))

    def test_nmi_takes_the_arithmetic_mean(self, seed):
        truth, labels = _random(seed)
        entropies = [_entropy(*np.unique(a, return_counts=True)[1]) for a in (truth, labels)]
        expected = mutual_info_score(truth, labels) / np.mean(entropies)
        assert metrics.normalized_mutual_information(truth, labels) == pytest.approx(expected)

    def test_match_is_one_to_one_and_reaches_the_accuracy(self, seed):
        truth, labels = _random(seed)
        to_class = metrics.match(truth, labels)
        assert len(to_class) == len(set(to_class.values())) == 4
        predicted = [to_class.get(int(label), -1) for label in labels]
        assert np.mean(predicted == truth) == metrics.clustering_accuracy(truth, labels)

    def test_matched_confusion_counts_every_example(self, seed):
        truth, labels = _random(seed)
        matrix, classes, clusters = metrics.matched_confusion(truth, labels)
        expected = [[np.sum((truth == c) & (labels == k)) for k in clusters] for c in classes]
        np.testing.assert_array_equal(matrix, expected)
        assert np.trace(matrix) / 200 == metrics.clustering_accuracy(truth, labels)
        to_class = metrics.match(truth, labels)
        assert [to_class[k] for k in clusters[:4]] == list(classes)
        beyond = matrix[:, 4:].sum(axis=0)
        assert list(beyond) == sorted(beyond, reverse=True)

    def test_names_and_order_do_not_count(self, seed):
        truth, labels = _random(seed)
        expected = metrics.summarize(truth, labels)
        rng = np.random.default_rng(seed)
        new_classes = rng.choice(np.arange(-50, 50), size=4, replace=False)
        new_clusters = rng.choice(np.arange(-(10**9), 10**9, 10**7), size=6, replace=False)
        order = rng.permutation(len(truth))
        renamed = metrics.summarize(new_classes[truth][order], new_clusters[labels][order])
        assert renamed == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=40))
def test_bounds(pairs):
    truth, labels = np.array(pairs).T
    summary = metrics.summarize(truth, labels)
    assert 0 <= summary["acc"] <= summary["purity"] <= 1
    assert -1e-9 <= summary["nmi"] <= 1 + 1e-9
    assert -0.5 - 1e-9 <= summary["ari"] <= 1 + 1e-9


@pytest.mark.parametrize("metric", METRICS)
def test_equal_partitions_score_one(metric):
    truth, _ = _random(0)
    assert metric(truth, 100 - 3 * truth) == pytest.approx(1)


def test_many_more_clusters_than_classes():
    # 500 clusters of 4, each within one of 10 classes: pure, but only 10 of them are matched.
    truth = np.repeat(np.arange(10), 200)
    labels = np.repeat(np.arange(500), 4)
    assert metrics.clustering_accuracy(truth, labels) == pytest.approx(10 * 4 / 2000)
    assert metrics.purity(truth, labels) == 1.0
    assert metrics.matched_confusion(truth, labels)[0].shape == (10, 500)


def test_unsigned_and_mixed_integer_types():
    truth, labels = TRUTH.astype(np.uint8), LABELS.astype(np.int64)
    assert metrics.summarize(truth, labels) == metrics.summarize(TRUTH, LABELS)
    assert metrics.match(truth, labels) == {7: 0, 2: 1}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("truth", "labels", "message"),
    [
        ([0, 1, 1], [0, 1], "truth has 3 entries and labels 2"),
        (np.zeros(0, int), np.zeros(0, int), "truth is empty"),
        ([0, 1], [0.0, 1.0], "labels is of dtype float64; accepted: integers"),
        ([True, False], [0, 1], "truth is of dtype bool"),
        (["a", "b"], [0, 1], "truth is of dtype <U1"),
        ([0, 1], [[0, 1]], "labels has 2 dimensions"),
        (0, [0], "truth has 0 dimensions"),
    ],
)
def test_bad_input(function, truth, labels, message):
    with pytest.raises(UserError, match=message):
        function(truth, labels)


@pytest.mark.parametrize("values", [[12.2], [12.2] * 3, [0.1] * 10, [7, 7]])
def test_equal_numbers_do_not_spread(values):
    """NumPy's deviation of three times 12.2 is 2e-15."""
    assert metrics.spread(values) == {"mean": values[0], "sd": 0.0, "values": values}


def test_numbers_that_spread():
    found = metrics.spread([1.0, 2.0, 6.0])
    assert (found["mean"], found["sd"]) == pytest.approx((3, 7**0.5))
