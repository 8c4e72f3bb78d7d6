"""Functions of the core as programs over a mesh, compiled once for each choice of options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jkmeans import sharding
from jkmeans.kmeans.collectives import Blocks
from jkmeans.sharded.placing import Rows

BLOCKS = 16
"""Blocks that rows are cut into for results of the same bits on 1, 2, 4 and 8 devices."""


def result_specs(kind: type, by_row: tuple[str, ...] = ("labels", "distances")) -> Any:
    """Where the fields of a NamedTuple of results lie: those named by row, others everywhere.

    Fields that have a default are not always there, and are left out.
    """
    fields = getattr(kind, "_fields")  # noqa: B009, which no type checker knows
    optional = getattr(kind, "_field_defaults")  # noqa: B009
    return kind(
        *(
            sharding.SHARDED if field in by_row else sharding.REPLICATED
            for field in fields
            if field not in optional
        )
    )


def run(
    function: Callable,
    rows: Rows,
    *arguments: Any,
    out_specs: Any,
    argument_specs: tuple | None = None,
    **options: Any,
) -> Any:
    """Runs a function of the core on placed rows, as one program.

    Args:
      function: ``function(x, weights, *arguments, axis_name=…, **options)``, defined at module
        level: programs are cached by it, the mesh and the options.
      rows: from ``place``.
      *arguments: pytrees of arrays and numbers, traced, the same on all devices.
      out_specs: PartitionSpecs of the result; a hashable pytree.
      argument_specs: PartitionSpecs of the arguments; None where all devices have all of them.
      **options: static and hashable. With ``in_blocks=True`` the function runs on `BLOCKS` blocks
        of the rows as if each were on a device of its own, so that the result has the same bits on
        any number of devices.

    Returns:
      What the function returns, waited for.
    """
    program = _program(function, rows.mesh, out_specs, argument_specs, _sorted(options))
    home = rows.x.sharding if rows.mesh is None else NamedSharding(rows.mesh, sharding.REPLICATED)

    def bring(argument):
        moves = isinstance(argument, jax.Array) and argument.sharding.device_set != home.device_set
        if not moves:
            return argument
        if home.is_fully_addressable:
            return jax.device_put(argument, home)
        # Several processes, each of which holds the same value.
        assert rows.mesh is not None
        if not jnp.issubdtype(argument.dtype, jax.dtypes.prng_key):
            return sharding.place(np.asarray(argument), rows.mesh, sharding.REPLICATED)
        words = np.asarray(jax.random.key_data(argument))
        words = sharding.place(words, rows.mesh, sharding.REPLICATED)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(argument))

    arguments = jax.tree.map(bring, arguments)
    # Waited for: see "Fake devices" in docs/architecture.md; and
    # NumPy memory that is shared may be written to once we return.
    return jax.block_until_ready(program(rows.x, rows.weights, *arguments))


def _sorted(options: dict[str, Any]) -> tuple:
    return tuple(sorted(options.items()))


@functools.lru_cache(maxsize=512)
def _program(
    function: Callable, mesh: Mesh | None, out_specs: Any, argument_specs: Any, options: tuple
) -> Callable:
    """The compiled function; jit itself caches by shapes and dtypes."""
    static = dict(options)
    in_blocks = static.pop("in_blocks", False)
    function = functools.partial(function, **static)
    if in_blocks:
        function = _in_blocks(function, out_specs)
    if mesh is None:
        return jax.jit(functools.partial(function, axis_name=None))
    local = functools.partial(function, axis_name=sharding.DATA_AXIS)

    def over_mesh(x, weights, *arguments):
        specs = argument_specs or (sharding.REPLICATED,) * len(arguments)
        specs = (sharding.SHARDED, sharding.SHARDED, *specs)
        # JAX 0.10 cannot type collectives over a `vmap` axis inside loops; tests compare the bits.
        parallel = sharding.data_parallel(local, mesh, specs, out_specs, check=not in_blocks)
        return parallel(x, weights, *arguments)

    return jax.jit(over_mesh)


def _in_blocks(function: Callable, out_specs: Any) -> Callable:
    """A function of the core that runs on blocks of rows as if each were on its own device."""

    def run_blocks(x, weights, *arguments, axis_name):
        n_devices = 1 if axis_name is None else lax.axis_size(axis_name)
        # With a single block on a device the compiler would take its loop apart.
        if (BLOCKS // 2) % n_devices:
            raise ValueError(
                f"{n_devices} devices: deterministic=True expects a divisor of {BLOCKS // 2}"
            )
        if x.shape[0] % (BLOCKS // n_devices):
            raise ValueError(f"{x.shape[0]} rows cannot be cut into equal blocks")

        def cut_rows(rows):
            return rows.reshape(BLOCKS // n_devices, -1, *rows.shape[1:])

        in_axes = (0, None if weights is None else 0, *(None for _ in arguments))
        of_block = functools.partial(function, axis_name=Blocks("block", axis_name))
        result = jax.vmap(of_block, in_axes=in_axes, axis_name="block")(
            cut_rows(x), None if weights is None else cut_rows(weights), *arguments
        )

        def join(spec, part):
            """What a spec stands for: one array, or several."""
            if spec == sharding.SHARDED:
                return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), part)
            return jax.tree.map(lambda leaf: leaf[0], part)

        is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
        return jax.tree.map(join, out_specs, result, is_leaf=is_spec)

    return run_blocks
