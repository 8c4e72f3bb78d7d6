"""Deep clustering methods, one paper per file, each a factory of pure functions."""

from jkmeans.methods.base import Assigned, Batch, Clusters, Method, example_keys
from jkmeans.methods.joint import joint

METHODS = {"joint": joint}

__all__ = ["METHODS", "Assigned", "Batch", "Clusters", "Method", "example_keys", "joint"]
