"""What the core needs to run inside ``jax.shard_map`` without knowing the mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap


class Blocks(NamedTuple):
    """An axis of blocks of rows, a fixed number of them, spread over the devices of a mesh axis.

    Whatever the core does over a mesh axis it can do over blocks, each of which a device computes
    as if it were a device of its own (``vmap`` over its blocks). Sums over blocks are taken in
    their order, one after another, so that they have the same bits on any number of devices.

    Attributes:
      block: the name of the ``vmap`` axis.
      axis_name: the mesh axis, or None on one device.
    """

    block: Hashable
    axis_name: Hashable | None


AxisName = Hashable | tuple[Hashable, ...] | Blocks | None


def varying_axes(value) -> frozenset:
    """The mesh axes along which a value (or its ShapeDtypeStruct) differs between devices."""
    kind = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    # jax 0.10.2 has `manual_axis_type.varying`, None outside a mesh; it was `vma` before.
    manual = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())


def vary_like(value: jax.Array, *others, reduced: AxisName = None) -> jax.Array:
    """Marks a value as varying along every axis that one of ``others`` varies along.

    A loop's carry must have one type from the first turn to the last; a carry that starts as a
    constant and then takes up sharded data has to be declared varying at the start.

    Args:
      value: any array.
      *others: arrays or ShapeDtypeStructs; None is skipped.
      reduced: axes that the loop sums over, which the carry therefore does not vary along.
    """
    axes = frozenset().union(*(varying_axes(other) for other in others if other is not None))
    missing = tuple(sorted(axes - set(names_of(reduced)) - varying_axes(value), key=str))
    return lax.pcast(value, missing, to="varying") if missing else value


def names_of(axis_name: AxisName) -> tuple[Hashable, ...]:
    """The names that collectives take for an axis; none without one."""
    if isinstance(axis_name, Blocks):
        return (*names_of(axis_name.axis_name), axis_name.block)
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def per_block(function: Callable, axis_name: AxisName) -> Callable:
    """A function of local arrays, without collectives, that runs block after block over `Blocks`.

    ``vmap`` would compute all blocks of a device at once, in an order of additions that depends on
    how many there are.
    """
    return sequential_vmap(function) if isinstance(axis_name, Blocks) else function


def all_sum(tree, axis_name: AxisName):
    """The sum over the devices of ``axis_name``; the identity without an axis.

    It is the identity, too, where the axis is of a mesh, has one device and nothing is marked as
    varying along it: XLA on CPUs would copy the values for a sum of one. Over `Blocks` it is taken
    in order, at the price of as many times the traffic as there are blocks.
    """
    if axis_name is None:
        return tree
    if not isinstance(axis_name, Blocks):
        names = names_of(axis_name)
        # An axis of a ``vmap`` is none of a mesh: its values stay mapped until they are summed.
        of_mesh = set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
        varying = any(varying_axes(leaf) & set(names) for leaf in jax.tree.leaves(tree))
        alone = of_mesh and n_devices(names) == 1 and not varying
        return tree if alone else lax.psum(tree, names)

    def in_order(leaf: jax.Array) -> jax.Array:
        parts = stack_devices(leaf, axis_name)
        return functools.reduce(lambda total, i: total + parts[i], range(1, len(parts)), parts[0])

    return jax.tree.map(in_order, tree)


def all_max(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The largest value over the devices of ``axis_name``, entry by entry; has no derivative."""
    value = lax.stop_gradient(value)
    return value if axis_name is None else lax.pmax(value, names_of(axis_name))


def n_devices(axis_name: AxisName) -> int:
    """The number of devices along ``axis_name``; 1 without an axis."""
    return math.prod(lax.axis_size(name) for name in names_of(axis_name))


def axis_index(axis_name: AxisName) -> jax.Array | int:
    """The number of this device along ``axis_name``; 0 without an axis."""
    index = 0
    for name in names_of(axis_name):
        index = index * lax.axis_size(name) + lax.axis_index(name)
    return index


def row_numbers(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The global number of each local row: [n] int32."""
    return x.shape[0] * axis_index(axis_name) + jnp.arange(x.shape[0], dtype=jnp.int32)


def stack_devices(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The values of all devices, the same on each: [devices, ...].

    A sum of disjoint slots instead of an all-gather: its result is typed as replicated.
    """
    if axis_name is None:
        return value[None]
    slots = jnp.zeros((n_devices(axis_name), *value.shape), value.dtype)
    return lax.psum(slots.at[axis_index(axis_name)].set(value), names_of(axis_name))


def top_k_rows(priority: jax.Array, k: int, axis_name: AxisName) -> tuple[jax.Array, ...]:
    """The k largest priorities over all devices, and which of them are local rows.

    Every device sends its own k largest, so the choice is the same everywhere. Ties go to the
    lower device and row: with rows laid out in order, to the row that comes first.

    Args:
      priority: [n] float, without NaN; the local rows.
      k: how many; no more than the rows of all devices.
      axis_name: the mesh axis, or None.

    Returns:
      values [k], the same on all devices, largest first; row [k] int32, a valid local row number;
      local [k] bool, whether the choice is this device's ``row`` (of exactly one device).

    Raises:
      ValueError: there are fewer than k rows.
    """
    n_local = min(k, priority.shape[0])
    devices = n_devices(axis_name)
    if k > n_local * devices:
        raise ValueError(f"{k} rows are wanted, but x has only {n_local * devices}")
    values, rows = lax.top_k(priority, n_local)
    first = axis_index(axis_name) * n_local
    values = stack_devices(values, axis_name).reshape(-1)
    values, position = lax.top_k(values, k)
    slot = position - first
    local = (slot >= 0) & (slot < n_local)
    return values, rows[jnp.clip(slot, 0, n_local - 1)], local
