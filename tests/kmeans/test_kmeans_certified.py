"""Labels by low precision are those of full precision, whatever the data are made of."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec

from benchmarks.gpu import bound_use
from jkmeans import KMeans
from jkmeans.kmeans import KMeansResult, assign, assignment, certified, lloyd, nearest
from jkmeans.kmeans.certified import CERTIFIED, COMPARED, RECOMPUTED, certified_nearest
from jkmeans.sharding import make_mesh

ROWS, SAME = PartitionSpec("data"), PartitionSpec()
EXACT = ("exact", "exact-tf32")
_program = jax.jit(certified_nearest, static_argnames=("precision", "block_size"))
_full = jax.jit(nearest)


@pytest.fixture(autouse=True, scope="module")
def _screen_small_problems():
    """Few and short centroids are screened too, so that tests stay small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_FEW_NUMBERS", 0)
        yield


def squared_distances(x, centroids):
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((x[:, None, :] - centroids[None, :, :]) ** 2).sum(axis=2)


def rationals(row):
    return [Fraction(float(value)) for value in row]


def check(x, centroids, found):
    """Certified and compared labels are nearest in exact arithmetic, by rational numbers.

    Recomputed ones are among what float32 may choose.
    """
    x, centroids = np.asarray(x), np.asarray(centroids)
    labels, levels = np.asarray(found.labels), np.asarray(found.levels)
    assert ((labels >= 0) & (labels < len(centroids))).all()
    exact_centroids = [rationals(row) for row in centroids]
    middle = np.asarray(assignment.middle_centroid(jnp.asarray(centroids)))[0]
    reach = max(float(np.linalg.norm((c - middle).astype(np.float64))) for c in centroids)
    for row, label, level in zip(x, labels, levels, strict=True):
        exact_row = rationals(row)
        squared = [
            sum((a - b) ** 2 for a, b in zip(exact_row, c, strict=True)) for c in exact_centroids
        ]
        others = [value for k, value in enumerate(squared) if k != label]
        if level in (CERTIFIED, COMPARED):
            assert not others or squared[label] < min(others)
        else:
            size = reach + float(np.linalg.norm((row - middle).astype(np.float64)))
            slack = 4 * (x.shape[1] + 8) * 2.0**-24 * size**2 + 1e-36
            assert float(squared[label] - min(squared)) <= slack


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize(("n", "d", "k", "block_size"), [(1, 1, 1, None), (300, 33, 40, 64)])
def test_labels_are_those_of_full_precision(n, d, k, block_size, precision):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)).astype(np.float32)
    centroids = rng.normal(size=(k, d)).astype(np.float32)
    found = _program(x, centroids, precision=precision, block_size=block_size)
    np.testing.assert_array_equal(found.labels, squared_distances(x, centroids).argmin(axis=1))
    np.testing.assert_array_equal(found.labels, _full(x, centroids))
    assert found.labels.dtype == jnp.int32
    # Most rows need no second look, or screening them was for nothing.
    if n > 1:
        assert 0 < np.mean(np.asarray(found.levels) != CERTIFIED) < 0.3


FINITE = {"allow_nan": False, "allow_infinity": False, "width": 32}


@st.composite
def problems(draw):
    """Rows and centroids at any scale and offset, some of them copies or next to each other."""
    scale = draw(st.sampled_from([1e-44, 1e-38, 1e-30, 1e-19, 1e-8, 1.0, 1e6, 1e15]))
    offset = draw(st.sampled_from([0.0, 1.0, 1e3, 1e7]))
    numbers = st.floats(-2, 2, **FINITE)
    base = draw(hnp.arrays(np.float32, (9, 3), elements=numbers))
    spread = draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]))
    noise = draw(hnp.arrays(np.float32, (12, 3), elements=numbers))
    pick = draw(hnp.arrays(np.int32, 12, elements=st.integers(0, 8)))
    x = (base[pick] + spread * noise + offset) * scale
    return x.astype(np.float32), ((base[:5] + offset) * scale).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(EXACT))
def test_what_is_certified_is_nearest_in_exact_arithmetic(problem, precision):
    x, centroids = problem
    check(x, centroids, _program(x, centroids, precision=precision))


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.int32, (13, 2), elements=st.integers(-300, 300)),
    hnp.arrays(np.int32, (5, 2), elements=st.integers(-3, 3)),
    st.sampled_from(EXACT),
)
def test_ties_go_to_the_lowest_index(x, centroids, precision):
    # float32 is exact on this lattice, and bfloat16 is not.
    found = _program(x, centroids, precision=precision)
    np.testing.assert_array_equal(found.labels, squared_distances(x, centroids).argmin(axis=1))


@pytest.mark.slow
def test_low_precision_alone_is_wrong_here_and_the_bound_mends_it():
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(50, 20)).astype(np.float32)
    # Rows near the middle between two centroids.
    pairs = rng.integers(0, 50, (500, 2))
    x = centroids[pairs].mean(axis=1) + 1e-3 * rng.normal(size=(500, 20)).astype(np.float32)
    expected = squared_distances(x, centroids).argmin(axis=1)
    fast = _program(x, centroids, precision="fast").labels
    assert np.mean(np.asarray(fast) != expected) > 0.05
    for precision in EXACT:
        found = _program(x, centroids, precision=precision)
        np.testing.assert_array_equal(found.labels, expected)
    assert (_program(x, centroids, precision="fast-tf32").labels == expected).mean() > 0.9


def test_two_candidates_are_compared_and_three_recomputed():
    # Equally far from two or three centroids but for a little, which bfloat16 cannot see.
    centroids = np.array([[1, 0], [-1, 0], [0, 1], [0, 50]], np.float32)
    x = np.array([[1e-4, -0.3], [-1e-4, -0.3], [1e-4, 2e-4], [0, 49]], np.float32)
    found = _program(x, centroids, precision="exact")
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.levels, [COMPARED, COMPARED, RECOMPUTED, CERTIFIED])


def test_twins_are_never_certified():
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    centroids = np.concatenate([x[:3], x[:3]])
    found = _program(x, centroids, precision="exact")
    assert (found.levels == RECOMPUTED).all()
    np.testing.assert_array_equal(found.labels, _full(x, centroids))
    assert (found.labels < 3).all()


def test_tight_clusters_far_from_the_origin_stay_certified():
    # In bfloat16 itself neighbours are 512 apart here.
    rng = np.random.default_rng(1)
    means = 1e5 + 4 * rng.normal(size=(20, 8))
    x = (means[rng.integers(0, 20, 400)] + 0.1 * rng.normal(size=(400, 8))).astype(np.float32)
    centroids = means.astype(np.float32)
    found = _program(x, centroids, precision="exact")
    np.testing.assert_array_equal(found.labels, squared_distances(x, centroids).argmin(axis=1))
    assert np.mean(np.asarray(found.levels) == CERTIFIED) > 0.95


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_extreme_scales_are_recomputed_and_not_guessed(scale):
    rng = np.random.default_rng(2)
    x = (scale * rng.uniform(-1, 1, size=(50, 4))).astype(np.float32)
    found = _program(x, x[:6], precision="exact")
    np.testing.assert_array_equal(found.labels, _full(x, x[:6]))
    assert (found.levels == RECOMPUTED).all()


def test_what_only_the_format_cannot_hold_spoils_no_other_row():
    # 3.4e38 rounds to infinity in bfloat16 and is finite in float32.
    x = np.array([[1.0, 0], [3.4e38, 0], [np.inf, 0], [np.nan, 0], [-1, 0]], np.float32)
    centroids = np.array([[1, 0], [-1, 0], [0, 3]], np.float32)
    found = _program(x, centroids, precision="exact")
    np.testing.assert_array_equal(found.labels, _full(x, centroids))
    np.testing.assert_array_equal(np.asarray(found.levels)[[0, 4]], CERTIFIED)
    np.testing.assert_array_equal(np.asarray(found.levels)[[1, 2, 3]], RECOMPUTED)


def test_a_centroid_that_is_nan_certifies_nothing():
    x = np.random.default_rng(3).normal(size=(20, 3)).astype(np.float32)
    centroids = np.concatenate([x[:4], np.full((1, 3), np.nan, np.float32)])
    found = _program(x, centroids, precision="exact")
    np.testing.assert_array_equal(found.labels, _full(x, centroids))
    assert (found.levels == RECOMPUTED).all()


@pytest.mark.parametrize("dtype", [pytest.param(np.uint8, marks=pytest.mark.slow), jnp.bfloat16])
def test_rows_that_the_format_holds_are_certified_more_often(dtype):
    # Centroids at multiples of 1/2: nothing is rounded but sums.
    rng = np.random.default_rng(4)
    x = rng.integers(0, 60, size=(300, 4)).astype(dtype)
    centroids = rng.integers(0, 60, size=(20, 4)).astype(np.float32)
    found = _program(jnp.asarray(x), centroids, precision="exact")
    squared = squared_distances(x, centroids)
    np.testing.assert_array_equal(found.labels, squared.argmin(axis=1))
    two = np.sort(squared, axis=1)
    tied = two[:, 0] == two[:, 1]
    assert tied.any()
    np.testing.assert_array_equal(np.asarray(found.levels) != CERTIFIED, tied)


def test_float64_is_the_arithmetic_of_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        centroids = rng.normal(size=(30, 8))
        # Nearer to one of two centroids by less than float32 can tell.
        x = (centroids[:15] + centroids[15:]) / 2 + 1e-9 * rng.normal(size=(15, 8))
        found = _program(x, centroids, precision="exact")
        expected = squared_distances(x, centroids).argmin(axis=1)
        np.testing.assert_array_equal(found.labels, expected)
        rows = x.astype(np.float32)
        np.testing.assert_array_equal(
            _program(rows, centroids, precision="exact").labels,
            squared_distances(rows, centroids).argmin(axis=1),
        )
        # Beyond what float32 holds, in both directions.
        for scale in (1e-60, 1e60):
            found = _program(scale * x, scale * centroids, precision="exact")
            np.testing.assert_array_equal(found.labels, expected)


@pytest.mark.parametrize("precision", ["exact", pytest.param("exact-tf32", marks=pytest.mark.slow)])
def test_the_bound_holds_for_every_pair_and_is_not_idle(precision):
    """Also of numbers between 10⁻⁴ and 10⁴, and of sums that cancel."""
    assert 0.05 < bound_use(precision, 40) < 1


def tensor_core(x: np.ndarray, c: np.ndarray, *, block: int, extra_bits: int) -> np.ndarray:
    """Dot products x·c, added as a tensor core adds: float64 holding float32 values.

    After the models of Khattak and Mikaitis ("Accurate models of NVIDIA tensor cores"), which agree
    with the hardware bit for bit: ``block`` products, not normalised, and the accumulator are
    aligned to the largest exponent among them, cut there ``extra_bits`` beyond the 23 of float32,
    added exactly, and the sum is cut to float32. A100: blocks of 8 and 1 bit; H100 and H200: 16
    and 2 for bfloat16, 8 and 2 for TensorFloat-32.

    Args:
      x, c: [..., d] float32 whose products float32 holds.
      block: products of a step.
      extra_bits: kept beyond float32 while adding.
    """
    x, c = np.broadcast_arrays(x.astype(np.float64), c.astype(np.float64))
    total = np.zeros(x.shape[:-1])

    def exponent(values: np.ndarray) -> np.ndarray:
        return np.where(values == 0, -1000, np.frexp(values)[1] - 1)

    for start in range(0, x.shape[-1], block):
        some = slice(start, start + block)
        terms = np.concatenate([x[..., some] * c[..., some], total[..., None]], axis=-1)
        of_products = exponent(x[..., some]) + exponent(c[..., some])
        exponents = np.concatenate([of_products, exponent(total)[..., None]], axis=-1)
        quantum = np.ldexp(1.0, np.maximum(exponents.max(-1), -120) - 23 - extra_bits)[..., None]
        exact = np.sum(np.trunc(terms / quantum) * quantum, axis=-1)
        ulp = np.ldexp(1.0, np.maximum(exponent(exact), -126) - 23)
        total = np.trunc(exact / ulp) * ulp
    return total


CORES = {"A100": (8, 1), "H100": (16, 2), "H100, TensorFloat-32": (8, 2), "coarsest": (4, 0)}


@pytest.mark.parametrize(
    "core",
    [
        *(pytest.param(core, marks=pytest.mark.slow) for core in ("A100", "H100")),
        *("H100, TensorFloat-32", "coarsest"),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "positive", "large first", "cancelling", "spread"])
def test_the_bound_holds_as_tensor_cores_add(kind, core):
    """The premise of step 2 in the module's docstring, and E with it."""
    block, extra_bits = CORES[core]
    bits = 10 if "Float" in core else 7
    rng = np.random.default_rng(3)
    for d in (17, 256):
        x, c = rng.normal(size=(2, 40, d))
        if kind == "positive":
            x, c = np.abs(x), np.abs(c)
        elif kind == "large first":  # All that follows is cut at the size of the first.
            x[:, 0], c[:, 0] = 2.0**12, 1.0
            x[:, 1:], c[:, 1:] = np.abs(x[:, 1:]), np.abs(c[:, 1:])
        elif kind == "cancelling":
            half = d // 2
            x[:, half : 2 * half], c[:, half : 2 * half] = x[:, :half], -c[:, :half]
        elif kind == "spread":
            x *= 2.0 ** rng.integers(-12, 12, size=x.shape)
        x, c = x.astype(np.float32), c.astype(np.float32)
        low_x, low_c = (np.asarray(certified.rounded(jnp.asarray(v), bits)) for v in (x, c))
        found = tensor_core(low_x[:, None], low_c[None], block=block, extra_bits=extra_bits)
        exact = low_x.astype(np.float64) @ low_c.astype(np.float64).T
        sizes = np.abs(low_x).astype(np.float64) @ np.abs(low_c).astype(np.float64).T
        assert np.all(np.abs(found - exact) <= 3 * d * 2.0**-24 * sizes)

        precision = "exact-tf32" if bits == 10 else "exact"
        # As they are, and as the format has them: E is then of the sums alone.
        for rows, centroids in ((x, c), (low_x, low_c)):
            _, errors = certified.low_scores(jnp.asarray(rows), jnp.asarray(centroids), precision)
            wide_x, wide_c = rows.astype(np.float64), centroids.astype(np.float64)
            half_norms = 0.5 * np.sum(wide_c**2, axis=1)[:, None]
            scores = np.float32(half_norms) - found.T.astype(np.float32)
            true = half_norms - wide_c @ wide_x.T
            assert np.all(np.abs(scores - true) <= np.asarray(errors))


def test_the_model_of_a_tensor_core_cuts_what_is_small():
    x = np.float32([[2.0**12] + [2.0**-12] * 16])
    ones = np.ones_like(x)
    # The first block of 16 sees 15 of the small ones, and its sum is cut to multiples of 2⁻¹¹.
    assert tensor_core(x, ones, block=16, extra_bits=2) == 2.0**12 + 14 * 2.0**-12
    tiny = np.float32([[2.0**12] + [2.0**-14] * 16])
    assert tensor_core(tiny, ones, block=17, extra_bits=2) == 2.0**12
    assert tensor_core(tiny, ones, block=17, extra_bits=3) == 2.0**12 + 2.0**-10


def test_under_vmap_and_grad():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    centroids = rng.normal(size=(3, 9, 5)).astype(np.float32)
    of_sets = jax.jit(jax.vmap(lambda c: assign(x, c, precision="exact", block_size=16).labels))
    labels = of_sets(centroids)
    for i in range(3):
        np.testing.assert_array_equal(labels[i], squared_distances(x, centroids[i]).argmin(axis=1))

    def inertia(x, precision):
        return jnp.sum(assign(x, centroids[0], precision=precision).distances)

    gradient = jax.jit(jax.grad(inertia), static_argnums=1)
    np.testing.assert_array_equal(gradient(x, "exact"), gradient(x, "full"))


def test_over_a_mesh(on_eight_devices):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(320, 5)).astype(np.float32)
    program = on_eight_devices(certified_nearest, certified.Certified(ROWS, ROWS), replicated=(1,))
    found = program(x, x[:9])
    np.testing.assert_array_equal(found.labels, squared_distances(x, x[:9]).argmin(axis=1))


def test_the_score_matrix_is_never_in_memory():
    n, k = 2**17, 512
    x, centroids = jnp.zeros((n, 2)), jnp.zeros((k, 2))
    memory = _program.lower(x, centroids, precision="exact").compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * 4 / 4


def test_share_counts_rows_with_weight():
    levels = jnp.array([CERTIFIED, COMPARED, RECOMPUTED, CERTIFIED], jnp.int8)
    assert certified.share(levels) == 0.5
    assert certified.share(levels, jnp.array([1.0, 2.0, 0.0, 0.0])) == 0.5
    assert certified.share(levels, jnp.zeros(4)) == 0


def test_few_and_short_centroids_are_computed_in_full(monkeypatch):
    monkeypatch.setattr(assignment, "_FEW_NUMBERS", 64)
    x = np.random.default_rng(9).normal(size=(20, 2)).astype(np.float32)
    found = certified_nearest(x, x[:5])
    np.testing.assert_array_equal(found.labels, nearest(x, x[:5]))
    assert (found.levels == RECOMPUTED).all()


def test_an_unknown_precision_is_an_error():
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="precision='bf16': expected one of full, exact,"):
        assign(x, x[:2], precision="bf16")
    with pytest.raises(ValueError, match="precision='full': expected one of exact,"):
        certified_nearest(x, x[:2], precision="full")
    with pytest.raises(ValueError, match="expected 'full' where centroids are sharded"):
        nearest(x, x[:2], precision="exact", centroid_axis="model")


_lloyd = jax.jit(lloyd, static_argnames=("precision", "algorithm"))


@pytest.mark.slow
def test_lloyd_takes_the_same_steps_and_tells_what_it_recomputed(blobs, on_eight_devices):
    weights = np.random.default_rng(0).integers(0, 3, len(blobs)).astype(np.float32)
    expected = _lloyd(blobs, blobs[:6], weights=weights, algorithm="lloyd")
    result = _lloyd(blobs, blobs[:6], weights=weights, precision="exact")
    assert expected.recomputed is None
    assert jax.tree.structure(expected) != jax.tree.structure(result)
    for name in ("labels", "centroids", "inertia", "n_iter", "counts"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))

    # The share by hand: all assignments of the fit, one after the other.
    shares, centroids = [], jnp.asarray(blobs[:6])
    for _ in range(int(expected.n_iter)):
        shares.append(certified.share(_program(blobs, centroids).levels, weights))
        centroids = _lloyd(blobs, centroids, weights=weights, max_iter=1).centroids
    assert 0 < result.recomputed < 0.3
    assert result.recomputed == pytest.approx(np.mean(shares), rel=1e-2)

    specs = KMeansResult(SAME, ROWS, ROWS, SAME, SAME, SAME, SAME, SAME, SAME)
    program = on_eight_devices(
        lambda x, w, c: lloyd(x, c, weights=w, precision="exact", axis_name="data"),
        specs,
        replicated=(2,),
    )
    sharded = program(blobs, weights, blobs[:6])
    np.testing.assert_array_equal(sharded.labels, expected.labels)
    assert sharded.recomputed == pytest.approx(float(result.recomputed), rel=1e-5)


@pytest.mark.slow
def test_lloyd_differentiates_and_only_assigns(blobs):
    def inertia(x, precision):
        return lloyd(x, blobs[:6], precision=precision, max_iter=3, algorithm="lloyd").inertia

    gradient = jax.jit(jax.grad(inertia), static_argnums=1)
    np.testing.assert_array_equal(gradient(blobs, "exact"), gradient(blobs, "full"))
    result = _lloyd(blobs, blobs[:6], precision="exact", max_iter=0)
    share = certified.share(_program(blobs, blobs[:6]).levels)
    assert result.recomputed == pytest.approx(float(share), rel=1e-6)


def test_lloyd_refuses_what_does_not_go_together(blobs):
    with pytest.raises(ValueError, match="precision='exact': expected 'full' with algorithm"):
        lloyd(blobs, blobs[:6], precision="exact", algorithm="bounds")
    with pytest.raises(ValueError, match="precision='half': expected one of full, exact"):
        lloyd(blobs, blobs[:6], precision="half")


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_estimator(blobs, deterministic, tmp_path):
    options = {"n_init": 1, "tol": 0, "init": blobs[:6], "mesh": make_mesh(4)}
    rows = blobs[:319]  # Padded with a row that does not count.
    exact = KMeans(6, precision="exact", deterministic=deterministic, **options).fit(rows)
    full = KMeans(6, deterministic=deterministic, **options).fit(rows)
    np.testing.assert_array_equal(exact.labels_, full.labels_)
    np.testing.assert_array_equal(exact.predict(rows), full.labels_)
    assert exact.n_iter_ == full.n_iter_
    assert 0 < exact.recomputed_ < 0.3
    assert full.recomputed_ is None
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(ValueError, match="precision='exact': expected 'full' where X is a file"):
        exact.fit(tmp_path / "rows.npy")


def test_the_estimator_predicts_as_it_fitted():
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(50, 20)).astype(np.float32)
    x = centroids[rng.integers(0, 50, (500, 2))].mean(axis=1)
    model = KMeans(50, init=centroids, n_init=1, max_iter=1, tol=0, precision="fast").fit(x)
    fast = _program(x, model.cluster_centers_, precision="fast").labels
    np.testing.assert_array_equal(model.predict(x), fast)
    np.testing.assert_array_equal(model.labels_, fast)
    assert model.recomputed_ is None
    with pytest.raises(ValueError, match="The 'precision' parameter of KMeans must be a str among"):
        model.set_params(precision="bf16").fit(x)


@pytest.mark.parametrize("k", [8, 40])
def test_rows_of_a_block_that_reaches_back_keep_their_level(k):
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(k, 40)).astype(np.float32)
    near, step = rng.integers(0, k, 6000), rng.integers(1, k, 6000)
    share = (0.5 + rng.choice([-1, 1], 6000) * 1e-3)[:, None]
    x = (centroids[near] * share + centroids[(near + step) % k] * (1 - share)).astype(np.float32)
    find = jax.jit(lambda x: certified_nearest(x, centroids).levels)
    whole = np.asarray(find(x))
    parts = np.concatenate([find(x[:3000]), find(x[3000:])])
    np.testing.assert_array_equal(whole, parts)
