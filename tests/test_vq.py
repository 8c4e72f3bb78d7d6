"""Parallel stochastic vector quantization: the recursion, the schemes, the simulated machine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.errors import UserError
from jkmeans.sharding import make_mesh
from jkmeans.vq import STEPS, Setting, displacement, make_scheme, make_steps, quantize
from jkmeans.vq.data import cut_patches, first_prototypes
from jkmeans.vq.mixtures import SCALE, cubic_splines, spline_centres, spline_mixture
from jkmeans.vq.schemes import Round, Scheme
from jkmeans.vq.simulation import Shares, deal, run, simulate

K, D, N, M, TAU = 5, 7, 205, 8, 4
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(N, D)).astype(np.float32)
FIRST = DATA[:K]
EPSILON = 0.05


def setting(scheme: str, **changes) -> Setting:
    return Setting(
        **{
            "scheme": scheme,
            "n_workers": M,
            "tau": TAU,
            "delay": 6.0,
            "steps": ("constant", EPSILON, 0.0),
            "duration": 60,
            "n_evaluations": 5,
            **changes,
        }
    )


def reference_quantize(w, samples, t, step_of):
    """The recursion in float64, as the paper writes it."""
    w = np.array(w, np.float64)
    for i, z in enumerate(samples):
        nearest = np.argmin(((w - z) ** 2).sum(axis=1))
        w[nearest] -= step_of(t + 1 + i) * (w[nearest] - z)
    return w


def reference_distortion(w):
    return ((DATA[:, None].astype(np.float64) - w[None]) ** 2).sum(axis=2).min(axis=1).mean()


def samples_of(worker: int, t: int) -> np.ndarray:
    """τ samples of a worker from time t on, of the rows i, i + M, i + 2M, …"""
    own = DATA[worker::M]
    return own[np.arange(t, t + TAU) % len(own)]


@pytest.mark.parametrize(
    ("name", "step_of"),
    [
        ("constant", lambda t: 0.3),
        ("inverse", lambda t: 0.3 / t),
        ("rational", lambda t: 0.3 / (1 + 0.1 * t)),
        ("inverse_sqrt", lambda t: 0.3 / np.sqrt(t)),
    ],
)
def test_quantize_is_the_papers_recursion(name, step_of):
    assert name in STEPS
    found = jax.jit(lambda w, z, t: quantize(w, z, t, make_steps(name, 0.3, 0.1)))(
        FIRST, DATA[:60], jnp.int32(9)
    )
    np.testing.assert_allclose(
        found, reference_quantize(FIRST, DATA[:60], 9, step_of), rtol=2e-5, atol=2e-6
    )


def test_quantize_with_inverse_steps_is_a_running_mean():
    found = quantize(jnp.full((1, D), 1e3), jnp.asarray(DATA), 0, make_steps("inverse", 1.0))
    np.testing.assert_allclose(found[0], DATA.mean(axis=0), atol=1e-5)


def test_quantize_gives_ties_to_the_lowest_index():
    w = jnp.zeros((3, 2))
    found = quantize(w, jnp.ones((1, 2)), 0, make_steps("constant", 0.5))
    np.testing.assert_array_equal(found, [[0.5, 0.5], [0, 0], [0, 0]])


def test_displacement_is_what_the_shared_version_loses():
    after = quantize(jnp.zeros((1, 2)), jnp.ones((1, 2)), 0, make_steps("constant", 0.25))
    np.testing.assert_array_equal(displacement(jnp.zeros((1, 2)), after), [[-0.25, -0.25]])


@pytest.mark.parametrize("scheme", ["averaging", "displacements"])
def test_schemes_a_and_b_against_numpy(scheme):
    found = run(setting(scheme), 0, FIRST, DATA)
    w = FIRST.astype(np.float64)
    distortion = [reference_distortion(w)]
    for t in range(0, 60, TAU):
        versions = [reference_quantize(w, samples_of(i, t), t, lambda t: EPSILON) for i in range(M)]
        if scheme == "averaging":
            w = np.mean(versions, axis=0)
        else:
            w = w - sum(w - version for version in versions)
        if (t + TAU) % 12 == 0:
            distortion.append(reference_distortion(w))
    np.testing.assert_allclose(found.shared, w, atol=1e-4)
    np.testing.assert_allclose(found.distortion, distortion, rtol=1e-5)
    assert found.n_evaluations == 5


def test_one_worker_is_the_sequential_algorithm():
    found = run(setting("averaging", n_workers=1), 0, FIRST, DATA)
    alone = reference_quantize(FIRST, DATA[:60], 0, lambda t: EPSILON)
    np.testing.assert_allclose(found.shared, alone, atol=1e-5)


def test_scheme_c_against_a_journal_of_exchanges():
    """Every exchange written out: what was uploaded and downloaded when."""
    scheme, steps = make_scheme("asynchronous", 6.0), make_steps("constant", EPSILON)
    key = jax.random.key(3)
    advance = jax.jit(lambda state, z, t, key: scheme.advance(state, Round(z, t, steps, key, None)))
    state = scheme.initialize(jnp.asarray(FIRST), jnp.zeros((M, TAU, D)))
    shared = FIRST.astype(np.float64)
    local = [shared.copy() for _ in range(M)]
    begun = [{"local": shared, "shared": shared, "upload": np.zeros((K, D))} for _ in range(M)]
    n_ended = 0
    for number in range(20):
        t = number * TAU
        z = np.stack([samples_of(i, t) for i in range(M)])
        before = np.asarray(state.start)
        state = advance(state, z, jnp.int32(t), jax.random.fold_in(key, number))
        local = [reference_quantize(w, z[i], t, lambda t: EPSILON) for i, w in enumerate(local)]
        ended = [i for i in range(M) if not np.array_equal(before[i], state.start[i])]
        n_ended += len(ended)
        shared = shared - sum((begun[i]["upload"] for i in ended), np.zeros((K, D)))
        for i in ended:
            own = begun[i]["local"] - local[i]
            local[i] = begun[i]["shared"] - begun[i]["upload"] - own
            begun[i] = {"local": local[i], "shared": shared, "upload": own}
        np.testing.assert_allclose(state.shared, shared, atol=2e-5)
        np.testing.assert_allclose(state.local, local, atol=2e-5)
    # An exchange ends in a round of τ = 4 with probability 1 − (5/6)⁴ = 0.52, of 160 rounds: 83
    # with a standard deviation of 6.
    assert 60 < n_ended < 106


def test_scheme_c_without_delay_loses_nothing():
    """With a delay of one sample everything is exchanged every round: all but what is under way."""
    scheme, steps = make_scheme("asynchronous", 1.0), make_steps("constant", EPSILON)
    state = scheme.initialize(jnp.asarray(FIRST), jnp.zeros((M, TAU, D)))
    advance = jax.jit(lambda state, z, t, key: scheme.advance(state, Round(z, t, steps, key, None)))
    for number in range(3):
        z = np.stack([samples_of(i, number * TAU) for i in range(M)])
        state = advance(state, z, jnp.int32(number * TAU), jax.random.key(0))
    np.testing.assert_allclose(state.shared[None] - state.pending, state.base, atol=1e-6, rtol=0)
    assert np.any(np.asarray(state.pending) != 0)


@pytest.mark.parametrize(
    "scheme", [pytest.param("averaging", marks=pytest.mark.slow), "asynchronous"]
)
def test_workers_over_devices_have_the_same_bits(scheme):
    one = run(setting(scheme), 1, FIRST, DATA)
    # One worker a device, and several.
    for n_devices in (8, 2) if scheme == "asynchronous" else (8,):
        many = run(setting(scheme), 1, FIRST, DATA, make_mesh(n_devices))
        np.testing.assert_array_equal(many.shared, one.shared)
        np.testing.assert_allclose(many.distortion, one.distortion, rtol=1e-6)


def test_a_simulation_that_diverges_stops_and_keeps_the_last_good_version():
    # Steps above 2 throw prototypes farther from their samples than they were.
    found = run(setting("displacements", steps=("constant", 2.5, 0.0)), 0, FIRST, DATA)
    n_good = int(found.n_evaluations)
    assert n_good < 5
    assert np.isfinite(found.distortion[: n_good + 1]).all()
    assert np.isnan(found.distortion[n_good + 1 :]).all()
    np.testing.assert_allclose(
        reference_distortion(found.shared), found.distortion[n_good], rtol=1e-5
    )


def test_a_prototype_that_is_no_number_is_no_good_version():
    # It is nearest to no sample, so that the distortion does not show it.
    def advance(state, work):
        return state._replace(shared=state.shared.at[-1].set(jnp.nan))

    class State(NamedTuple):
        shared: jax.Array

    broken = Scheme(lambda prototypes, samples: State(prototypes), advance)
    shares = Shares(jnp.asarray(DATA)[None], jnp.asarray([N]))
    first = np.concatenate([FIRST, 100 + FIRST[:1]])  # The one that is lost is far from all.
    found = simulate(
        jax.random.key(0), jnp.asarray(first), shares, broken, make_steps("constant", 0.1, 0.0),
        tau=TAU, n_rounds=2, n_evaluations=3,
    )  # fmt: skip
    assert int(found.n_evaluations) == 0
    assert np.isnan(found.distortion[1:]).all()
    np.testing.assert_array_equal(found.shared, first)


def test_dealing_gives_every_sample_to_one_worker():
    shares = deal(DATA, M)
    assert shares.counts.sum() == N
    for i in range(M):
        np.testing.assert_array_equal(shares.samples[i, : shares.counts[i]], DATA[i::M])


@pytest.mark.slow
def test_speed_of_displacements_and_of_averages():
    """What the paper is about, on a small mixture: B is M times as fast, A is not."""
    x = spline_mixture(0, 4000, 12, 8, 20)
    steps = ("constant", 0.02, 0.0)
    curves = {
        (scheme, n_workers): run(
            Setting(scheme, n_workers, 5, 1.0, steps, duration=4000, n_evaluations=50), 0, x[:10], x
        ).distortion
        for scheme, n_workers in (("averaging", 1), ("averaging", M), ("displacements", M))
    }
    one = curves["averaging", 1]
    fall = float(one[0] - one[-1])
    np.testing.assert_allclose(curves["averaging", M], one, atol=0.1 * fall)
    # After an eighth of the time B is where the others end.
    assert curves["displacements", M][50 // M + 1] < one[-1] + 0.1 * fall


def test_splines_add_up_to_one_and_are_bells():
    places = np.linspace(3, 9, 50)
    np.testing.assert_allclose(cubic_splines(places, 13).sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(
        cubic_splines(np.array([1.0, 2.0, 3.0, 4.0]), 5)[0], [1 / 6, 4 / 6, 1 / 6, 0], atol=1e-12
    )


def test_mixture_has_orthogonal_coefficients_and_its_noise():
    centres = spline_centres(np.random.default_rng(5), 3, 40, 10)
    # Splines at 40 places determine the 6 coefficients.
    basis = cubic_splines(np.arange(40) * 9 / 40, 10)
    coefficients = np.linalg.lstsq(basis.T, centres.T, rcond=None)[0].T
    np.testing.assert_allclose(coefficients @ coefficients.T, SCALE**2 * np.eye(3), atol=1e-6)
    assert (coefficients[0] > 0).all()  # Drawn from the unit cube, and the first stays as it is.
    x = spline_mixture(5, 3000, 3, 40, 10)
    nearest = ((x[:, None] - centres[None]) ** 2).sum(axis=2).min(axis=1)
    assert nearest.mean() == pytest.approx(40 * (5 * SCALE / 10) ** 2, rel=0.1)


def test_patches_and_first_prototypes():
    images = np.arange(2 * 5 * 4).reshape(2, 5, 4)
    patches = cut_patches(images, 2)
    assert patches.shape == (8, 2, 2)
    np.testing.assert_array_equal(patches[1], images[0, :2, 2:])
    np.testing.assert_array_equal(patches[6], images[1, 2:4, :2])
    first = first_prototypes(np.random.default_rng(0), np.eye(6), 3, 2)
    np.testing.assert_array_equal(np.sort(first, axis=None), [0] * 12 + [0.5] * 6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: make_steps("linear", 1.0), "steps are 'linear'"),
        (lambda: make_steps("constant", 0.0), "a of the steps is 0"),
        (lambda: make_steps("rational", 1.0, -1.0), "b of the steps is -1"),
        (lambda: make_scheme("gossip"), "the scheme is 'gossip'"),
        (lambda: make_scheme("asynchronous", 0.0), "the delay is 0.0"),
        (lambda: make_scheme("asynchronous", -3.0), "the delay is -3.0"),
        (lambda: run(setting("averaging", n_workers=0), 0, FIRST, DATA), "n_workers is 0"),
        (lambda: run(setting("averaging", tau=0), 0, FIRST, DATA), "tau is 0"),
        (lambda: run(setting("averaging", n_workers=300), 0, FIRST, DATA), "there are 300 workers"),
        (lambda: run(setting("averaging", duration=3), 0, FIRST, DATA), "duration is 3"),
        (lambda: run(setting("averaging"), 0, FIRST, DATA[:4]), "there are 5 prototypes"),
        (lambda: run(setting("averaging"), 0, FIRST, 1e25 * DATA), "too large for float32"),
        (lambda: first_prototypes(np.random.default_rng(0), DATA, 300, 1), "300 samples"),
        (lambda: cut_patches(np.zeros((1, 8, 8)), 9), "patch is 9"),
    ],
)
def test_bad_input_is_answered(call, sentence):
    with pytest.raises(UserError, match="accepted") as caught:
        call()
    assert sentence in str(caught.value)
