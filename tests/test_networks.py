"""Networks: one contract for all of them, NumPy for the known one, and the user's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from jkmeans.errors import UserError
from jkmeans.naming import resolve
from jkmeans.networks import (
    NETWORKS,
    PRETRAINED_AS,
    blueprint,
    make_network,
    merge,
    split,
    unit_norm,
)

SHAPES = ((8, 8), (28, 28), (7, 5, 3), (12,))
CASES = [
    (name, shape)
    for name, shape in itertools.product(NETWORKS, SHAPES)
    if not (name == "convolutional" and len(shape) == 1)
]


def options(name, **changes):
    values = {"embedding_dim": 4, "widths": (6, 5), "decoder": True, "normalize": False}
    values |= {"initializer": "glorot_uniform", "precision": "float32"}
    return ConfigDict({"name": name} | values | changes)


@functools.cache
def network_of(name, shape, seed=0, **changes):
    return make_network(options(name, **changes), shape, jax.random.key(seed))


def examples(shape, n=3):
    return np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)


def numpy_parameters(network):
    return {name: np.asarray(value) for name, value in split(network)[1].items()}


# The contract.


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=pytest.mark.slow)
        if shape == (28, 28) or (shape == (8, 8) and name != "convolutional")
        else (name, shape)
        for name, shape in CASES
    ],
)
def test_shapes_and_gradients(name, shape):
    network = network_of(name, shape)
    graphdef, parameters = split(network)
    x = examples(shape)

    @jax.jit
    def program(parameters, x):
        def loss(parameters):
            network = merge(graphdef, parameters)
            z = network.encode(x)
            reconstruction = network.decode(z)
            value = jnp.mean((reconstruction - x) ** 2)
            if name == "variational":
                value += jnp.mean(network.encode_distribution(x)[1])
            return value, (z, reconstruction)

        return jax.grad(loss, has_aux=True)(parameters)

    gradients, (z, reconstruction) = program(parameters, x)
    assert (z.shape, z.dtype) == ((3, 4), jnp.float32)
    assert (reconstruction.shape, reconstruction.dtype) == (x.shape, jnp.float32)
    for path, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), path
        assert np.any(gradient != 0), path  # Every parameter takes part.
    # An embedding is that of its example, whatever the others are.
    other = np.concatenate([x[:1], np.full_like(x[1:], 7)])
    again = program(parameters, other)[1][0]
    np.testing.assert_allclose(again[0], z[0], rtol=1e-5, atol=1e-6)
    assert np.abs(again[1] - z[1]).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [*("fully_connected", "convolutional"), pytest.param("variational", marks=pytest.mark.slow)],
)
def test_bfloat16_is_float32_but_for_rounding(name):
    x = examples((8, 8))
    plain, coarse = (
        network_of(name, (8, 8), widths=(64, 64), precision=precision)
        for precision in ("float32", "bfloat16")
    )
    exact, rounded = numpy_parameters(plain), numpy_parameters(coarse)
    assert {path: value.dtype for path, value in rounded.items()} == dict.fromkeys(
        exact, np.dtype(np.float32)
    )
    for path in exact:
        np.testing.assert_array_equal(rounded[path], exact[path])

    def outputs(network):
        graphdef, parameters = split(network)

        def loss(parameters):
            network = merge(graphdef, parameters)
            z = network.encode(x)
            found = network.decode(z)
            return jnp.mean((found - x) ** 2), (z, found)

        gradients, (z, found) = jax.jit(jax.grad(loss, has_aux=True))(parameters)
        assert z.dtype == found.dtype == jnp.float32
        return {"z": z, "found": found} | gradients

    exact, rounded = outputs(plain), outputs(coarse)
    for path, value in exact.items():
        assert rounded[path].dtype == jnp.float32
        size = np.linalg.norm(value)
        off = np.linalg.norm(rounded[path] - value)
        # A gradient changes wholly where rounding turns a ReLU on or off.
        assert off <= (0.01 if path in ("z", "found") else 0.25) * size, path
        assert off > 1e-4 * size or size == 0, path  # It is not float32 after all.


@pytest.mark.parametrize("name", NETWORKS)
def test_the_key_alone_decides(name):
    def bits(seed):
        network = make_network(options(name), (8, 8), jax.random.key(seed))
        return {path: value.tobytes() for path, value in numpy_parameters(network).items()}

    assert bits(3) == bits(3)
    first, second = bits(3), bits(4)
    drawn = [path for path in first if path.endswith("kernel") and "log_variance" not in path]
    assert all(first[path] != second[path] for path in drawn)


@pytest.mark.parametrize("name", NETWORKS)
def test_normalized_embeddings_have_length_one(name):
    x = examples((8, 8))
    z = network_of(name, (8, 8), normalize=True).encode(x)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
    plain = network_of(name, (8, 8)).encode(x)
    np.testing.assert_allclose(z, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_decoder_there_are_no_decoder_parameters(name):
    whole = numpy_parameters(network_of(name, (8, 8)))
    half = numpy_parameters(network_of(name, (8, 8), decoder=False))
    assert set(half) < set(whole)
    assert not any(path.startswith(("decoder", "from_embedding")) for path in half)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("initializer", "bound_of"),
    [
        ("glorot_uniform", lambda i, o: np.sqrt(6 / (i + o))),
        ("fan_in_uniform", lambda i, o: 1 / np.sqrt(i)),
    ],
)
def test_initial_biases_are_zero_and_kernels_bounded(name, initializer, bound_of):
    network = network_of(name, (28, 28), initializer=initializer)
    for path, value in numpy_parameters(network).items():
        if path.startswith("log_variance"):  # The same small variance for all.
            assert np.all(value == (-4.0 if path.endswith("bias") else 0.0))
        elif path.endswith("bias"):
            assert not value.any()
        else:
            field = np.prod(value.shape[:-2], initial=1)
            bound = bound_of(field * value.shape[-2], field * value.shape[-1])
            assert np.abs(value).max() <= bound * 1.0001
            assert np.abs(value).max() > 0.6 * bound


def test_unit_norm_of_zero_is_zero_with_a_finite_gradient():
    z = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(unit_norm(z), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda z: jnp.sum(unit_norm(z)))(z)))


# The fully connected one, by hand.


def test_fully_connected_equals_numpy():
    network = network_of("fully_connected", (7, 5, 3))
    w = {k: np.asarray(v, np.float64) for k, v in split(network)[1].items()}
    assert w["encoder/0/kernel"].shape == (105, 6)
    assert w["encoder/2/kernel"].shape == (5, 4)
    assert w["decoder/0/kernel"].shape == (4, 5)
    x = np.float64(examples((7, 5, 3)))

    def layers(prefix, h):
        for i in range(3):
            h = h @ w[f"{prefix}/{i}/kernel"] + w[f"{prefix}/{i}/bias"]
            h = np.maximum(h, 0) if i < 2 else h
        return h

    z = layers("encoder", x.reshape(3, -1))
    np.testing.assert_allclose(network.encode(jnp.asarray(x, jnp.float32)), z, atol=1e-5)
    assert (z < 0).any()  # No ReLU on the embedding.
    out = layers("decoder", z).reshape(x.shape)
    np.testing.assert_allclose(network.decode(jnp.asarray(z, jnp.float32)), out, atol=1e-5)


# The variational one.


def test_distributions_equal_numpy():
    network = network_of("variational", (7, 5, 3))
    w = {k: np.asarray(v, np.float64) for k, v in split(network)[1].items()}
    assert w["log_variance/kernel"].shape == (5, 4)
    h = np.float64(examples((7, 5, 3))).reshape(3, -1)
    for i in range(2):
        h = np.maximum(h @ w[f"encoder/{i}/kernel"] + w[f"encoder/{i}/bias"], 0)
    mean, log_variance = network.encode_distribution(examples((7, 5, 3)))
    expected = h @ w["log_variance/kernel"] + w["log_variance/bias"]
    np.testing.assert_allclose(log_variance, expected, atol=1e-5)
    expected = h @ w["encoder/2/kernel"] + w["encoder/2/bias"]
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    # What is clustered is the mean.
    np.testing.assert_array_equal(mean, network.encode(examples((7, 5, 3))))


# The convolutional one.


def test_convolutional_refuses_vectors():
    with pytest.raises(UserError, match=r"shape \[12\]; accepted: \[height, width\] or"):
        make_network(options("convolutional"), (12,), jax.random.key(0))


def test_first_convolution_equals_numpy():
    network = network_of("convolutional", (8, 8))
    w = numpy_parameters(network)
    x = np.float64(examples((8, 8)))
    # 3×3, stride 2, SAME: 4×4 outputs, padded by one row and column at the end.
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1)))
    kernel = w["convolutions/0/kernel"][:, :, 0, :]
    first = np.zeros((3, 4, 4, 6))
    for i, j in np.ndindex(4, 4):
        window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        first[:, i, j] = np.einsum("bij,ijc->bc", window, kernel)
    found = network.convolutions[0](jnp.asarray(x, jnp.float32)[..., None])
    np.testing.assert_allclose(found, first, atol=1e-5)


def test_a_channel_axis_of_one_changes_nothing():
    x = examples((8, 8))
    flat, deep = (network_of("convolutional", s) for s in ((8, 8), (8, 8, 1)))
    np.testing.assert_array_equal(flat.encode(jnp.asarray(x)), deep.encode(x[..., None]))


# Taking apart and putting together.


def test_split_and_merge():
    network = network_of("fully_connected", (12,))
    graphdef, parameters = split(network)
    assert set(parameters) == {
        f"{side}/{i}/{kind}"
        for side in ("encoder", "decoder")
        for i in range(3)
        for kind in ("kernel", "bias")
    }
    assert all(isinstance(value, jax.Array) for value in parameters.values())
    shifted = {name: np.asarray(value) + 1 for name, value in parameters.items()}
    again = split(merge(graphdef, dict(reversed(shifted.items()))))
    assert again[0] == graphdef
    for name, value in parameters.items():
        np.testing.assert_array_equal(again[1][name], np.asarray(value) + 1)


def test_split_and_merge_of_more_than_ten_layers():
    # 10 sorts before 2 as text, after it as a number.
    network = network_of("fully_connected", (12,), widths=(3,) * 11)
    graphdef, parameters = split(network)
    numbered = {name: np.float32(i) for i, name in enumerate(parameters)}
    # Through a tree map, which sorts names as text.
    assert split(merge(graphdef, jax.tree.map(lambda leaf: leaf, numbered)))[1] == numbered


# Parts of a network.


@pytest.mark.parametrize(("name", "shape"), [*CASES[:1], ("variational", (12,)), CASES[-1]])
def test_hidden_layers_are_those_before_the_embedding(name, shape):
    network = network_of(name, shape)
    parameters = numpy_parameters(network)
    key = jax.random.key(9)
    fresh = blueprint(options(name), shape, "float32").fresh_hidden_layers(key)
    heads = {"encoder/2", "to_embedding", "log_variance"}
    of_encoder = {p for p in parameters if not p.startswith(network.decoder_layers)}
    assert set(fresh) == {p for p in of_encoder if p.rsplit("/", 1)[0] not in heads}
    assert len(fresh) == 4  # Weights and biases of two layers.
    for path, value in fresh.items():
        assert value.shape == parameters[path].shape
        if path.endswith("kernel"):
            assert not np.any(value == parameters[path])
    half = blueprint(options(name, decoder=False), shape, "float32")
    assert set(half.fresh_hidden_layers(key)) == set(fresh)


@pytest.mark.parametrize(("name", "shape"), [*CASES[:1], ("variational", (12,)), CASES[-1]])
def test_decoder_layers_are_those_of_the_decoder_alone(name, shape):
    whole = set(numpy_parameters(network_of(name, shape)))
    half = set(numpy_parameters(network_of(name, shape, decoder=False)))
    starts = network_of(name, shape).decoder_layers
    assert {path for path in whole if path.startswith(starts)} == whole - half


@pytest.mark.parametrize("name", PRETRAINED_AS)
def test_a_network_that_is_pretrained_as_another_has_its_unpretrained_layers_more(name):
    network = network_of(name, (12,))
    ours, theirs = (
        numpy_parameters(network),
        numpy_parameters(network_of(PRETRAINED_AS[name], (12,))),
    )
    assert {path for path in ours if not path.startswith(network.unpretrained_layers)} == set(
        theirs
    )
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)


def test_a_network_can_be_without_hidden_layers():
    users = blueprint(options("tests.user_code:good"), (12,), "float32")
    assert users.hidden_layers == ()
    assert users.fresh_hidden_layers(jax.random.key(0)) == {}


# The user's own.


def make_users(function, module="tests.user_code", **changes):
    chosen = options(f"{module}:{function}", **changes)
    return make_network(chosen, (12,), jax.random.key(0))


def test_a_users_network():
    network = make_users("good", widths=())
    x = examples((12,))
    assert network.encode(x).shape == (3, 4)
    graphdef, parameters = split(network)
    assert {"inward/kernel", "norm/scale", "outward/bias"} <= set(parameters)
    np.testing.assert_array_equal(merge(graphdef, parameters).encode(x), network.encode(x))
    assert isinstance(network, nnx.Module)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("faulty_batch_norm", r"holds variables of type BatchStat; accepted: nnx.Param only"),
        ("faulty_dropout", r"holds variables of type Rng\w+, Rng\w+; accepted: nnx.Param only"),
        ("faulty_wide_embedding", r"embeddings \[2, 5\] float32; accepted: \[2, 4\] float32"),
        ("faulty_half_precision", r"embeddings \[2, 4\] bfloat16; accepted: \[2, 4\] float32"),
        ("faulty_pair", r"embeddings of type tuple; accepted: \[2, 4\] float32"),
        ("faulty_narrow_reconstruction", r"\[2, 11\] float32; accepted: \[2, 12\] float32"),
        ("faulty_integer_parameter", r"has extra of type int32; accepted: float32"),
        ("faulty_numbered_dictionary", r"a parameter at \('extra', '0'\); accepted: keys"),
        ("faulty_slash", r"a parameter at \('extra', 'a/b'\); accepted: keys"),
        ("without_encode", r"has no method encode\(x\)"),
        ("without_decode", r"has no method decode\(z\), which network.decoder = True asks for"),
        ("no_module", r"is a NoModule; accepted: a flax.nnx.Module"),
        ("missing", r"tests.user_code has no function 'missing'; accepted: 'fully_connected'"),
        ("not_a_function", r"has no function 'not_a_function'"),
    ],
)
def test_a_users_network_that_breaks_the_contract(function, said):
    with pytest.raises(UserError, match=said) as caught:
        make_users(function)
    assert str(caught.value).startswith(f"network.name is 'tests.user_code:{function}'")
    assert "\n" not in str(caught.value)


def test_decode_is_asked_for_only_with_a_decoder():
    make_users("without_decode", decoder=False)
    make_users("faulty_narrow_reconstruction", decoder=False)


@pytest.mark.parametrize(
    ("function", "kind", "said", "note"),
    [
        ("faulty_raises_at_the_start", RuntimeError, "mine, at the start", "while calling"),
        ("faulty_raises_in_encode", RuntimeError, "mine, in encode", r"on x: [2, 12] float32"),
        ("two_arguments", TypeError, "arguments", "with (example_shape, options, rngs)"),
    ],
)
def test_a_users_own_error_comes_through_with_a_note(function, kind, said, note):
    # Its traceback shows the user's own line, which no sentence of ours could.
    with pytest.raises(kind, match=said) as caught:
        make_users(function)
    assert note in caught.value.__notes__[-1]
    assert f"tests.user_code:{function}" in caught.value.__notes__[-1]


# Names.


def test_names():
    known = {"sum": sum}
    assert resolve("sum", known, "f") is sum
    assert resolve("math:prod", known, "f").__name__ == "prod"
    accepted = "; accepted: 'sum' or 'module:function'"
    for name in ("nope", "math:", ":prod", ":", "", ".math:prod"):
        with pytest.raises(UserError) as caught:
            resolve(name, known, "a.field")
        assert str(caught.value) == f"a.field is {name!r}{accepted}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "but importing {module} failed (No module named '{module}')"),
        ("import no_such_dependency\n", "failed (No module named 'no_such_dependency')"),
        ("from math import no_such_name\n", "failed (cannot import name 'no_such_name'"),
        ("def f(:\n", "failed (invalid syntax ({module}.py, line 1))"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, source, said):
    module = f"users_{abs(hash((source, said)))}"
    monkeypatch.syspath_prepend(tmp_path)
    if source:
        (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(UserError) as caught:
        resolve(f"{module}:f", {}, "network.name")
    assert str(caught.value).startswith(f"network.name is '{module}:f', but importing {module} ")
    assert said.format(module=module) in str(caught.value)


def test_a_module_that_raises_while_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_own_error.py").write_text("raise RuntimeError('mine')\n")
    with pytest.raises(RuntimeError, match="mine") as caught:
        resolve("users_own_error:f", {}, "network.name")
    assert caught.value.__notes__ == [
        "while importing users_own_error, because network.name is 'users_own_error:f'"
    ]
