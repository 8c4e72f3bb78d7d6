"""What the core needs to run inside ``jax.shard_map`` without knowing the mesh."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...] | None


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
    names = reduced if isinstance(reduced, tuple) else (reduced,)
    missing = tuple(sorted(axes - set(names) - varying_axes(value), key=str))
    return lax.pcast(value, missing, to="varying") if missing else value


def all_sum(tree, axis_name: AxisName):
    """The sum over the devices of ``axis_name``; the identity without an axis."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def n_devices(axis_name: AxisName) -> int:
    """The number of devices along ``axis_name``; 1 without an axis."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


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
    first = 0
    if axis_name is not None:
        # A psum of disjoint slots instead of an all_gather: its result is typed as replicated.
        device = lax.axis_index(axis_name)
        first = device * n_local
        slots = jnp.zeros((devices, n_local), values.dtype)
        values = lax.psum(slots.at[device].set(values), axis_name).reshape(-1)
    values, position = lax.top_k(values, k)
    slot = position - first
    local = (slot >= 0) & (slot < n_local)
    return values, rows[jnp.clip(slot, 0, n_local - 1)], local
