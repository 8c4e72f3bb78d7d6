"""Encoders and autoencoders in ``flax.nnx``.

A network is made by a factory ``factory(example_shape, options, rngs) -> nnx.Module`` and has

* ``encode(x: [b, *example_shape] float32) -> [b, embedding_dim] float32``,
* where there is a decoder, ``decode(z: [b, embedding_dim]) -> [b, *example_shape]``,
* for soft resets, ``hidden_layers``, a tuple of the starts of the names of the parameters that they
  mix with fresh ones: the layers of the encoder before the embedding,
* where ``options.precision`` is to have an effect, layers as `jkmeans.precision` says,
* to save work, ``decoder_layers``, the same for the parameters that only ``decode`` uses,
* ``unpretrained_layers``, the same for those that the pretraining of the methods here does not
  reach (that of joint training by Adam and of your own objective trains all): it leaves them as
  drawn.

`make_network` takes one of the names in `NETWORKS` or the user's own ``module:function``. A factory
is traced (`blueprint`): parameters are drawn on all devices in one compiled program, and not at all
where a checkpoint has them. So it may put arrays into parameters, but not look at what was drawn.

The network must be a deterministic function of one example at a time: its only variables are
``nnx.Param``. Layers that look across the batch (batch normalisation) would make an embedding
depend on the batch, the padding and the number of devices; layers with random state (dropout)
would not be reproducible after a resume. Both are refused. Layer and group normalisation are fine.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jkmeans.errors import UserError
from jkmeans.naming import resolve
from jkmeans.precision import dot_general_of, promote_dtype_of

INITIALIZERS: dict[str, nnx.Initializer] = {
    "glorot_uniform": nnx.initializers.glorot_uniform(),
    "fan_in_uniform": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}
"""How kernels begin: uniform in ±√(6 / (i + o)), or in ±1 / √i, for i inputs and o outputs.

The second is what PyTorch does, and what DEC-keras does on images. Biases begin at zero.
"""

_FIRST_LOG_VARIANCE = -4.0


def unit_norm(z: jax.Array) -> jax.Array:
    """Scales each row of ``z: [b, p]`` to length one; the zero vector stays zero."""
    squared = jnp.sum(z * z, axis=-1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


class FullyConnectedAutoencoder(nnx.Module):
    """The d-500-500-2000-z autoencoder of the deep clustering literature.

    ReLU between the layers, none on the embedding and on the output. The decoder mirrors the
    encoder (Xie et al. 2016, section 4.2).
    """

    def __init__(
        self,
        example_shape: Sequence[int],
        *,
        embedding_dim: int,
        widths: Sequence[int],
        decoder: bool,
        normalize: bool,
        kernel_init: nnx.Initializer,
        precision: str,
        rngs: nnx.Rngs,
    ):
        self.example_shape = tuple(example_shape)
        self.normalize = normalize
        sizes = [math.prod(example_shape), *widths, embedding_dim]
        dense = {
            "kernel_init": kernel_init,
            "dot_general": dot_general_of(precision),
            "rngs": rngs,
        }
        self.encoder = _dense_layers(sizes, dense)
        self.decoder = _dense_layers(sizes[::-1], dense) if decoder else None
        self.hidden_layers = tuple(f"encoder/{i}/" for i in range(len(widths)))
        self.decoder_layers = ("decoder/",)

    def encode(self, x: jax.Array) -> jax.Array:
        """Embeddings [b, z] of examples [b, *example_shape]."""
        z = _apply_dense(self.encoder, x.reshape(x.shape[0], -1))
        return unit_norm(z) if self.normalize else z

    def decode(self, z: jax.Array) -> jax.Array:
        """Reconstructions [b, *example_shape] of embeddings [b, z]."""
        assert self.decoder is not None
        return _apply_dense(self.decoder, z).reshape(z.shape[0], *self.example_shape)


class VariationalAutoencoder(FullyConnectedAutoencoder):
    """The same with a second head: the log-variance of the embedding.

    ``encode`` gives the mean; ``decode`` gives logits where pixels are Bernoulli (Jiang et al.
    2017). Pretraining does not reach the second head, which then still says the same of all
    examples: a variance of e⁻⁴, small beside that of embeddings that have learned something. So
    clustering begins with the embeddings that pretraining has made, and not with noise on them;
    and pretraining itself is that of the network without this head.
    """

    def __init__(self, example_shape, *, embedding_dim, widths, precision, rngs, **others):
        super().__init__(
            example_shape,
            embedding_dim=embedding_dim,
            widths=widths,
            precision=precision,
            rngs=rngs,
            **others,
        )
        self.unpretrained_layers = ("log_variance/",)
        self.log_variance = nnx.Linear(
            widths[-1],
            embedding_dim,
            kernel_init=nnx.initializers.zeros,
            bias_init=nnx.initializers.constant(_FIRST_LOG_VARIANCE),
            dot_general=dot_general_of(precision),
            rngs=rngs,
        )

    def encode_distribution(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean [b, z] and log-variance [b, z] of the embeddings of examples."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.encoder[:-1]:
            x = nnx.relu(layer(x))
        return self.encoder[-1](x), self.log_variance(x)


def _dense_layers(sizes: Sequence[int], dense: dict[str, Any]) -> nnx.List:
    return nnx.List([nnx.Linear(i, o, **dense) for i, o in itertools.pairwise(sizes)])


def _apply_dense(layers: nnx.List, x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = nnx.relu(layer(x))
    return layers[-1](x)


class ConvolutionalAutoencoder(nnx.Module):
    """Strided convolutions to a linear embedding, and their mirror image.

    Each width is the channels of one 3×3 convolution with stride 2 and ReLU; the decoder is a
    linear layer and as many 3×3 transposed convolutions. After Guo et al. 2017 ("Deep clustering
    with convolutional autoencoders"), with 3×3 kernels throughout. Images of any size: the
    decoder's output is cropped to the size of the input.
    """

    def __init__(
        self,
        example_shape: Sequence[int],
        *,
        embedding_dim: int,
        widths: Sequence[int],
        decoder: bool,
        normalize: bool,
        kernel_init: nnx.Initializer,
        precision: str,
        rngs: nnx.Rngs,
    ):
        if len(example_shape) not in (2, 3):
            raise UserError(
                "network.name is 'convolutional', but the examples have shape "
                f"{list(example_shape)}; accepted: [height, width] or [height, width, channels]"
            )
        self.example_shape = tuple(example_shape)
        self.normalize = normalize
        height, width = example_shape[:2]
        n_channels = example_shape[2] if len(example_shape) == 3 else 1
        halvings = 2 ** len(widths)
        self.coarse_shape = (math.ceil(height / halvings), math.ceil(width / halvings), widths[-1])
        channels = [n_channels, *widths]
        pairs = list(itertools.pairwise(channels))
        drawn = {"kernel_init": kernel_init, "rngs": rngs}
        strided = {"kernel_size": (3, 3), "strides": (2, 2), "padding": "SAME", **drawn}
        strided["promote_dtype"] = promote_dtype_of(precision)
        dense = {"dot_general": dot_general_of(precision), **drawn}
        self.convolutions = nnx.List([nnx.Conv(i, o, **strided) for i, o in pairs])
        self.hidden_layers = ("convolutions/",)
        self.decoder_layers = ("from_embedding/", "decoder/")
        n_coarse = math.prod(self.coarse_shape)
        self.to_embedding = nnx.Linear(n_coarse, embedding_dim, **dense)
        if not decoder:
            self.from_embedding = self.decoder = None
            return
        self.from_embedding = nnx.Linear(embedding_dim, n_coarse, **dense)
        self.decoder = nnx.List([nnx.ConvTranspose(o, i, **strided) for i, o in reversed(pairs)])

    def encode(self, x: jax.Array) -> jax.Array:
        """Embeddings [b, z] of images [b, h, w] or [b, h, w, c]."""
        # Sizes that are not a multiple of the strides are padded, at the bottom and the right.
        height, width, _ = self.coarse_shape
        halvings = 2 ** len(self.convolutions)
        x = x.reshape(x.shape[0], *self.example_shape[:2], -1)
        missing_rows = height * halvings - x.shape[1]
        missing_columns = width * halvings - x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, missing_rows), (0, missing_columns), (0, 0)))
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        z = self.to_embedding(x.reshape(x.shape[0], -1))
        return unit_norm(z) if self.normalize else z

    def decode(self, z: jax.Array) -> jax.Array:
        """Reconstructions of embeddings [b, z], in the shape of the images."""
        assert self.decoder is not None
        assert self.from_embedding is not None
        x = nnx.relu(self.from_embedding(z)).reshape(z.shape[0], *self.coarse_shape)
        for layer in self.decoder[:-1]:
            x = nnx.relu(layer(x))
        x = self.decoder[-1](x)[:, : self.example_shape[0], : self.example_shape[1]]
        return x.reshape(z.shape[0], *self.example_shape)


def _from_options(network: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    def factory(example_shape, options, rngs):
        return network(
            example_shape,
            embedding_dim=options.embedding_dim,
            widths=options.widths,
            decoder=options.decoder,
            normalize=options.normalize,
            kernel_init=INITIALIZERS[options.initializer],
            precision=options.precision,
            rngs=rngs,
        )

    return factory


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "fully_connected": _from_options(FullyConnectedAutoencoder),
    "variational": _from_options(VariationalAutoencoder),
    "convolutional": _from_options(ConvolutionalAutoencoder),
}


PRETRAINED_AS = {"variational": "fully_connected"}
"""Networks whose pretraining is that of another; what more they have is ``unpretrained_layers``."""


def make_network(options, example_shape: Sequence[int], key: jax.Array) -> nnx.Module:
    """Builds the network that ``config.network`` names and checks the contract above.

    Args:
      options: ``config.network``, with ``name`` one of `NETWORKS` or ``module:function``.
      example_shape: shape of one example.
      key: the key of its initial parameters.

    Raises:
      UserError: the name cannot be resolved, or the network breaks the contract. What the user's
        own code raises propagates, with a note that says how it was called.
    """
    factory = resolve(options.name, NETWORKS, "network.name")
    shape = tuple(example_shape)
    # Layers with random state ask for other streams; they must get as far as being refused.
    rngs = nnx.Rngs(jax.random.fold_in(key, 1), params=key)
    with _noting(f"while calling {options.name} with (example_shape, options, rngs)"):
        network = factory(shape, options, rngs)
    where = f"network.name is {options.name!r}: the network"
    encode, decode = getattr(network, "encode", None), getattr(network, "decode", None)
    if not callable(encode):
        raise UserError(f"{where} has no method encode(x); see jkmeans/networks.py")
    if options.decoder and not callable(decode):
        raise UserError(
            f"{where} has no method decode(z), which network.decoder = True asks for; "
            "see jkmeans/networks.py"
        )
    if not isinstance(network, nnx.Module):
        raise UserError(f"{where} is a {type(network).__name__}; accepted: a flax.nnx.Module")
    others = nnx.state(network, nnx.Not(nnx.Param))
    kinds = sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(others)})
    if kinds:
        raise UserError(
            f"{where} holds variables of type {', '.join(kinds)}; accepted: nnx.Param only "
            "(no batch normalisation, no dropout; layer and group normalisation are fine)"
        )
    for path, value in nnx.to_flat_state(nnx.state(network)):
        name = "/".join(map(str, path))
        if _path(name) != path:
            raise UserError(
                f"{where} has a parameter at {path}; accepted: keys of dictionaries that are not "
                "numbers and have no '/'"
            )
        if value.dtype != jnp.float32:
            raise UserError(f"{where} has {name} of type {value.dtype}; accepted: float32")
    example = jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    def round_trip(x):
        z = encode(x)
        return z, decode(z) if decode and options.decoder else x

    with _noting(f"while tracing encode and decode of {options.name} on x: {_described(example)}"):
        embeddings, reconstruction = jax.eval_shape(round_trip, example)
    wanted = jax.ShapeDtypeStruct((2, options.embedding_dim), jnp.float32)
    if _described(embeddings) != _described(wanted):
        raise UserError(
            f"{where} turns two examples into embeddings {_described(embeddings)}; "
            f"accepted: {_described(wanted)} (network.embedding_dim)"
        )
    if _described(reconstruction) != _described(example):
        raise UserError(
            f"{where} reconstructs {_described(reconstruction)}; "
            f"accepted: {_described(example)}, as the examples"
        )
    return network


class Blueprint(NamedTuple):
    """A network before it has numbers.

    Attributes:
      graphdef: its structure.
      pretraining: the same with the precision that its products have while it is pretrained.
      parameters: shapes and dtypes, by path.
      draw: of a key of PRNG (``jax.random.key``), the initial parameters by path; traceable.
      hidden_layers: starts of the names of the parameters that soft resets mix; none where the
        network does not say.
      decoder_layers: the same for those that only ``decode`` uses.
      unpretrained_layers: the same for those that pretraining does not reach.
    """

    graphdef: nnx.GraphDef
    pretraining: nnx.GraphDef
    parameters: dict[str, jax.ShapeDtypeStruct]
    draw: Callable[[jax.Array], "Parameters"]
    hidden_layers: tuple[str, ...]
    decoder_layers: tuple[str, ...]
    unpretrained_layers: tuple[str, ...]

    def fresh_hidden_layers(self, key: jax.Array) -> "Parameters":
        """Newly drawn parameters of the hidden layers, by path."""
        return {k: v for k, v in self.draw(key).items() if k.startswith(self.hidden_layers)}


def blueprint(options, example_shape: Sequence[int], pretrain_precision: str) -> Blueprint:
    """What `make_network` would make, without computing anything on any device.

    Args:
      options: ``config.network``.
      example_shape: shape of one example.
      pretrain_precision: of products while pretraining.

    Raises:
      UserError: as `make_network`.
    """
    found: list[tuple[nnx.GraphDef, nnx.Module]] = []

    def draw(key: jax.Array) -> Parameters:
        network = make_network(options, example_shape, key)
        graphdef, parameters = split(network)
        found.append((graphdef, network))
        return parameters

    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(draw, key)
    graphdef, network = found[0]
    pretraining = graphdef
    if pretrain_precision != options.precision:
        other = options.copy_and_resolve_references()
        other.precision = pretrain_precision
        pretraining = blueprint(other, example_shape, pretrain_precision).graphdef
    return Blueprint(
        graphdef,
        pretraining,
        shapes,
        draw,
        hidden_layers=tuple(getattr(network, "hidden_layers", ())),
        decoder_layers=tuple(getattr(network, "decoder_layers", ())),
        unpretrained_layers=tuple(getattr(network, "unpretrained_layers", ())),
    )


def _described(value) -> str:
    """Shape and type of an array, such as ``[2, 10] float32``; the kind of anything else."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return f"of type {type(value).__name__}"
    return f"{list(value.shape)} {value.dtype}"


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    """Lets errors of the user's code through, with a note on how it came to run."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(note)
        raise


def network_input(examples: jax.Array, scale: float) -> jax.Array:
    """Stored examples [b, …] of any type as a network sees them: float32, scaled."""
    return examples.astype(jnp.float32) * jnp.float32(scale)


Parameters = dict[str, jax.Array]
"""Parameters by path, such as ``encoder/0/kernel``: what checkpoints and optimizers see."""


def split(network: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """Takes a network apart into its structure and its parameters by path."""
    graphdef, state = nnx.split(network)
    return graphdef, {
        "/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)
    }


def merge(graphdef: nnx.GraphDef, parameters: Parameters) -> Any:
    """Puts a network together again; the inverse of `split`."""
    flat = [(_path(name), nnx.Param(value)) for name, value in parameters.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("/"))
