"""Running the core on eight devices, and data that several files share."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from sklearn.datasets import make_blobs


@pytest.fixture(scope="session")
def on_eight_devices():
    """Compiles f(*arrays) with rows sharded over eight devices; ``replicated`` holds positions."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def wrap(f, out_specs, replicated=()):
        def call(*arrays):
            in_specs = tuple(
                PartitionSpec() if i in replicated else PartitionSpec("data")
                for i in range(len(arrays))
            )
            return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)

        return jax.jit(call)

    return wrap


@pytest.fixture(scope="session")
def blobs():
    """Overlapping blobs: [320, 5] float32."""
    x, _ = make_blobs(320, 5, centers=6, cluster_std=3.0, random_state=0)
    return x.astype(np.float32)
