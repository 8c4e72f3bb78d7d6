"""One of several processes that fit k-means together: what `tests/test_processes.py` starts.

Arguments: number of this process, number of processes, port, fake devices of each, more flags of
XLA.
"""

import json
import os
import sys
import zlib


def main(number: int, n_processes: int, port: str, n_devices: int, flags: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices} {flags}"
    os.environ |= {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    if n_processes > 1:
        jax.distributed.initialize(f"localhost:{port}", n_processes, number)
    from jkmeans import KMeans, sharded
    from jkmeans.sharding import SHARDED, make_mesh

    mesh = make_mesh()
    x = np.random.default_rng(0).normal(size=(1001, 6)).astype(np.float32)
    whole = x[:1000]
    shared = jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, SHARDED), lambda index: whole[index]
    )
    found = {}
    for name, rows in (("array of every process", whole), ("global array", shared)):
        result = sharded.fit(
            jax.random.key(0), rows, 7, init="k-means||", max_iter=20, mesh=mesh, deterministic=True
        )
        found[name] = [
            zlib.crc32(np.asarray(result.centroids).tobytes()),
            float(result.inertia),
            int(result.n_iter),
        ]
    model = KMeans(7, mesh=mesh, n_init=2, random_state=0, deterministic=True).fit(x)
    found["estimator"] = [
        zlib.crc32(model.cluster_centers_.tobytes() + model.labels_.tobytes()),
        model.inertia_,
        model.n_iter_,
    ]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
