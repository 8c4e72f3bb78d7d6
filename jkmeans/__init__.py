"""jkmeans: k-means and deep clustering in JAX, on any number of devices."""
