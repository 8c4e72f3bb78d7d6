import types

import numpy as np
import pytest

from jkmeans.report.results import complete_results, flatten_config
from tests.reports import clusters_of, run


def test_missing_results_are_computed(tmp_path):
    arguments = run()
    clusters = clusters_of(arguments)
    results = complete_results({"inertia": 7.0}, clusters, arguments["metrics"])
    assert results == {
        "acc": 1.0, "nmi": 1.0, "ari": 1.0, "purity": 1.0, "inertia": 7.0, "n_examples": 120,
        "n_clusters": 4, "n_epochs": 12, "empty_clusters": 0, "train_seconds": 12.0,
    }  # fmt: skip
    inertia = complete_results(None, clusters, [])["inertia"]
    assert inertia == pytest.approx(np.square(arguments["distances"]).sum())


def test_config_is_flattened():
    config = types.SimpleNamespace(to_dict=lambda: {"a": {"b": {"c": 1}, "d": {}}, "e": (1, 2)})
    assert flatten_config(config) == {"a.b.c": 1, "a.d": {}, "e": (1, 2)}
    assert flatten_config(None) == {}
