"""jkmeans: k-means and deep clustering in JAX, on any number of devices."""

__version__ = "0.1.0"
