"""Deep clustering methods, one paper per file, each a factory of pure functions."""

from typing import Any

from ml_collections import ConfigDict

from jkmeans.errors import UserError
from jkmeans.methods import (
    autoencoder,
    dcn,
    dec,
    deepcluster_v2,
    dkm,
    idec,
    joint,
    n2d,
    swav,
    vade,
)
from jkmeans.methods.base import (
    Assigned,
    Batch,
    Clusters,
    Method,
    MethodSpec,
    example_keys,
)

METHODS: dict[str, MethodSpec] = {
    "joint": joint.SPEC,
    "autoencoder": autoencoder.SPEC,
    "dec": dec.SPEC,
    "idec": idec.SPEC,
    "dcn": dcn.SPEC,
    "dkm": dkm.SPEC,
    "vade": vade.SPEC,
    "deepcluster_v2": deepcluster_v2.SPEC,
    "swav": swav.SPEC,
    "n2d": n2d.SPEC,
}
"""The methods by the name that ``config.objective.name`` gives them."""


def method_spec(name: str) -> MethodSpec:
    """The method of a config; a user's ``module:function`` is an objective of joint k-means."""
    return METHODS["joint" if ":" in name else name]


def make_method(config, axis_name: str | None) -> Method:
    """The method that a whole, validated config names."""
    return method_spec(config.objective.name).make(config, axis_name)


def with_method(config: Any, name: str, **changes: Any) -> Any:
    """A config of the same data and network for another method.

    Args:
      config: complete, an ``ml_collections.ConfigDict``; it is not changed.
      name: a key of `METHODS`.
      **changes: fields by their full names with ``__`` (or dots) between groups, over the method's
        settings.

    Raises:
      UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"the method is {name!r}; accepted: {', '.join(map(repr, METHODS))}")
    changed = config.copy_and_resolve_references()
    changed.objective = ConfigDict({"name": name})
    named = {field.replace("__", "."): value for field, value in changes.items()}
    for field, value in {**METHODS[name].settings, **named}.items():
        *groups, leaf = field.split(".")
        node = changed
        for group in groups:
            node = node[group]
        node[leaf] = value
    return changed


__all__ = [
    "METHODS",
    "Assigned",
    "Batch",
    "Clusters",
    "Method",
    "MethodSpec",
    "example_keys",
    "make_method",
    "method_spec",
    "with_method",
]
