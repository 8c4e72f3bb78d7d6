"""The joint objective: its formula in NumPy, on one device and on eight; the user's own."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans import training
from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import all_sum
from jkmeans.methods import Batch, Clusters, example_keys
from jkmeans.methods.joint import imbalance, joint, objective, warmup
from jkmeans.sharding import DATA_AXIS, REPLICATED, SHARDED, data_parallel, make_mesh, to_varying
from tests import tiny
from tests.test_epoch import make_run

B, D, P, K = 16, 6, 4, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, D)).astype(np.float32)
W = RNG.normal(size=(D, P)).astype(np.float32)
CENTROIDS = RNG.normal(size=(K, P)).astype(np.float32)
WEIGHTS = np.ones(B, np.float32)
WEIGHTS[[3, 9, 10, 15]] = 0
SETTINGS = {
    "reconstruction_weight": 0.6,
    "centroid_weight": 0.7,
    "warmup_epochs": 4.0,
    "balance_weight": 0.3,
    "temperature": 0.5,
    "assignment": "nearest",
    "decoder": True,
}


class Linear:
    """z = x W, x̂ = z Wᵀ."""

    def __init__(self, w):
        self.w = w

    def encode(self, x):
        return x @ self.w

    def decode(self, z):
        return z @ self.w.T


def batch_of(
    x=X,
    weights=WEIGHTS,
    index=None,
    progress=1.0,
    clustering=True,
    axis_name=None,
    view=None,
    labels=None,
):
    index = np.where(weights > 0, np.arange(len(weights)), -1) if index is None else index
    return Batch(
        x=jnp.asarray(x),
        view=jnp.asarray(x if view is None else view),
        other_view=jnp.asarray(x),
        stored=jnp.zeros((len(x), P)),
        weights=jnp.asarray(weights),
        labels=jnp.zeros(len(x), jnp.int32) if labels is None else jnp.asarray(labels),
        index=jnp.asarray(index, jnp.int32),
        key=jax.random.key(5),
        progress=jnp.float32(progress),
        clustering=clustering,
        axis_name=axis_name,
    )


def numpy_terms(x, weights, progress, **settings):
    """The formula of the module's docstring, in float64."""
    s = SETTINGS | settings
    x, w, c = (np.asarray(a, np.float64) for a in (x, W, CENTROIDS))
    z = x @ w
    squared = ((z[:, None] - c[None]) ** 2).sum(-1)
    lam = s["centroid_weight"]
    if s["warmup_epochs"]:
        lam *= min(1, progress / s["warmup_epochs"])
    logits = -squared / s["temperature"]
    soft = np.exp(logits - logits.max(1, keepdims=True))
    soft /= soft.sum(1, keepdims=True)
    usage = (weights[:, None] * soft).sum(0) / weights.sum()
    entropy = -(usage * np.log(usage)).sum()
    return z, {
        "reconstruction": s["reconstruction_weight"] * ((x - z @ w.T) ** 2).sum(1) / D,
        "centroid": lam * squared.min(1) / P,
        "balance": np.full(len(x), s["balance_weight"] * (np.log(K) - entropy)),
    }


@pytest.mark.parametrize("progress", [0.0, 1.0, 2.5, 4.0, 9.0])
def test_terms_equal_numpy(progress):
    batch = batch_of(progress=progress)
    z, terms = objective(Linear(W), Clusters(jnp.asarray(CENTROIDS)), batch, **SETTINGS)
    expected_z, expected = numpy_terms(X, WEIGHTS, progress)
    np.testing.assert_allclose(z, expected_z, rtol=1e-5, atol=1e-5)
    assert set(terms) == set(expected)
    for name, value in terms.items():
        assert value.shape == (B,)
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "clustering", "names"),
    [
        ({}, False, {"reconstruction"}),
        ({"balance_weight": 0.0}, True, {"reconstruction", "centroid"}),
        ({"decoder": False}, True, {"centroid", "balance"}),
    ],
)
def test_only_the_terms_that_stand_are_there(changes, clustering, names):
    settings = SETTINGS | changes
    _, terms = objective(
        Linear(W), Clusters(jnp.asarray(CENTROIDS)), batch_of(clustering=clustering), **settings
    )
    assert set(terms) == names


def test_stored_assignment_pulls_to_the_cluster_of_the_example():
    labels = RNG.integers(0, K, B)
    settings = SETTINGS | {"assignment": "stored"}
    batch = batch_of(labels=labels, progress=9.0)
    z, terms = objective(Linear(W), Clusters(jnp.asarray(CENTROIDS)), batch, **settings)
    squared = ((np.asarray(z) - CENTROIDS[labels]) ** 2).sum(1)
    np.testing.assert_allclose(terms["centroid"], 0.7 * squared / P, rtol=1e-4)
    nearest = numpy_terms(X, WEIGHTS, 9.0)[1]["centroid"]
    assert np.all(terms["centroid"] >= nearest - 1e-4)
    assert np.any(terms["centroid"] > nearest + 1e-2)


def test_the_network_sees_the_view_and_reconstructs_the_example():
    view = RNG.normal(size=X.shape).astype(np.float32)
    clusters = Clusters(jnp.asarray(CENTROIDS))
    z, terms = objective(Linear(W), clusters, batch_of(view=view, progress=9.0), **SETTINGS)
    expected_z, expected = numpy_terms(view, WEIGHTS, 9.0)
    np.testing.assert_allclose(z, expected_z, rtol=1e-5, atol=1e-5)
    for name in ("centroid", "balance"):
        np.testing.assert_allclose(terms[name], expected[name], rtol=1e-4, atol=1e-5)
    error = 0.6 * ((X - expected_z @ W.T) ** 2).mean(1)
    np.testing.assert_allclose(terms["reconstruction"], error, rtol=1e-4)


def test_warmup():
    at = [0.0, 0.5, 2.0, 3.0]
    assert [float(warmup(jnp.float32(t), 2.0)) for t in at] == [0, 0.25, 1, 1]
    assert [float(warmup(jnp.float32(t), 0.0)) for t in at] == [1, 1, 1, 1]


def test_padding_does_not_count():
    """Whatever a row of padding holds, the other rows have the same terms."""
    x = np.where(WEIGHTS[:, None] > 0, X, 1e3).astype(np.float32)
    clusters = Clusters(jnp.asarray(CENTROIDS))
    real = WEIGHTS > 0
    _, one = objective(Linear(W), clusters, batch_of(), **SETTINGS)
    _, two = objective(Linear(W), clusters, batch_of(x), **SETTINGS)
    _, none = objective(Linear(W), clusters, batch_of(X[real], np.ones(12, np.float32)), **SETTINGS)
    for name in one:
        np.testing.assert_allclose(two[name][real], one[name][real], rtol=1e-5)
        np.testing.assert_allclose(none[name], one[name][real], rtol=1e-5)


def test_imbalance():
    corners = jnp.eye(3) * 10
    even = batch_of(weights=np.ones(6, np.float32), x=X[:6])
    uniform = imbalance(jnp.concatenate([corners, corners]), corners, 1.0, even)
    assert float(uniform) == pytest.approx(0, abs=1e-6)
    one = imbalance(jnp.tile(corners[:1], (6, 1)), corners, 1.0, even)
    assert float(one) == pytest.approx(np.log(3), rel=1e-5)
    # Two of three, evenly: log 3 − log 2.
    pair = imbalance(jnp.tile(corners[:2], (3, 1)), corners, 1.0, even)
    assert float(pair) == pytest.approx(np.log(1.5), rel=1e-5)
    gradient = jax.grad(lambda z: imbalance(z, corners, 1.0, even))(jnp.tile(corners[:1], (6, 1)))
    assert np.all(np.isfinite(gradient))


def test_gradient_of_the_centroid_term_pulls_to_the_nearest():
    def loss(w):
        _, terms = objective(
            Linear(w), Clusters(jnp.asarray(CENTROIDS)), batch_of(progress=9.0), **settings
        )
        return jnp.sum(terms["centroid"])

    settings = SETTINGS | {"balance_weight": 0.0, "decoder": False}
    z = X @ W
    nearest = CENTROIDS[((z[:, None] - CENTROIDS[None]) ** 2).sum(-1).argmin(1)]
    expected = X.T @ (2 * 0.7 * (z - nearest) / P)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(W)), expected, rtol=1e-4, atol=1e-4)


# On a mesh.


def gradient_on(n_devices, weights, settings):
    """Loss and gradient of the batch mean, as the trainer takes them: local sums, then one sum."""

    def step(w, x, weights, index):
        def loss(w):
            batch = batch_of(x, weights, index, axis_name=DATA_AXIS)
            clusters = Clusters(jnp.asarray(CENTROIDS))
            _, terms = objective(Linear(w), clusters, batch, **settings)
            return jnp.sum(batch.weights * sum(terms.values()))

        value, gradient = jax.value_and_grad(loss)(to_varying(w, DATA_AXIS))
        total = to_varying(jnp.sum(weights), DATA_AXIS)
        value, gradient, total = all_sum((value, gradient, total), DATA_AXIS)
        return value / total, gradient / total

    mesh = make_mesh(n_devices)
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED)
    program = jax.jit(data_parallel(step, mesh, specs, REPLICATED))
    return program(W, X, weights, np.arange(B, dtype=np.int32))


BALANCE_ALONE = SETTINGS | {
    "decoder": False,
    "centroid_weight": 0.0,
    "balance_weight": 2.0,
    "temperature": 8.0,
}


@pytest.mark.parametrize(
    ("settings", "n_padded"),
    [
        pytest.param(SETTINGS, 4, id="all terms, padded"),
        pytest.param(BALANCE_ALONE, 0, id="balance alone"),
        pytest.param(SETTINGS, 0, id="all terms", marks=pytest.mark.slow),
        pytest.param(BALANCE_ALONE, 4, id="balance alone, padded", marks=pytest.mark.slow),
    ],
)
def test_gradient_on_eight_devices_is_that_of_one(settings, n_padded):
    weights = WEIGHTS.copy()
    weights[:n_padded] = 0  # Of eight devices with two rows each, the first two are all padding.

    def mean_loss(w):
        clusters = Clusters(jnp.asarray(CENTROIDS))
        _, terms = objective(Linear(w), clusters, batch_of(weights=weights), **settings)
        return jnp.sum(weights * sum(terms.values())) / weights.sum()

    value, gradient = jax.value_and_grad(mean_loss)(jnp.asarray(W))
    assert np.abs(gradient).max() > 1e-2
    for n_devices in (1, 8):
        found_value, found = gradient_on(n_devices, weights, settings)
        assert float(found_value) == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_gradient_equals_differences_of_the_formula():
    def loss(w):
        batch = batch_of()
        clusters = Clusters(jnp.asarray(CENTROIDS))
        _, terms = objective(Linear(w), clusters, batch, **SETTINGS)
        return batch.mean(sum(terms.values()))

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(W)))
    global_w = W.astype(np.float64)

    def formula(w):
        x, c = X.astype(np.float64), CENTROIDS.astype(np.float64)
        z = x @ w
        squared = ((z[:, None] - c[None]) ** 2).sum(-1)
        soft = np.exp(-(squared - squared.min(1, keepdims=True)) / 0.5)
        soft /= soft.sum(1, keepdims=True)
        usage = (WEIGHTS[:, None] * soft).sum(0) / WEIGHTS.sum()
        rows = 0.6 * ((x - z @ w.T) ** 2).mean(1) + 0.7 * 0.25 * squared.min(1) / P
        balance = 0.3 * (np.log(K) + (usage * np.log(usage)).sum())
        return (WEIGHTS * rows).sum() / WEIGHTS.sum() + balance

    for place in [(0, 0), (2, 3), (5, 1)]:
        step = np.zeros_like(global_w)
        step[place] = 1e-5
        slope = (formula(global_w + step) - formula(global_w - step)) / 2e-5
        assert gradient[place] == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_example_keys_do_not_depend_on_the_devices():
    index = RNG.permutation(B).astype(np.int32)

    def keys(index):
        return jax.random.key_data(example_keys(jax.random.key(5), index))

    found = [
        np.asarray(jax.jit(data_parallel(keys, make_mesh(n), (SHARDED,), SHARDED))(index))
        for n in (1, 8)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert len(np.unique(found[0], axis=0)) == B
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(5), int(index[7])))
    np.testing.assert_array_equal(found[0][7], expected)


def test_mean_of_a_batch():
    values = RNG.normal(size=(B, 2, 3)).astype(np.float32)
    expected = (WEIGHTS[:, None, None] * values).sum(0) / WEIGHTS.sum()
    np.testing.assert_allclose(batch_of().mean(jnp.asarray(values)), expected, rtol=1e-5, atol=1e-6)

    def mean(values, weights):
        return batch_of(X[:2], weights, np.zeros(2), axis_name=DATA_AXIS).mean(values)

    program = data_parallel(mean, make_mesh(8), (SHARDED, SHARDED), REPLICATED)
    np.testing.assert_allclose(jax.jit(program)(values, WEIGHTS), expected, rtol=1e-5, atol=1e-6)
    empty = batch_of(weights=np.zeros(B, np.float32)).mean(jnp.ones(B))
    assert float(empty) == 0


# In a run.

USERS = "tests.user_code:objective"


@functools.cache
def users_epoch(clustering, n_devices=8):
    changes = {"objective__name": USERS, "n_devices": n_devices}
    if clustering:
        changes["training__n_pretrain_epochs"] = 0
    run = make_run(**changes)
    state = run.create()
    before = {name: np.asarray(value) for name, value in state.parameters.items()}
    state, values = run.run_epoch(state, 0)
    return run, state, values, before


def test_a_users_objective_is_what_is_trained():
    _, _, values, _ = users_epoch(True)
    assert values["loss/mine"] == pytest.approx(0.25)
    assert values["loss/centroid"] > 0
    parts = [value for name, value in values.items() if name.startswith("loss/")]
    assert values["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert "loss/balance" not in values


@pytest.mark.slow
def test_a_users_objective_while_pretraining():
    _, _, values, _ = users_epoch(False)
    assert values["loss/mine"] == pytest.approx(0.25)
    assert values["loss/reconstruction"] > 0
    assert values.get("loss/centroid", 0) == 0


@pytest.mark.slow
def test_a_users_random_numbers_are_those_of_the_examples():
    _, _, eight, _ = users_epoch(True)
    _, _, one, _ = users_epoch(True, 1)
    assert eight["loss/noise"] == pytest.approx(one["loss/noise"], rel=1e-4)
    assert abs(eight["loss/noise"]) < 0.5
    assert eight["loss/noise"] != 0


def test_a_users_objective_has_its_own_settings():
    """The joint objective's numbers do not reach it; its function is called as it is."""
    config = training.configuration.validate(tiny.config(objective__name=USERS))
    method = joint(config, None)
    from tests import user_code

    assert method.objective is user_code.objective
    ours = joint(training.configuration.validate(tiny.config()), None).objective
    assert ours.func is objective
    assert ours.keywords == {
        "reconstruction_weight": 1.0,
        "centroid_weight": 0.1,
        "warmup_epochs": 1.0,
        "balance_weight": 0.0,
        "temperature": 1.0,
        "assignment": "nearest",
        "decoder": True,
    }


@pytest.mark.parametrize("shape", [(D,), (2, 3)])
def test_the_example_of_the_docs_takes_examples_of_any_shape(shape):
    page = Path(__file__).parents[1] / "docs" / "deep_clustering.md"
    (code,) = re.findall(r"^```python\n(# mine\.py.*?)^```", page.read_text(), re.M | re.S)
    mine = {}
    exec(code, mine)

    class Reshaping(Linear):
        def encode(self, x):
            return super().encode(x.reshape(len(x), -1))

        def decode(self, z):
            return super().decode(z).reshape(len(z), *shape)

    clusters = Clusters(jnp.asarray(CENTROIDS))
    z, terms = mine["objective"](Reshaping(W), clusters, batch_of(X.reshape(B, *shape)))
    expected_z, expected = numpy_terms(X, WEIGHTS, 1.0, reconstruction_weight=1.0)
    np.testing.assert_allclose(z, expected_z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(terms["reconstruction"], expected["reconstruction"], rtol=1e-4)
    assert terms["centroid"].shape == (B,)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.user_code:nope", "has no function 'nope'"),
        ("no_such_module:f", "importing no_such_module failed"),
        (":f", "accepted"),
    ],
)
def test_an_objective_that_is_not_there(name, said):
    config = training.configuration.validate(tiny.config(objective__name=name))
    with pytest.raises(UserError, match=said) as caught:
        joint(config, None)
    assert str(caught.value).startswith(f"objective.name is {name!r}")
    accepted = training.configuration.FIELDS["objective.name"].accepted
    assert str(caught.value).endswith(f"; accepted: {accepted}")
