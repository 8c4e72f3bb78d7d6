"""Deep clustering methods, one paper per file, each a factory of pure functions."""

from jkmeans.methods import autoencoder, dcn, dec, deepcluster_v2, dkm, idec, joint, swav, vade
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
}
"""The methods by the name that ``config.objective.name`` gives them."""


def method_spec(name: str) -> MethodSpec:
    """The method of a config; a user's ``module:function`` is an objective of joint k-means."""
    return METHODS["joint" if ":" in name else name]


def make_method(config, axis_name: str | None) -> Method:
    """The method that a whole, validated config names."""
    return method_spec(config.objective.name).make(config, axis_name)


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
]
