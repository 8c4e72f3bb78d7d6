"""The compiled epoch: against NumPy, against other device counts, against the host-fed path."""

import re

import jax
import numpy as np
import pytest
import sklearn.cluster

from jkmeans import datasets, training
from jkmeans.epoch import learning_rate
from jkmeans.sharding import gather_examples, make_mesh
from tests import tiny


class Listener:
    """Stands in for the recorder and the interruption of a run."""

    requested = False

    def say(self, text): ...

    def epoch(self, *arguments): ...

    def waiting(self, fraction): ...

    def announced(self):
        return False


def make_run(dataset=None, **changes):
    config = training.configuration.validate(tiny.config(**changes))
    run = training.Run(config, None, dataset or tiny.dataset(), make_mesh(config.n_devices))
    run.recorder = run.interruption = Listener()
    return run


def run_epochs(n: int, **changes):
    run = make_run(**changes)
    state = run.create()
    values = []
    for epoch in range(n):
        state, found = run.run_epoch(state, epoch)
        values.append(found)
    return run, state, values


def on_host(state):
    return jax.tree.map(np.asarray, state)


def forward(parameters, x):
    """The tiny autoencoder in NumPy: activations of every layer."""
    w = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
    layers = [("encoder/0", True), ("encoder/1", False), ("decoder/0", True), ("decoder/1", False)]
    activations = [x]
    for name, relu in layers:
        x = x @ w[f"{name}/kernel"] + w[f"{name}/bias"]
        x = np.maximum(x, 0) if relu else x
        activations.append(x)
    return activations, layers, w


def numpy_gradients(parameters, x, centroids, weight):
    """Gradients of mean ‖x−x̂‖²/d + weight·min‖z−c‖²/p over the rows of x, by hand."""
    (x0, h1, z, h2, out), layers, w = forward(parameters, x)
    n, d = x.shape
    backward = 2 * (out - x0) / (n * d)
    inputs = [x0, h1, z, h2]
    gradients = {}
    for i in (3, 2, 1, 0):
        name, relu = layers[i]
        if relu:
            backward = backward * ([h1, z, h2, out][i] > 0)
        gradients[f"{name}/kernel"] = inputs[i].T @ backward
        gradients[f"{name}/bias"] = backward.sum(0)
        backward = backward @ w[f"{name}/kernel"].T
        if i == 2 and weight:
            distances = ((z[:, None] - centroids[None]) ** 2).sum(-1)
            nearest = centroids[distances.argmin(1)]
            backward = backward + weight * 2 * (z - nearest) / (n * z.shape[1])
    return gradients, z


@pytest.mark.parametrize(
    ("n_devices", "bank", "pretraining"),
    [
        (8, "stored", "sgd"),
        (1, "refreshed", "adam"),
        pytest.param(1, "stored", "sgd", marks=pytest.mark.slow),
        pytest.param(8, "refreshed", "adam", marks=pytest.mark.slow),
    ],
)
def test_epoch_of_clustering_equals_numpy(n_devices, bank, pretraining):
    """Steps, gradients, momentum, bank, Lloyd and label changes, one clustering epoch by hand."""
    run = make_run(
        n_devices=n_devices,
        training__n_pretrain_epochs=0,
        training__optimizer=pretraining,
        training__clustering_optimizer="sgd",
        training__clustering_learning_rate=0.05,
        objective__centroid_weight=0.7,
        objective__warmup_epochs=2.0,
        centroids__init="sample",
        centroids__init_max_iter=0,
        centroids__n_iterations=3,
        centroids__bank=bank,
    )
    state = run.initialize(run.create())
    first_labels = gather_examples(state.labels, run.layout)
    start = on_host(state)
    order = np.asarray(run.programs.order(state))
    state, found = run.run_epoch(state, 1)  # 1: not the epoch that begins with first centroids.
    end = on_host(state)

    x = run.dataset.examples.astype(np.float64)
    layout = run.layout
    # Columns belong to devices one after the other; rows count from the first of the device.
    per_device = order.shape[1] // n_devices
    device = np.repeat(np.arange(n_devices), per_device)
    rows = order + device * (layout.n_rows // n_devices)
    example_of = layout.row_index()
    parameters = {k: v.astype(np.float64) for k, v in start.parameters.items()}
    velocity = {k: np.zeros_like(v) for k, v in parameters.items()}
    z_bank = np.zeros((layout.n_examples, 4))
    seen = []
    for step in range(layout.n_steps):
        chosen = example_of[rows[step]]
        chosen = chosen[chosen >= 0]
        seen.extend(chosen)
        weight = 0.7 * min(1.0, step / layout.n_steps / 2.0)
        gradients, z = numpy_gradients(parameters, x[chosen], start.clusters.centroids, weight)
        z_bank[chosen] = z
        for name, gradient in gradients.items():
            velocity[name] = gradient + 0.9 * velocity[name]
            parameters[name] = parameters[name] - 0.05 * velocity[name]
    assert sorted(seen) == list(range(layout.n_examples))
    for name, value in parameters.items():
        np.testing.assert_allclose(end.parameters[name], value, rtol=2e-4, atol=2e-5)
    if bank == "refreshed":
        z_bank = forward(parameters, x)[0][2]
    np.testing.assert_allclose(gather_examples(state.bank, layout), z_bank, rtol=1e-3, atol=1e-4)
    kmeans = sklearn.cluster.KMeans(
        3, init=start.clusters.centroids, n_init=1, max_iter=3, tol=0, algorithm="lloyd"
    ).fit(z_bank)
    np.testing.assert_allclose(end.clusters.centroids, kmeans.cluster_centers_, atol=1e-3)
    labels = gather_examples(state.labels, layout)
    np.testing.assert_array_equal(labels, kmeans.labels_)
    assert found["inertia"] == pytest.approx(kmeans.inertia_, rel=1e-3)
    assert found["label_change"] == pytest.approx(np.mean(labels != first_labels), abs=1e-6)
    assert found["embedding_variance"] == pytest.approx(z_bank.var(0).sum(), rel=1e-3)
    assert (int(end.epoch), int(end.step)) == (1, 0)


def test_adam_and_pretraining_equal_numpy():
    run, state, _ = run_epochs(1, n_devices=8)
    first = run.create().parameters
    parameters = {k: np.asarray(v, np.float64) for k, v in first.items()}
    order = np.asarray(run.programs.order(run.create()))
    layout = run.layout
    first_row = np.repeat(np.arange(8), order.shape[1] // 8) * (layout.n_rows // 8)
    example_of = layout.row_index()[order + first_row]
    m = {k: np.zeros_like(v) for k, v in parameters.items()}
    v2 = {k: np.zeros_like(v) for k, v in parameters.items()}
    for step in range(layout.n_steps):
        chosen = example_of[step][example_of[step] >= 0]
        x = run.dataset.examples[chosen].astype(np.float64)
        gradients, _ = numpy_gradients(parameters, x, None, 0.0)
        for k, g in gradients.items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v2[k] = 0.999 * v2[k] + 0.001 * g * g
            corrected = v2[k] / (1 - 0.999 ** (step + 1))
            moved = m[k] / (1 - 0.9 ** (step + 1)) / (np.sqrt(corrected) + 1e-8)
            parameters[k] = parameters[k] - 1e-3 * moved
    for name, value in parameters.items():
        np.testing.assert_allclose(state.parameters[name], value, rtol=1e-3, atol=1e-5)


def test_an_optimizer_of_its_own_for_clustering_leaves_pretraining_as_it_was():
    plain = {"training__optimizer": "sgd", "training__learning_rate": 0.1, "n_devices": 1}
    plain |= {"centroids__init": "sample", "centroids__empty": "keep"}  # What compiles fast.
    _, descent, _ = run_epochs(2, **plain, training__clustering_optimizer="sgd")
    run, state, _ = run_epochs(2, **plain, training__clustering_optimizer="adam")
    for name, value in on_host(descent.parameters).items():
        np.testing.assert_array_equal(state.parameters[name], value)
    assert any(np.any(trace) for trace in state.optimizer[0].trace["network"].values())
    state = run.initialize(state)
    momentum, before = on_host(state.optimizer)
    assert int(before.count) == 0
    state, _ = run.run_epoch(state, 2)
    momentum_after, moments = on_host(state.optimizer)
    assert int(moments.count) == run.layout.n_steps
    assert all(np.any(mu) for name, mu in moments.mu["network"].items() if "kernel" in name)
    for name, value in momentum.trace["network"].items():
        np.testing.assert_array_equal(momentum_after.trace["network"][name], value)


@pytest.mark.parametrize(
    ("n_devices", "precision"),
    [
        *(pytest.param(n, "float32", marks=pytest.mark.slow) for n in (2, 3, 8)),
        (8, "bfloat16"),
    ],
)
def test_devices_agree_step_by_step(n_devices, precision):
    """Fed one step at a time from the host, states on 1 and on n devices are the same."""
    changes = {"data__placement": "host", "data__n_shards": 8, "network__precision": precision}
    changes["training__pretrain_precision"] = precision
    runs = [make_run(n_devices=n, **changes) for n in (1, n_devices)]
    states = [run.create() for run in runs]
    orders = [
        np.asarray(run.programs.order(state)) for run, state in zip(runs, states, strict=True)
    ]
    for run in runs:
        run.feeder._n_steps = 1
    feeds = [list(run.feeder.chunks(order)) for run, order in zip(runs, orders, strict=True)]
    for step in range(runs[0].n_steps):
        states = [
            run.programs.steps(state, run.rows, *feed[step], clustering=False)
            for run, state, feed in zip(runs, states, feeds, strict=True)
        ]
        one, many = (on_host(state) for state in states)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            (one.parameters, one.optimizer, one.totals),
            (many.parameters, many.optimizer, many.totals),
        )
        banks = [gather_examples(s.bank, r.layout) for r, s in zip(runs, states, strict=True)]
        np.testing.assert_allclose(*banks, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_views_of_clustering_alone():
    """The network is pretrained on examples themselves, and clusters views of them."""
    examples = np.random.default_rng(0).uniform(size=(96, 5, 4)).astype(np.float32)
    images = datasets.from_arrays(examples, None, name="images")
    views = {"augmentation__shift": 2.0}
    alone = views | {"augmentation__pretraining": False}

    def train(n_epochs, changes):
        options = {"training__n_pretrain_epochs": 1, "training__n_epochs": 1}
        run = make_run(images, **options, centroids__init="sample", **changes)
        state, found = run.create(), []
        for epoch in range(n_epochs):
            state, _ = run.run_epoch(state, epoch)
            found.append(on_host(state.parameters))
        return found

    def differ(some, others):
        pairs = zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
        return any((a != b).any() for a, b in pairs)

    without, clustering = train(2, {}), train(2, alone)
    assert not differ(clustering[0], without[0])
    assert differ(clustering[1], without[1])
    assert differ(train(1, views)[0], without[0])


@pytest.mark.slow
@pytest.mark.parametrize("n_devices", [3, 8])
@pytest.mark.parametrize("init", ["sample", "k-means++", "k-means||"])
def test_devices_agree_over_a_run(n_devices, init):
    _, one, values = run_epochs(4, n_devices=1, centroids__init=init)
    _, many, others = run_epochs(4, n_devices=n_devices, centroids__init=init)
    for name, value in one.parameters.items():
        np.testing.assert_allclose(many.parameters[name], value, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(many.clusters.centroids, one.clusters.centroids, rtol=1e-3)
    for mine, theirs in zip(values, others, strict=True):
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("bank", "n_devices"),
    [
        ("stored", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("refreshed", 1), ("stored", 2), ("stored", 8), ("refreshed", 8))
        ),
    ],
)
def test_host_fed_epochs_equal_resident_ones(bank, n_devices):
    changes = {"n_devices": n_devices, "centroids__bank": bank}
    run, resident, values = run_epochs(4, data__placement="device", **changes)
    assert not run.is_fed
    run, fed, others = run_epochs(4, data__placement="host", data__chunk_mebibytes=1, **changes)
    assert run.is_fed
    assert run.rows.examples is None
    for name, value in resident.parameters.items():
        np.testing.assert_allclose(fed.parameters[name], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        gather_examples(fed.labels, run.layout), gather_examples(resident.labels, run.layout)
    )
    for mine, theirs in zip(values, others, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_every_re_computation_counts_each_example_once():
    run, state, _ = run_epochs(4, n_devices=8, centroids__n_iterations=1, data__n_shards=5)
    bank = gather_examples(state.bank, run.layout).astype(np.float64)
    assert bank.shape[0] == tiny.N_EXAMPLES
    assert np.abs(bank).sum(1).min() > 0


def test_centroids_stay_between_re_computations():
    run = make_run(centroids__every=2, centroids__init="sample", training__n_epochs=4)
    state = run.create()
    seen = []
    for epoch in range(6):
        state, _ = run.run_epoch(state, epoch)
        seen.append(np.asarray(state.clusters.centroids))
    assert not np.array_equal(seen[2], seen[3])
    assert np.array_equal(seen[3], seen[4])
    assert not np.array_equal(seen[4], seen[5])


def collectives(text: str) -> dict[str, int]:
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}


def compiled_epoch(clustering: bool, n_devices: int = 8, **changes) -> str:
    run = make_run(n_devices=n_devices, **changes)
    lowered = run.programs.epoch.lower(run.create(), run.rows, clustering=clustering)
    return lowered.compile().as_text()


def test_collectives_of_an_epoch():
    none = {"all-gather": 0, "all-to-all": 0, "collective-permute": 0, "reduce-scatter": 0}
    # Pretraining: one in the step, two for the variance.
    assert collectives(compiled_epoch(False)) == none | {"all-reduce": 3}
    # Clustering: besides, one in the Lloyd iteration. The counts of the final assignment need one
    # too, which XLA combines with that of the mean of the bank.
    keep = compiled_epoch(True, centroids__empty="keep")
    assert collectives(keep) == none | {"all-reduce": 4}
    # On one device the gradients would be copied for it.
    assert collectives(compiled_epoch(False, n_devices=1)) == none | {"all-reduce": 0}


@pytest.mark.slow
def test_a_balance_term_costs_one_more_collective_a_step():
    # Its backward sum is of the weights alone, and travels with the forward one.
    changes = {"centroids__empty": "keep", "objective__balance_weight": 0.1}
    assert collectives(compiled_epoch(True, **changes))["all-reduce"] == 5


@pytest.mark.parametrize("pretraining", [False, True])
def test_each_phase_has_a_precision_of_its_own(pretraining):
    name = "training__pretrain_precision" if pretraining else "network__precision"
    run = make_run(n_devices=1, **{name: "bfloat16"})
    state = run.create()
    for clustering in (False, True):
        text = run.programs.epoch.lower(state, run.rows, clustering=clustering).as_text()
        assert ("bf16" in text) == (clustering != pretraining)
    refresh = run.programs.refresh.lower(state, run.rows).as_text()
    assert ("bf16" in refresh) != pretraining


def test_one_epoch_is_one_program_without_host_calls():
    text = compiled_epoch(True)
    for sign in ('custom_call_target="xla_python', "infeed", "outfeed", "send(", "recv("):
        assert sign not in text


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate(schedule):
    other = {"constant": "cosine", "cosine": "constant"}[schedule]
    options = tiny.config(
        training__schedule=schedule,
        training__clustering_schedule=other,
        training__n_pretrain_epochs=10,
        training__n_epochs=10,
    ).training
    for clustering, chosen in ((False, schedule), (True, other)):
        rates = [float(learning_rate(options, clustering, epoch, 0, 4)) for epoch in (0, 5, 10)]
        expected = [1e-3, 1e-3, 1e-3] if chosen == "constant" else [1e-3, 5e-4, 0.0]
        assert rates == pytest.approx(expected, abs=1e-9)
