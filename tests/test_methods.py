"""Every method: the contract, runs on one device and on eight, and its formula in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.cluster
import sklearn.mixture

from jkmeans import datasets, training
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import validate
from jkmeans.errors import UserError
from jkmeans.kmeans import assign
from jkmeans.methods import (
    METHODS,
    Batch,
    Clusters,
    autoencoder,
    dcn,
    dec,
    deepcluster_v2,
    dkm,
    example_keys,
    idec,
    make_method,
    method_spec,
    n2d,
    swav,
    vade,
    with_method,
)
from jkmeans.methods.base import first_kmeans
from jkmeans.networks import unit_norm
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    data_parallel,
    gather_examples,
    make_mesh,
)
from jkmeans.training import checkpointing
from tests import tiny
from tests.test_epoch import Listener

B, D, P, K = 16, 6, 4, 3
N = 40
RNG = np.random.default_rng(0)
W = RNG.normal(size=(D, P)).astype(np.float32)
V = RNG.normal(size=(D, P)).astype(np.float32)
X = RNG.uniform(size=(B, D)).astype(np.float32)
VIEW = RNG.uniform(size=(B, D)).astype(np.float32)
OTHER_VIEW = RNG.uniform(size=(B, D)).astype(np.float32)
STORED = RNG.normal(size=(B, P)).astype(np.float32)
LABELS = RNG.integers(0, K, B).astype(np.int32)
CENTROIDS = RNG.normal(size=(K, P)).astype(np.float32)
WEIGHTS = np.ones(B, np.float32)
WEIGHTS[[3, 9, 15]] = 0
REAL = WEIGHTS > 0


class Linear:
    """z = x W, brought to length one where asked; x̂ = z Wᵀ; log-variance x V."""

    def __init__(self, w=W, unit=False):
        self.w, self.unit = w, unit

    def encode(self, x):
        z = x @ self.w
        return unit_norm(z) if self.unit else z

    def encode_distribution(self, x):
        return x @ self.w, 0.3 * x @ V

    def decode(self, z):
        return z @ self.w.T


def batch_of(weights=WEIGHTS, progress=1.0, clustering=True, invariance=False, **changes):
    arrays = {
        "x": X,
        "view": VIEW,
        "other_view": OTHER_VIEW,
        "stored": STORED,
        "labels": LABELS,
        "index": np.where(weights > 0, np.arange(len(weights)), -1).astype(np.int32),
    }
    arrays = {name: jnp.asarray(value) for name, value in (arrays | changes).items()}
    return Batch(
        **arrays,
        weights=jnp.asarray(weights),
        key=jax.random.key(5),
        progress=jnp.float32(progress),
        clustering=clustering,
        invariance=invariance,
    )


def float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def squared_distances(z, c):
    return ((z[:, None] - c[None]) ** 2).sum(-1)


def reconstruction(seen, x=X, w=W):
    seen, x, w = float64(seen, x, w)
    return ((x - seen @ w @ w.T) ** 2).mean(1)


# The contract.


def fake_manifold(embeddings, k, *, seed, **settings):
    """Stands in for UMAP and its mixture, which tests/test_manifold.py is about."""
    assert set(settings) == set(n2d.SPEC.fields)
    found = sklearn.cluster.KMeans(k, n_init=3, random_state=seed).fit(embeddings)
    return found.labels_.astype(np.int32), embeddings


@pytest.fixture(autouse=True)
def _no_umap(monkeypatch):
    monkeypatch.setattr(n2d, "manifold_clusters", fake_manifold)


def config_of(name, **changes):
    if name == "n2d":
        tiny.skip_without_umap()
    return validate(with_method(tiny.config(), name, **changes))


def is_unit(name):
    return name in ("swav", "deepcluster_v2")


def bank_of(name):
    bank = tiny.blobs(n=N, d=P, k=K)[0]
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True) if is_unit(name) else bank
    return bank.astype(np.float32)


BANK_WEIGHTS = np.where(np.arange(N) < N - 5, 1, 0).astype(np.float32)
BANK_INDEX = np.where(BANK_WEIGHTS > 0, np.arange(N), -1).astype(np.int32)


@functools.cache
def started(name):
    """The method and its first clusters on the bank, as the trainer keeps them."""
    method = make_method(config_of(name, centroids__empty="keep"), None)
    key = jax.random.key(1)
    clusters, found = jax.jit(method.initialize)(key, bank_of(name), BANK_WEIGHTS, BANK_INDEX)
    return method, method.blank(K, P, N)._replace(**clusters._asdict()), found


def shapes_of(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def check_assigned(name, clusters, found):
    bank = bank_of(name)
    assert (found.labels.shape, found.labels.dtype) == ((N,), jnp.int32)
    assert (found.distances.shape, found.distances.dtype) == ((N,), jnp.float32)
    assert set(np.asarray(found.labels)) <= set(range(K))
    offsets = bank - np.asarray(clusters.centroids)[found.labels]
    np.testing.assert_allclose(found.distances, (offsets**2).sum(1), rtol=1e-3, atol=1e-5)
    counts = np.bincount(found.labels, weights=BANK_WEIGHTS, minlength=K)
    np.testing.assert_array_equal(found.counts, counts)
    inertia = np.sum(BANK_WEIGHTS * np.asarray(found.distances))
    assert float(found.inertia) == pytest.approx(inertia, rel=1e-4)
    assert (found.n_relocated.shape, found.n_relocated.dtype) == ((), jnp.int32)


@pytest.mark.parametrize("name", METHODS)
def test_clusters_of_a_method(name):
    method, clusters, found = started(name)
    blank = method.blank(K, P, N)
    assert blank.centroids.shape == (K, P)
    assert shapes_of(clusters) == shapes_of(blank)
    assert set(method.learned) <= set(blank._fields)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(clusters))
    check_assigned(name, clusters, found)
    if method.on_host is not None:
        host, labels = method.on_host(bank_of(name), 0)
        assert shapes_of(host) == shapes_of(blank)
        for k in range(K):
            mean = bank_of(name)[labels == k].mean(0)
            np.testing.assert_allclose(host.centroids[k], mean, rtol=1e-5)
        clusters = jax.tree.map(jnp.asarray, host)
    else:
        labels = found.labels
    predicted = method.predict(clusters, jnp.asarray(bank_of(name)))
    np.testing.assert_array_equal(predicted.labels, labels)
    assert predicted.labels.dtype == jnp.int32
    offsets = bank_of(name) - np.asarray(clusters.centroids)[predicted.labels]
    np.testing.assert_allclose(predicted.distances, (offsets**2).sum(1), rtol=1e-3, atol=1e-5)
    assert len(np.unique(predicted.labels)) == K  # Three blobs.


@pytest.mark.parametrize("name", METHODS)
def test_updates_of_a_method(name):
    method, clusters, _ = started(name)
    update = jax.jit(method.update)
    arguments = (bank_of(name), BANK_WEIGHTS, BANK_INDEX)
    # Away from where they are, so that there is something to do.
    moved = clusters._replace(centroids=0.7 * clusters.centroids + 0.3 * clusters.centroids[::-1])
    if is_unit(name):
        moved = moved._replace(centroids=unit_norm(moved.centroids))
    kept, found = update(jax.random.key(2), moved, *arguments, np.int32(0))
    for field, value in kept._asdict().items():
        expected = np.asarray(getattr(moved, field))
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7, err_msg=field)
    check_assigned(name, kept, found)
    changed, found = update(jax.random.key(2), moved, *arguments, np.int32(3))
    whole = moved._replace(**changed._asdict())
    assert shapes_of(whole) == shapes_of(moved)
    check_assigned(name, whole, found)
    if method.on_host is None:
        labels = method.predict(whole, jnp.asarray(bank_of(name))).labels
        np.testing.assert_array_equal(labels, found.labels)


def objective_of(name, method, clusters, batch, w=W):
    return method.objective(Linear(w, is_unit(name)), clusters, batch)


# Which pretrain by reconstruction alone, as DEC does; what else they do is in the default run.
AS_DEC = {"autoencoder", "idec", "dcn", "dkm", "n2d"}


@pytest.mark.parametrize(
    ("name", "clustering"),
    [
        *((name, True) for name in METHODS),
        *((name, False) for name in METHODS if name not in AS_DEC),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in METHODS if name in AS_DEC),
    ],
)
def test_objective_of_a_method(name, clustering):
    method, clusters, _ = started(name)
    batch = batch_of(clustering=clustering)

    def loss(w, learned, batch):
        whole = clusters._replace(**learned)
        z, terms = objective_of(name, method, whole, batch, w)
        return jnp.sum(batch.weights * sum(terms.values())), (z, terms)

    learned = {field: getattr(clusters, field) for field in method.learned}
    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (of_network, of_clusters), (z, terms) = program(W, learned, batch)
    assert (z.shape, z.dtype) == ((B, P), jnp.float32)
    assert terms
    for values in terms.values():
        assert (values.shape, values.dtype) == ((B,), jnp.float32)
        assert np.all(np.isfinite(values[REAL]))
    assert np.all(np.isfinite(of_network))
    assert np.abs(of_network).max() > 1e-4
    for field, gradient in of_clusters.items():
        assert np.all(np.isfinite(gradient)), field
        # Before there are clusters, nothing depends on them.
        assert bool(np.any(gradient != 0)) == clustering, field
    # Whatever is in the padding.
    padded = {
        field: np.where(REAL[:, None], getattr(batch, field), 50.0).astype(np.float32)
        for field in ("x", "view", "other_view", "stored")
    }
    other = batch_of(clustering=clustering, labels=np.where(REAL, LABELS, 1), **padded)
    (again, again_clusters), (_, others) = program(W, learned, other)
    assert set(others) == set(terms)
    for term, values in terms.items():
        np.testing.assert_allclose(others[term][REAL], values[REAL], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, of_network, rtol=1e-4, atol=1e-4)
    for field, gradient in of_clusters.items():
        np.testing.assert_allclose(again_clusters[field], gradient, rtol=1e-4, atol=1e-5)
    if clustering and method.after_step is not None:
        after = method.after_step(clusters, z, batch)
        z_padded = jnp.where(REAL[:, None], z, 50.0)
        for one, two in zip(after, method.after_step(clusters, z_padded, other), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5)
        assert shapes_of(after) == shapes_of(clusters)


# Runs.

# What compiles fast: tests/test_epoch.py has the rest.
CHEAP = {"centroids__init": "sample", "centroids__empty": "keep"}


def images(labels=None):
    """The blobs, less far apart, as images [4, 3] of values in 0 to 1."""
    examples, truth = tiny.blobs()
    examples = examples + np.random.default_rng(1).normal(size=examples.shape)
    examples = (examples - examples.min()) / (examples.max() - examples.min())
    examples = examples.reshape(-1, 4, 3).astype(np.float32)
    return datasets.from_arrays(examples, truth if labels is None else labels, name="blobs")


def run_of(name, dataset=None, **changes):
    config = config_of(name, **CHEAP | changes)
    run = training.Run(config, None, dataset or images(), make_mesh(config.n_devices))
    run.recorder = run.interruption = Listener()
    return run


def train(run, state=None):
    """All epochs from a state on; the states after each, on the host, and the metrics."""
    state = run.create() if state is None else state
    values, n_pretrain = [], run.config.training.n_pretrain_epochs
    for epoch in range(int(state.epoch), run.n_epochs):
        state, found = run.run_epoch(state, epoch)
        values.append(found)
    if run.n_epochs == n_pretrain:
        state, results = run.finish(state, 0.0)
        values.append({k: v for k, v in results.items() if isinstance(v, float)})
        values[-1].pop("train_seconds")
    return state, values


@functools.cache
def trained(name, n_devices):
    run = run_of(name, n_devices=n_devices)
    state, values = train(run)
    return run, state, values


def bits_of(run, state):
    """Parameters, clusters and labels as bytes by name."""
    found = {f"parameters/{k}": np.asarray(v) for k, v in state.parameters.items()}
    found |= {f"clusters/{k}": np.asarray(v) for k, v in state.clusters._asdict().items()}
    found["labels"] = gather_examples(state.labels, run.layout)
    found["bank"] = gather_examples(state.bank, run.layout)
    return {k: v.tobytes() for k, v in found.items()}


# DEC sums over all examples. Codes of SwAV, of the batch of all devices, are below, and joint is in
# tests/test_epoch.py.
@pytest.mark.parametrize("name", tiny.all_but_slow(METHODS, "dec"))
def test_one_device_agrees_with_eight(name):
    one_run, one, values = trained(name, 1)
    run, many, others = trained(name, 8)
    first = one_run.create().parameters
    for path, value in one.parameters.items():
        # Of a whole array: Adam makes a step of its rounding where one gradient is nearly zero.
        difference = np.linalg.norm(np.asarray(many.parameters[path]) - np.asarray(value))
        moved = np.linalg.norm(np.asarray(value) - np.asarray(first[path]))
        assert difference < 0.02 * moved, path
    for field, value in one.clusters._asdict().items():
        found = getattr(many.clusters, field)
        np.testing.assert_allclose(found, value, rtol=5e-3, atol=5e-4, err_msg=field)
    labels = [gather_examples(s.labels, r.layout) for r, s in ((one_run, one), (run, many))]
    assert np.mean(labels[0] != labels[1]) < 0.01
    assert len(values) == len(others)
    for mine, theirs in zip(values, others, strict=True):
        assert set(mine) == set(theirs)
        for metric, value in mine.items():
            counted = metric in ("acc", "nmi", "ari", "purity", "label_change")
            near = pytest.approx(value, rel=3e-3, abs=1e-2 if counted else 1e-4)
            assert theirs[metric] == near, metric
    losses = [found["loss"] for found in values if "loss" in found]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", tiny.all_but_slow(METHODS, "dec", "n2d"))
def test_labels_of_the_data_change_no_bit(name):
    """Nor does a second run with the same seed."""
    run, state, values = trained(name, 1)
    truth = run.dataset.labels
    shuffled = np.random.default_rng(3).permutation(truth)
    other = run_of(name, images(shuffled), n_devices=1)
    clustering = run.config.training.n_epochs > 0
    texts = [
        r.programs.epoch.lower(r.create(), r.rows, clustering=clustering).as_text()
        for r in (run, other)
    ]
    # Arrays that one device has whole may or may not say that they are sharded.
    assert len({text.replace('{"data"}', "{}") for text in texts}) == 1
    other.compiled = run.compiled  # The programs are the same, so compile them once.
    again, others = train(other)
    assert bits_of(other, again) == bits_of(run, state)
    assert [v.get("loss") for v in others] == [v.get("loss") for v in values]
    assert values[-1]["acc"] != others[-1]["acc"]


@pytest.mark.parametrize(
    "name", ["dec", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dcn", "vade", "swav"))]
)
def test_resumed_equals_uninterrupted(name, tmp_path):
    run, end, _ = trained(name, 8)
    state = run.create()
    for epoch in range(3):
        state, values = run.run_epoch(state, epoch)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpointing.save(run, checkpoints, state, 0.0, values, results=None)
        checkpoints.wait()
        other = run_of(name, n_devices=8)
        other.compiled = run.compiled
        restored = checkpointing.restore(other, checkpoints)
    assert restored is not None
    assert int(restored[0].epoch) == 3
    resumed, _ = train(other, restored[0])
    assert bits_of(other, resumed) == bits_of(run, end)
    for one, two in zip(
        jax.tree.leaves(end.optimizer), jax.tree.leaves(resumed.optimizer), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["dec"])
def test_fed_from_the_host_equals_resident(name):
    run, resident, values = trained(name, 8)
    fed_run = run_of(name, n_devices=8, data__placement="host", data__chunk_mebibytes=1)
    assert fed_run.is_fed
    fed, others = train(fed_run)
    for path, value in resident.parameters.items():
        np.testing.assert_allclose(fed.parameters[path], value, rtol=1e-5, atol=1e-6)
    for one, two in zip(resident.clusters, fed.clusters, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        gather_examples(fed.labels, run.layout), gather_examples(resident.labels, run.layout)
    )
    for mine, theirs in zip(values, others, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


CLUSTERING = [name for name, spec in METHODS.items() if "training.n_epochs" not in spec.settings]


@pytest.mark.parametrize("name", tiny.all_but_slow(CLUSTERING, "dec"))
def test_what_clustering_does_not_use_rests(name):
    run, state, _ = trained(name, 1)
    start = run.create()
    for epoch in range(2):
        start, _ = run.run_epoch(start, epoch)
    for path, value in start.parameters.items():
        same = np.array_equal(value, state.parameters[path])
        assert same == (path.startswith("decoder/") and not run.method.decodes), path


# Data that a method cannot be of.


def test_vade_of_values_that_are_no_probabilities_is_refused(tmp_path):
    vectors = tiny.dataset()
    sentence = r"likelihood is 'bernoulli', but the values of the examples go from -\d.* 'gaussian'"
    with pytest.raises(UserError, match=sentence):
        training.train(config_of("vade"), vectors, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    check = method_spec("vade").check_data
    check(config_of("vade", objective__likelihood="gaussian"), vectors, (0, 1))
    check(config_of("vade"), images(), (0, 1))
    # Each process reads a part of its own.
    half = images().examples.copy()
    half[-1] = 2
    half = datasets.Dataset("half", half, 1.0, None)
    check(config_of("vade"), half, (0, 2))
    with pytest.raises(UserError, match="to 2; accepted"):
        check(config_of("vade"), half, (1, 2))


@pytest.mark.parametrize(
    ("n", "fields", "sentence"),
    [
        (20, {}, r"config\.objective\.n_neighbors is 20; accepted: an integer from 2 to 19"),
        (5, {"objective__n_neighbors": 2, "objective__n_components": 4}, "is 4; .* from 1 to 3"),
        (4, {"objective__n_neighbors": 2}, "n_components is 3; .* from 1 to 2"),
        (2, {}, "there are 2 examples; accepted: at least 3"),
    ],
)
def test_n2d_of_too_few_examples_is_refused_before_anything_is_trained(n, fields, sentence):
    data = datasets.from_arrays(tiny.blobs(n=n)[0], None)
    with pytest.raises(UserError, match=sentence):
        method_spec("n2d").check_data(config_of("n2d", **fields), data, (0, 1))
    enough = datasets.from_arrays(tiny.blobs(n=21)[0], None)
    method_spec("n2d").check_data(config_of("n2d"), enough, (0, 1))


# Soft resets (BRB).


def reset_of(kept, name="dec"):
    run = run_of(name, n_devices=1, reset__every=1, reset__kept=kept)
    state = jax.tree.map(jnp.copy, trained(name, 1)[1])
    return state, run.programs.reset(jax.tree.map(jnp.copy, state)), run


def test_a_reset_that_keeps_all_changes_nothing():
    before, after, _ = reset_of(1.0)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_reset_mixes_the_hidden_layers_and_nothing_else():
    before, fresh, _ = reset_of(0.0)
    _, half, run = reset_of(0.75)
    hidden = {"encoder/0/kernel", "encoder/0/bias"}  # Of 12-16-4.
    for path, old in before.parameters.items():
        new = np.asarray(fresh.parameters[path])
        if path not in hidden:
            np.testing.assert_array_equal(new, old)
            np.testing.assert_array_equal(half.parameters[path], old)
            continue
        assert np.all(new != old) or path.endswith("bias")
        mixed = 0.75 * np.asarray(old) + 0.25 * new
        np.testing.assert_allclose(half.parameters[path], mixed, rtol=1e-5, atol=1e-7)
    kernel = np.asarray(fresh.parameters["encoder/0/kernel"])
    bound = np.sqrt(6 / (12 + 16))  # Drawn as the network's own first weights are.
    assert 0.8 * bound < np.abs(kernel).max() <= bound
    assert not np.any(np.asarray(fresh.parameters["encoder/0/bias"]))
    assert not np.any(kernel == np.asarray(run.create().parameters["encoder/0/kernel"]))
    for field in ("optimizer", "clusters", "bank", "labels", "epoch", "step"):
        pairs = zip(
            jax.tree.leaves(getattr(before, field)),
            jax.tree.leaves(getattr(fresh, field)),
            strict=True,
        )
        for one, two in pairs:
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["joint", "dcn"])
def test_only_joint_training_remembers_the_moments_of_pretraining(name):
    run, state, _ = trained(name, 1)
    before = jax.tree.map(np.asarray, state)
    after, _ = run.programs.initialize(jax.tree.map(jnp.copy, state), run.rows)
    kept = [np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(after.optimizer), jax.tree.leaves(before.optimizer), strict=True
    )]  # fmt: skip
    assert int(before.optimizer.count) > 0
    assert np.any(before.optimizer.mu["network"]["encoder/0/kernel"])
    if name == "joint":
        assert all(kept)
    else:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.optimizer))


@pytest.mark.parametrize(
    ("pretraining", "clustering", "fresh"),
    [
        ("adam", "adam", False),
        ("adamw", "adamw", False),
        ("sgd", "sgd", True),
        ("sgd", "adam", True),
    ],
)
def test_joint_training_goes_on_with_the_moments_of_the_same_optimizer(
    pretraining, clustering, fresh
):
    optimizers = {
        "training__optimizer": pretraining, "training__clustering_optimizer": clustering
    }  # fmt: skip
    assert make_method(config_of("joint", **optimizers), None).fresh_optimizer is fresh
    # The user's own always pretrains its network itself.
    users = tiny.config(objective__name="tests.user_code:objective", **optimizers)
    assert not make_method(validate(users), None).fresh_optimizer


def test_a_restart_forgets_moments_of_clusters_alone():
    run, state, _ = trained("dec", 1)
    before = jax.tree.map(np.asarray, state)
    after, _ = run.programs.restart(jax.tree.map(jnp.copy, state), run.rows)
    assert np.any(before.optimizer.mu["clusters"]["centroids"])
    for moments, old in (
        (after.optimizer.mu, before.optimizer.mu),
        (after.optimizer.nu, before.optimizer.nu),
    ):
        assert not np.any(moments["clusters"]["centroids"])
        assert np.any(moments["network"]["encoder/0/kernel"])
        for path, value in old["network"].items():
            np.testing.assert_array_equal(moments["network"][path], value)
    assert int(after.optimizer.count) == int(before.optimizer.count) > 0
    # The clusters are those of k-means on the bank, P among them.
    bank = gather_examples(state.bank, run.layout)
    inertia = sklearn.cluster.KMeans(K, n_init=10, random_state=0).fit(bank).inertia_
    distances = squared_distances(bank, np.asarray(after.clusters.centroids)).min(1)
    assert distances.sum() == pytest.approx(inertia, rel=0.02)
    np.testing.assert_array_equal(after.clusters.target_centroids, after.clusters.centroids)
    assert float(jnp.sum(after.clusters.frequencies)) == pytest.approx(len(bank), rel=1e-4)


def test_a_network_without_hidden_layers_is_refused_before_anything_is_trained():
    fields = {"n_devices": 1, "network__name": "tests.user_code:good"}
    vectors = tiny.dataset()
    with pytest.raises(UserError, match=r"reset\.every is 1, but .* has no hidden_layers"):
        run_of("dec", vectors, **fields, reset__every=1)
    # A run of two epochs is over before the second is reset.
    assert run_of("dec", vectors, **fields, reset__every=2).blueprint.hidden_layers == ()


def test_resets_come_every_so_many_epochs_of_clustering(monkeypatch):
    run = run_of("dec", n_devices=1, reset__every=2, training__n_epochs=6)
    calls = []

    def program(name, state, *others):
        calls.append(name)
        return (state, {"inertia": 0.0}) if name == "restart" else state

    monkeypatch.setattr(run, "compiled", program)
    monkeypatch.setattr(run, "initialize", lambda state: calls.append("initialize") or state)
    monkeypatch.setattr(run, "_await", lambda values, fraction: None)
    found = {}
    for n_done in range(-2, 6):
        calls.clear()
        run.begin_epoch(None, n_done)
        found[n_done] = list(calls)
    again = ["reset", "refresh", "restart"]  # Clusters are of the embeddings after the reset.
    assert found == {n: [] for n in range(-2, 6)} | {0: ["initialize"], 2: again, 4: again}


# DEC and IDEC.


def numpy_q(z, c):
    q = 1 / (1 + squared_distances(*float64(z, c)))
    return q / q.sum(1, keepdims=True)


def numpy_p(q, frequencies):
    p = q**2 / frequencies
    return p / p.sum(1, keepdims=True)


TARGET_CENTROIDS = CENTROIDS + 0.3
FREQUENCIES = np.asarray([7.0, 30.0, 11.0], np.float32)
DEC_CLUSTERS = dec.DECClusters(*map(jnp.asarray, (CENTROIDS, TARGET_CENTROIDS, FREQUENCIES)))


def numpy_divergence(z):
    q = numpy_q(z, CENTROIDS)
    p = numpy_p(numpy_q(STORED, TARGET_CENTROIDS), FREQUENCIES)
    return (p * np.log(p / q)).sum(1)


def test_dec_equals_numpy():
    np.testing.assert_allclose(
        dec.soft_assignment(STORED, CENTROIDS), numpy_q(STORED, CENTROIDS), rtol=1e-5
    )
    q = numpy_q(STORED, CENTROIDS)
    found = dec.target_distribution(jnp.asarray(q, jnp.float32), jnp.asarray(FREQUENCIES))
    np.testing.assert_allclose(found, numpy_p(q, FREQUENCIES), rtol=1e-5)
    z, terms = dec.objective(Linear(), DEC_CLUSTERS, batch_of())
    np.testing.assert_allclose(z, VIEW @ W, rtol=1e-5, atol=1e-6)
    assert set(terms) == {"divergence"}
    np.testing.assert_allclose(terms["divergence"], numpy_divergence(VIEW @ W), rtol=1e-4)
    _, terms = dec.objective(Linear(), DEC_CLUSTERS, batch_of(clustering=False))
    assert set(terms) == {"reconstruction"}
    np.testing.assert_allclose(terms["reconstruction"], reconstruction(VIEW), rtol=1e-5)


def test_dec_has_the_gradients_of_the_paper():
    """Eqs. 4 and 5: 2 Σ (1 + ‖z − c‖²)⁻¹ (p − q)(z − c), with P constant."""
    z = jnp.asarray(VIEW @ W)

    def loss(z, centroids):
        clusters = DEC_CLUSTERS._replace(centroids=centroids)
        return jnp.sum(dec.divergence(z, clusters, batch_of()))

    of_z, of_centroids = jax.grad(loss, argnums=(0, 1))(z, jnp.asarray(CENTROIDS))
    z64, c = float64(z, CENTROIDS)
    p = numpy_p(numpy_q(STORED, TARGET_CENTROIDS), FREQUENCIES)
    factor = 2 * (p - numpy_q(z64, c)) / (1 + squared_distances(z64, c))
    pairs = factor[:, :, None] * (z64[:, None] - c[None])
    np.testing.assert_allclose(of_z, pairs.sum(1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(of_centroids, -pairs.sum(0), rtol=1e-3, atol=1e-5)


def test_frequencies_of_dec_are_of_all_examples():
    _, clusters, found = started("dec")
    bank = bank_of("dec")
    q = numpy_q(bank, clusters.centroids)[BANK_WEIGHTS > 0]
    np.testing.assert_allclose(clusters.frequencies, q.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(clusters.target_centroids, clusters.centroids)
    assert float(found.counts.sum()) == BANK_WEIGHTS.sum()


def test_dec_makes_targets_anew_on_every_device():
    method = make_method(config_of("dec"), DATA_AXIS)
    arguments = (bank_of("dec"), BANK_WEIGHTS, BANK_INDEX)

    def update(bank, weights, index):
        return method.update(jax.random.key(0), DEC_CLUSTERS, bank, weights, index, np.int32(1))[0]

    found = jax.jit(data_parallel(update, make_mesh(8), (SHARDED,) * 3, REPLICATED))(*arguments)
    np.testing.assert_array_equal(found.centroids, CENTROIDS)
    np.testing.assert_array_equal(found.target_centroids, CENTROIDS)
    q = numpy_q(bank_of("dec"), CENTROIDS)[BANK_WEIGHTS > 0]
    np.testing.assert_allclose(found.frequencies, q.sum(0), rtol=1e-5)


@pytest.mark.parametrize("invariance", [False, True])
def test_idec_equals_numpy(invariance):
    batch = batch_of(invariance=invariance)
    z, terms = idec.objective(Linear(), DEC_CLUSTERS, batch, cluster_weight=0.3)
    seen = [X, VIEW] if invariance else [VIEW]
    np.testing.assert_allclose(z, seen[0] @ W, rtol=1e-5, atol=1e-6)
    assert set(terms) == {"reconstruction", "divergence"}
    expected = np.mean([reconstruction(s) for s in seen], axis=0)
    np.testing.assert_allclose(terms["reconstruction"], expected, rtol=1e-4)
    expected = 0.3 * np.mean([numpy_divergence(s @ W) for s in seen], axis=0)
    np.testing.assert_allclose(terms["divergence"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("joint", "dec", "dcn", "deepcluster_v2"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("autoencoder", "idec", "dkm", "n2d")),
    ],
)
def test_invariance_is_the_mean_over_examples_and_views(name):
    method, clusters, _ = started(name)
    z, both = objective_of(name, method, clusters, batch_of(invariance=True))
    of_examples, one = objective_of(name, method, clusters, batch_of(view=X))
    _, two = objective_of(name, method, clusters, batch_of())
    np.testing.assert_allclose(z, of_examples, rtol=1e-6)
    assert set(both) == set(one)
    for term, values in both.items():
        expected = (np.asarray(one[term]) + np.asarray(two[term])) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    # Before there are clusters, views only.
    z, before = objective_of(name, method, clusters, batch_of(clustering=False, invariance=True))
    np.testing.assert_allclose(z, objective_of(name, method, clusters, batch_of())[0], rtol=1e-6)
    _, plain = objective_of(name, method, clusters, batch_of(clustering=False))
    for term, values in before.items():
        np.testing.assert_array_equal(values, plain[term])


# The baseline.


def test_the_baseline_reconstructs():
    z, terms = autoencoder.objective(Linear(), Clusters(jnp.asarray(CENTROIDS)), batch_of())
    np.testing.assert_allclose(z, VIEW @ W, rtol=1e-5, atol=1e-6)
    assert set(terms) == {"reconstruction"}
    np.testing.assert_allclose(terms["reconstruction"], reconstruction(VIEW), rtol=1e-5)


# DCN.


@pytest.mark.parametrize("assignment", ["nearest", "stored"])
def test_dcn_equals_numpy(assignment):
    clusters = dcn.DCNClusters(jnp.asarray(CENTROIDS), jnp.ones(K))
    options = {"centroid_weight": 0.6, "assignment": assignment}
    _, terms = dcn.objective(Linear(), clusters, batch_of(), **options)
    squared = squared_distances(*float64(VIEW @ W, CENTROIDS))
    nearest = squared.argmin(1)
    assert np.any(nearest != LABELS)
    own = squared[np.arange(len(squared)), nearest if assignment == "nearest" else LABELS]
    np.testing.assert_allclose(terms["centroid"], 0.3 * own, rtol=1e-4)
    np.testing.assert_allclose(terms["reconstruction"], reconstruction(VIEW), rtol=1e-5)
    _, terms = dcn.objective(Linear(), clusters, batch_of(clustering=False), **options)
    assert set(terms) == {"reconstruction"}


@pytest.mark.parametrize(
    ("assignment", "initial_count"),
    [("nearest", 0.0), ("nearest", 1.0), ("nearest", 100.0), ("stored", 1.0)],
)
def test_centroids_of_dcn_follow_one_example_after_the_other(assignment, initial_count):
    fields = {"objective__initial_count": initial_count, "objective__assignment": assignment}
    method = make_method(config_of("dcn", **fields), None)
    far = np.concatenate([CENTROIDS, np.full((1, P), 40, np.float32)])  # The last has no example.
    counts = np.full(K + 1, initial_count)
    counts[1] += 5
    clusters = dcn.DCNClusters(jnp.asarray(far), jnp.asarray(counts, jnp.float32))
    after = method.after_step(clusters, jnp.asarray(STORED), batch_of())
    labels = squared_distances(STORED, far).argmin(1) if assignment == "nearest" else LABELS
    c, n = np.float64(far), np.float64(counts)
    for z, label in zip(STORED[REAL], labels[REAL], strict=True):
        n[label] += 1
        c[label] -= (c[label] - z) / n[label]
    np.testing.assert_allclose(after.centroids, c, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after.counts, n)
    assert np.abs(c[:K] - far[:K]).max() > 1e-3


def test_first_counts_of_dcn():
    _, clusters, _ = started("dcn")
    np.testing.assert_array_equal(clusters.counts, np.full(K, 100.0))


# DKM.


def numpy_soft_distance(z, alpha):
    squared = squared_distances(*float64(z, CENTROIDS))
    return (scipy.special.softmax(-alpha * squared, axis=1) * squared).sum(1)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1000.0])
def test_soft_distance_of_dkm(alpha):
    squared = jnp.asarray(squared_distances(STORED, CENTROIDS))
    expected = numpy_soft_distance(STORED, alpha)
    np.testing.assert_allclose(dkm.soft_distance(squared, alpha), expected, rtol=1e-5)
    if alpha == 1000:
        np.testing.assert_allclose(expected, squared.min(1), rtol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(dkm.soft_distance(s, alpha)))(squared)
    assert np.all(np.isfinite(gradient))


def test_inverse_temperatures_of_the_paper():
    found = dkm.inverse_temperatures(0.1, 40)
    expected = 0.1 * 2 ** np.cumsum([0] + [1 / np.log(n) ** 2 for n in range(2, 41)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] == pytest.approx(28.1, abs=0.05)  # As the authors' code gives.
    np.testing.assert_array_equal(dkm.inverse_temperatures(1000.0, 1), [1000])


@pytest.mark.parametrize(
    ("n", "n_epochs"),
    [
        (40, 200),
        (3, 7),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 4), (5, 3), (10, 100))),
    ],
)
def test_dkm_anneals_in_equal_parts(n, n_epochs):
    alphas = dkm.inverse_temperatures(0.5, n)

    @jax.jit
    def values(progress):
        batch = batch_of(progress=0.0)

        def at(progress):
            batch_then = Batch(**{**vars(batch), "progress": progress})
            clusters = Clusters(jnp.asarray(CENTROIDS))
            settings = {"centroid_weight": 1.0, "alphas": alphas, "n_epochs": n_epochs}
            return dkm.objective(Linear(), clusters, batch_then, **settings)[1]["centroid"][0]

        return jax.vmap(at)(progress)

    # At the first step of every epoch, and at its last.
    epochs = np.arange(n_epochs)
    for offset in (0.0, 0.99):
        part = [int(epoch * n // n_epochs) for epoch in epochs]
        if offset and n_epochs % n:
            part = [int(np.floor((epoch + offset) * n / n_epochs)) for epoch in epochs]
        expected = [numpy_soft_distance(VIEW[:1] @ W, alphas[i])[0] for i in part]
        found = values(jnp.asarray(epochs + offset, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dkm_equals_numpy():
    settings = {"centroid_weight": 0.4, "alphas": np.float32([2.0]), "n_epochs": 5}
    _, terms = dkm.objective(Linear(), Clusters(jnp.asarray(CENTROIDS)), batch_of(), **settings)
    expected = 0.4 * numpy_soft_distance(VIEW @ W, 2.0)
    np.testing.assert_allclose(terms["centroid"], expected, rtol=1e-4)
    np.testing.assert_allclose(terms["reconstruction"], reconstruction(VIEW), rtol=1e-5)


# VaDE.

MIXTURE = vade.Mixture(
    jnp.asarray(CENTROIDS),
    jnp.asarray(RNG.normal(size=(K, P)), jnp.float32),
    jnp.asarray([0.3, -1.0, 0.5], jnp.float32),
)


def numpy_log_joint(z):
    means, log_variances, logits = float64(*MIXTURE)
    log_weights = logits - scipy.special.logsumexp(logits)
    densities = [
        scipy.stats.multivariate_normal(mean, np.diag(np.exp(log_variance))).logpdf(z)
        for mean, log_variance in zip(means, log_variances, strict=True)
    ]
    return log_weights[None] + np.stack(densities, axis=-1)


def test_responsibilities_are_those_of_bayes():
    joint = numpy_log_joint(np.float64(STORED))
    np.testing.assert_allclose(vade.log_joint(STORED, MIXTURE), joint, rtol=1e-4, atol=1e-4)
    gamma = np.exp(joint) / np.exp(joint).sum(1, keepdims=True)
    found = np.exp(vade.log_responsibilities(STORED, MIXTURE))
    np.testing.assert_allclose(found, gamma, rtol=1e-3, atol=1e-6)
    labels = vade.predict(MIXTURE, jnp.asarray(STORED)).labels
    np.testing.assert_array_equal(labels, gamma.argmax(1))


def test_divergence_of_vade_is_the_bound_of_eq_12():
    """Every expectation over q(z|x) taken by 200,000 samples, with γ = p(c|z) of one of them."""
    rng = np.random.default_rng(4)
    n = 4
    mean, log_variance = rng.normal(size=(n, P)), rng.normal(size=(n, P)) * 0.5
    z = mean + np.exp(log_variance / 2) * rng.normal(size=(n, P))
    log_gamma = vade.log_responsibilities(jnp.asarray(z, jnp.float32), MIXTURE)
    arguments = [jnp.asarray(a, jnp.float32) for a in (mean, log_variance)]
    found = vade.divergence(*arguments, log_gamma, MIXTURE)
    for i in range(n):
        gamma = scipy.special.softmax(numpy_log_joint(z[i : i + 1])[0])
        samples = mean[i] + np.exp(log_variance[i] / 2) * rng.normal(size=(200_000, P))
        joint = numpy_log_joint(samples).mean(0)  # E log p(z|c) + log π_c.
        posterior = scipy.stats.multivariate_normal(mean[i], np.diag(np.exp(log_variance[i])))
        bound = (gamma * joint).sum() - posterior.logpdf(samples).mean()
        bound -= (gamma * np.log(gamma)).sum()
        assert float(found[i]) == pytest.approx(-bound, rel=0.01, abs=0.02)


def test_with_responsibilities_of_bayes_the_bound_is_the_evidence_of_z():
    """Where q(z|x) is a point, Σ γ_c log(π_c p(z|c) / γ_c) = log p(z): no other γ does better."""
    z = jnp.asarray(STORED)
    log_variance = jnp.full_like(z, -30.0)
    found = vade.divergence(z, log_variance, vade.log_responsibilities(z, MIXTURE), MIXTURE)
    entropy = 0.5 * P * (1 - 30.0)  # Less the constant log 2π, which the bound leaves out.
    evidence = scipy.special.logsumexp(numpy_log_joint(np.float64(STORED)), axis=1)
    expected = -evidence - 0.5 * P * np.log(2 * np.pi) - entropy
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_vade_equals_numpy():
    batch = batch_of()
    z_mean, terms = vade.objective(Linear(), MIXTURE, batch)
    np.testing.assert_allclose(z_mean, VIEW @ W, rtol=1e-5, atol=1e-6)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(example_keys(batch.key, batch.index), 0)
    noise = np.stack([jax.random.normal(key, (P,)) for key in keys])
    z = VIEW @ W + np.exp(0.15 * VIEW @ V) * noise
    probabilities = scipy.special.expit(np.float64(z @ W.T))
    likelihood = X * np.log(probabilities) + (1 - X) * np.log(1 - probabilities)
    np.testing.assert_allclose(terms["reconstruction"], -likelihood.mean(1), rtol=1e-4)
    arguments = [jnp.asarray(a) for a in (VIEW @ W, 0.3 * VIEW @ V)]
    log_gamma = vade.log_responsibilities(jnp.asarray(z), MIXTURE)
    expected = np.asarray(vade.divergence(*arguments, log_gamma, MIXTURE)) / D
    np.testing.assert_allclose(terms["divergence"], expected, rtol=1e-4, atol=1e-5)
    _, before = vade.objective(Linear(), MIXTURE, batch_of(clustering=False))
    probabilities = scipy.special.expit(np.float64(VIEW @ W @ W.T))
    likelihood = X * np.log(probabilities) + (1 - X) * np.log(1 - probabilities)
    assert set(before) == {"reconstruction"}
    np.testing.assert_allclose(before["reconstruction"], -likelihood.mean(1), rtol=1e-4)


def test_vade_of_gaussian_pixels_equals_numpy():
    batch = batch_of()
    _, bernoulli = vade.objective(Linear(), MIXTURE, batch)
    _, terms = vade.objective(Linear(), MIXTURE, batch, 0.2)
    np.testing.assert_array_equal(terms["divergence"], bernoulli["divergence"])
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(example_keys(batch.key, batch.index), 0)
    noise = np.stack([jax.random.normal(key, (P,)) for key in keys])
    z = VIEW @ W + np.exp(0.15 * VIEW @ V) * noise
    # − log N(x; g(z), 0.2 I) per pixel, less its constant.
    expected = -scipy.stats.norm.logpdf(X, z @ W.T, np.sqrt(0.2)) - 0.5 * np.log(2 * np.pi * 0.2)
    np.testing.assert_allclose(terms["reconstruction"], expected.mean(1), rtol=1e-4)
    _, before = vade.objective(Linear(), MIXTURE, batch_of(clustering=False), 0.2)
    squared = ((X - VIEW @ W @ W.T) ** 2).mean(1)
    np.testing.assert_allclose(before["reconstruction"], squared, rtol=1e-4)


def test_stored_responsibilities_are_of_the_examples_and_constant():
    batch = batch_of()
    gamma = scipy.special.softmax(numpy_log_joint(np.float64(STORED)), axis=1)

    def divergence(mixture):
        return vade.objective(Linear(), mixture, batch, stored=True)[1]["divergence"]

    log_gamma = jnp.asarray(np.log(np.maximum(gamma, 1e-30)), jnp.float32)
    arguments = [jnp.asarray(a) for a in (VIEW @ W, 0.3 * VIEW @ V)]
    expected = np.asarray(vade.divergence(*arguments, log_gamma, MIXTURE)) / D
    np.testing.assert_allclose(divergence(MIXTURE), expected, rtol=1e-4, atol=1e-5)
    # With constant γ only − Σ γ log π has the weights in it.
    gradient = jax.grad(lambda mixture: jnp.sum(divergence(mixture)))(MIXTURE)
    weights = scipy.special.softmax(np.float64(MIXTURE.logits))
    expected = (len(gamma) * weights - gamma.sum(0)) / D
    np.testing.assert_allclose(gradient.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vade_of_gaussian_pixels_is_pretrained_as_other_methods_are():
    states = []
    # Decay would move a head that is trained with gradients of zero.
    decays = {"training__optimizer": "adamw", "training__weight_decay": 0.5}
    for name, changes in (("dec", {}), ("vade", {"objective__likelihood": "gaussian"})):
        run = run_of(name, n_devices=1, training__n_pretrain_epochs=2, **decays, **changes)
        state = run.create()
        drawn = jax.tree.map(np.asarray, state.parameters)
        for epoch in range(2):
            state, _ = run.run_epoch(state, epoch)
        states.append(state)
    plain, gaussian = states
    more = set(gaussian.parameters) - set(plain.parameters)
    assert more == {"log_variance/kernel", "log_variance/bias"}
    for path, value in plain.parameters.items():
        np.testing.assert_array_equal(gaussian.parameters[path], value)
    for path in more:
        np.testing.assert_array_equal(gaussian.parameters[path], drawn[path])


def test_cross_entropy_of_extreme_logits():
    logits = jnp.asarray([[200.0, -200.0], [200.0, -200.0]])
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(vade.cross_entropy(logits, x), [0.0, 200.0], atol=1e-6)


def test_maximization_equals_sklearn():
    bank = bank_of("vade") + 10.0  # Away from zero, where squares would cancel.
    gamma = np.random.default_rng(2).dirichlet(np.ones(K), N).astype(np.float32)
    found = vade.maximize(jnp.asarray(bank), jnp.asarray(BANK_WEIGHTS), jnp.asarray(gamma), None)
    real = BANK_WEIGHTS > 0
    theirs = sklearn.mixture.GaussianMixture(K, covariance_type="diag", reg_covar=0.0)
    theirs._initialize(np.float64(bank[real]), np.float64(gamma[real]))
    np.testing.assert_allclose(found.centroids, theirs.means_, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.log_variances), theirs.covariances_, rtol=1e-3)
    weights = scipy.special.softmax(np.float64(found.logits))
    np.testing.assert_allclose(weights, theirs.weights_, rtol=1e-4)


def test_the_first_mixture_is_that_of_sklearn():
    _, mixture, found = started("vade")
    real = BANK_WEIGHTS > 0
    bank = np.float64(bank_of("vade"))[real]
    theirs = sklearn.mixture.GaussianMixture(K, covariance_type="diag", random_state=0).fit(bank)
    order = squared_distances(np.float64(mixture.centroids), theirs.means_).argmin(1)
    np.testing.assert_allclose(mixture.centroids, theirs.means_[order], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(np.exp(mixture.log_variances), theirs.covariances_[order], rtol=2e-2)
    np.testing.assert_array_equal(order[found.labels[real]], theirs.predict(bank))


@pytest.mark.parametrize("max_iter", [0, 1, 100])
def test_without_em_the_first_clusters_are_those_of_kmeans(max_iter):
    """Also where k-means stops before it converges."""
    changes = {"centroids__empty": "keep", "centroids__init_max_iter": max_iter}
    first = first_kmeans(config_of("dec", **changes), None)
    kmeans_found = jax.jit(first)(jax.random.key(1), bank_of("dec"), BANK_WEIGHTS, BANK_INDEX)
    changes["objective__em_iterations"] = 0
    method = make_method(config_of("vade", **changes), None)
    arguments = (jax.random.key(1), bank_of("dec"), BANK_WEIGHTS, BANK_INDEX)
    mixture, found = jax.jit(method.initialize)(*arguments)
    np.testing.assert_array_equal(found.labels, kmeans_found.labels)
    np.testing.assert_array_equal(mixture.centroids, kmeans_found.centroids)
    np.testing.assert_array_equal(mixture.logits, 0.0)
    variance = (found.distances * BANK_WEIGHTS).sum() / BANK_WEIGHTS.sum() / P
    np.testing.assert_allclose(np.exp(mixture.log_variances), variance, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_mixture_learns_at_its_own_rate(rate):
    """One step of descent: the mixture moves by that part of what it would."""
    moved = {}
    for factor in (1.0, rate):
        changes = {
            "objective__mixture_rate_factor": factor,
            "training__clustering_optimizer": "sgd",
            "training__n_pretrain_epochs": 1,
            "training__n_epochs": 1,
            "training__batch_size": 208,  # All of them.
            "n_devices": 1,
        }
        run = run_of("vade", **changes)
        state, _ = run.run_epoch(run.create(), 0)
        state = run.initialize(state)
        before = jax.tree.map(np.asarray, (state.clusters, state.parameters))
        state, _ = run.run_epoch(state, 1)
        after = jax.tree.map(np.asarray, (state.clusters, state.parameters))
        moved[factor] = jax.tree.map(lambda a, b: a - b, after, before)
    (whole, network), (part, same_network) = moved[1.0], moved[rate]
    for field in whole._fields:
        assert np.abs(getattr(whole, field)).max() > 1e-6
        expected = rate * getattr(whole, field)
        np.testing.assert_allclose(getattr(part, field), expected, rtol=1e-2, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, network, same_network)


# SwAV and DeepCluster-v2.

UNIT = STORED / np.linalg.norm(STORED, axis=1, keepdims=True)
PROTOTYPES = CENTROIDS / np.linalg.norm(CENTROIDS, axis=1, keepdims=True)


def numpy_codes(scores, epsilon, n):
    """As the paper's appendix writes it: [b, k] of scores [b, k]."""
    q = np.exp(np.float64(scores) / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(n):
        q /= q.sum(1, keepdims=True) * k
        q /= q.sum(0, keepdims=True) * b
    return (q * b).T


def codes(scores, weights=None, epsilon=0.05, n=3):
    weights = np.ones(len(scores), np.float32) if weights is None else weights
    return np.asarray(swav.sinkhorn(jnp.asarray(scores), jnp.asarray(weights), epsilon, n, None))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_codes_equal_the_textbook(epsilon, n):
    scores = UNIT @ PROTOTYPES.T
    found = codes(scores, epsilon=epsilon, n=n)
    np.testing.assert_allclose(found, numpy_codes(scores, epsilon, n), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_codes_use_clusters_equally_in_the_end():
    scores = UNIT @ PROTOTYPES.T
    once, often = codes(scores, epsilon=0.3, n=1).sum(0), codes(scores, epsilon=0.3, n=100).sum(0)
    np.testing.assert_allclose(often, B / K, rtol=1e-3)
    assert np.abs(once - B / K).max() > np.abs(often - B / K).max()


def test_codes_of_small_epsilon_are_finite():
    found = codes(UNIT @ PROTOTYPES.T, epsilon=1e-3, n=5)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-4)


def test_padding_uses_no_cluster():
    scores = UNIT @ PROTOTYPES.T
    padded = np.where(REAL[:, None], scores, 0.9).astype(np.float32)
    found = codes(padded, WEIGHTS)
    np.testing.assert_allclose(found[REAL], codes(scores[REAL]), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found[~REAL], 0)


def test_codes_of_eight_devices_are_those_of_one():
    scores = (UNIT @ PROTOTYPES.T).astype(np.float32)
    weights = WEIGHTS.copy()
    weights[:2] = 0  # The first device has padding only.

    def local(scores, weights):
        return swav.sinkhorn(scores, weights, 0.05, 3, DATA_AXIS)

    program = data_parallel(local, make_mesh(8), (SHARDED, SHARDED), SHARDED)
    found = jax.jit(program)(scores, weights)
    np.testing.assert_allclose(found, codes(scores, weights), rtol=1e-3, atol=1e-6)


SWAV = {"temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3}


def test_swav_equals_numpy():
    # Prototypes of any length: only their directions count.
    clusters = Clusters(jnp.asarray(3 * CENTROIDS))
    weights = np.ones(B, np.float32)
    z, terms = swav.objective(Linear(unit=True), clusters, batch_of(weights), **SWAV)
    one, two = (x @ W for x in float64(VIEW, OTHER_VIEW))
    one, two = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (one, two))
    np.testing.assert_allclose(z, one, rtol=1e-5, atol=1e-6)
    scores = [e @ np.float64(PROTOTYPES).T for e in (one, two)]
    q = [numpy_codes(s, 0.05, 3) for s in scores]
    log_p = [scipy.special.log_softmax(s / 0.1, axis=1) for s in scores]
    expected = -0.5 * ((q[1] * log_p[0]).sum(1) + (q[0] * log_p[1]).sum(1))
    assert set(terms) == {"swapped"}
    np.testing.assert_allclose(terms["swapped"], expected, rtol=1e-3, atol=1e-4)


def test_codes_of_swav_are_constants():
    def loss(scores):
        return jnp.sum(swav.sinkhorn(scores, jnp.ones(B), 0.05, 3, None) * scores)

    scores = jnp.asarray(UNIT @ PROTOTYPES.T)
    np.testing.assert_allclose(jax.grad(loss)(scores), codes(scores), rtol=1e-5)


def test_prototypes_of_swav_keep_their_length():
    state = trained("swav", 1)[1]
    lengths = np.linalg.norm(state.clusters.centroids, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    found = swav.predict(Clusters(jnp.asarray(5 * CENTROIDS)), jnp.asarray(UNIT))
    np.testing.assert_array_equal(found.labels, (UNIT @ PROTOTYPES.T).argmax(1))


def test_deepcluster_equals_numpy():
    clusters = Clusters(jnp.asarray(PROTOTYPES))
    _, terms = deepcluster_v2.objective(Linear(unit=True), clusters, batch_of(), temperature=0.2)
    z = np.float64(VIEW @ W)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    log_p = scipy.special.log_softmax(z @ np.float64(PROTOTYPES).T / 0.2, axis=1)
    assert set(terms) == {"classification"}
    expected = -log_p[np.arange(B), LABELS]
    np.testing.assert_allclose(terms["classification"], expected, rtol=1e-4)


@pytest.mark.parametrize("empty", ["farthest", "keep"])
def test_deepcluster_does_with_empty_clusters_as_it_is_told(empty):
    method = make_method(config_of("deepcluster_v2", centroids__empty=empty), None)
    # The last prototype is opposite to all examples.
    bank = np.abs(bank_of("deepcluster_v2"))
    prototypes = np.concatenate([bank[: K - 1], -bank[:1]])
    arguments = Clusters(jnp.asarray(prototypes)), bank, BANK_WEIGHTS, BANK_INDEX
    found, _ = jax.jit(method.update)(jax.random.key(0), *arguments, 3)
    stayed = np.allclose(found.centroids[-1], prototypes[-1], atol=1e-6)
    assert stayed == (empty == "keep")


# N2D.


def test_n2d_gives_the_cluster_of_the_nearest_example():
    bank = RNG.normal(size=(50, P)).astype(np.float32)
    labels = RNG.integers(0, K, 50).astype(np.int32)
    clusters = n2d.ManifoldClusters(*map(jnp.asarray, (CENTROIDS, bank, labels)))
    found = n2d.predict(clusters, jnp.asarray(STORED))
    expected = labels[squared_distances(STORED, bank).argmin(1)]
    np.testing.assert_array_equal(found.labels, expected)
    distances = ((STORED - CENTROIDS[expected]) ** 2).sum(1)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4)
    # Which is not that of the nearest mean.
    assert np.any(found.labels != assign(jnp.asarray(STORED), jnp.asarray(CENTROIDS)).labels)
