import numpy as np

from tests.reports import clusters_of, run


def test_nearest_are_in_order_of_distance():
    arguments = run(n=6, k=2, shape=(2, 2))
    arguments["labels"] = np.array([0, 0, 0, 0, 1, 1])
    arguments["distances"] = np.array([3.0, 1.0, np.nan, 2.0, 5.0, 4.0])
    clusters = clusters_of(arguments)
    assert clusters.members(0).tolist() == [1, 3, 0, 2]
    assert clusters.members(1).tolist() == [5, 4]


def test_rows_say_size_and_class():
    arguments = run(n=8, k=3)
    arguments["labels"] = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    arguments["truth"] = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    clusters = clusters_of(arguments, ["bag", "boot"])
    assert [clusters.describe(i) for i in range(3)] == ["4 · 75% boot", "4 · 100% bag", "empty"]
    assert clusters_of(arguments).describe(0) == "4 · 75% class 1"
    assert clusters_of(arguments | {"truth": None}).describe(0) == "4 examples"


def test_matched_clusters_have_the_colours_of_their_classes():
    arguments = run(n=120, k=4)
    new_number = np.array([2, 0, 3, 1])
    arguments["labels"] = new_number[arguments["truth"]]
    clusters = clusters_of(arguments)
    assert np.array_equal(clusters.colours[new_number], clusters.class_colours[:4])
