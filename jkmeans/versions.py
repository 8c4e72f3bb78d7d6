"""Versions of what computes."""

import platform
from importlib import metadata

import jkmeans

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""What a training run depends on."""


def versions(*packages: str) -> dict[str, str]:
    """Versions of jkmeans, Python and the packages named."""
    return {
        "jkmeans": jkmeans.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
