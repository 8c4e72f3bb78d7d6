"""What a user might name in a config as ``module:function``: networks and objectives."""

import jax
import jax.numpy as jnp
from flax import nnx

from jkmeans.methods import example_keys


class Small(nnx.Module):
    """One layer in, one layer out; ``fault`` names what is wrong with it."""

    def __init__(self, example_shape, options, rngs, fault=""):
        (d,) = example_shape
        p = options.embedding_dim + (fault == "wide embedding")
        self.fault = fault
        self.inward = nnx.Linear(d, p, rngs=rngs)
        self.norm = nnx.LayerNorm(p, rngs=rngs)
        self.outward = nnx.Linear(p, d - (fault == "narrow reconstruction"), rngs=rngs)
        if fault == "batch norm":
            self.extra = nnx.BatchNorm(d, rngs=rngs)
        if fault == "dropout":
            self.extra = nnx.Dropout(0.5, rngs=rngs)
        if fault == "integer parameter":
            self.extra = nnx.Param(jnp.arange(3))
        if fault == "numbered dictionary":
            self.extra = nnx.Dict({"0": nnx.Param(jnp.ones(3))})
        if fault == "slash":
            self.extra = nnx.Dict({"a/b": nnx.Param(jnp.ones(3))})
        if fault == "raises at the start":
            raise RuntimeError("mine, at the start")

    def encode(self, x):
        if self.fault == "raises in encode":
            raise RuntimeError("mine, in encode")
        z = self.norm(self.inward(x))
        if self.fault == "half precision":
            return z.astype(jnp.bfloat16)
        return (z, z) if self.fault == "pair" else z

    def decode(self, z):
        return self.outward(z)


class WithoutEncode(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)


class WithoutDecode(WithoutEncode):
    def encode(self, x):
        return x[:, :4]


class NoModule:
    def encode(self, x):
        return x[:, :4]

    decode = encode


def good(example_shape, options, rngs):
    return Small(example_shape, options, rngs)


def without_encode(example_shape, options, rngs):
    return WithoutEncode(rngs)


def without_decode(example_shape, options, rngs):
    return WithoutDecode(rngs)


def no_module(example_shape, options, rngs):
    return NoModule()


def two_arguments(example_shape, options):
    return None


def __getattr__(name):
    """Factories of faulty networks: ``dropout`` makes a `Small` with that fault, and so on."""
    if name.startswith("faulty_"):
        fault = name.removeprefix("faulty_").replace("_", " ")
        return lambda shape, options, rngs: Small(shape, options, rngs, fault)
    raise AttributeError(name)


not_a_function = 3


def objective(network, clusters, batch):
    """Reconstruction, twice the centroid term, and a term of the user's own."""
    z = network.encode(batch.view)
    error = batch.x - network.decode(z)
    terms = {"reconstruction": jnp.mean(error * error, axis=1)}
    if batch.clustering:
        squared = jnp.sum((z[:, None, :] - clusters.centroids[None]) ** 2, axis=-1)
        terms["centroid"] = 2 * jnp.min(squared, axis=1)
    noise = jax.vmap(jax.random.normal)(example_keys(batch.key, batch.index))
    terms["mine"] = jnp.full(len(z), 0.25)
    terms["noise"] = noise
    return z, terms
