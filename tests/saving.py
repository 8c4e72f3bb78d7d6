"""One of several processes that save a checkpoint, which one cannot: `tests/test_checkpoints.py`.

Arguments: number of this process, number of processes, port, folder, number of the process whose
part cannot be written.
"""

import os
import sys


def main(number: int, n_processes: int, port: str, folder: str, failing: int) -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    os.environ |= {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    from pathlib import Path

    from absl import flags

    flags.FLAGS(sys.argv[:1])  # As launchers do: Orbax's own barrier depends on it.
    import jax
    import numpy as np

    jax.distributed.initialize(f"localhost:{port}", n_processes, number)
    from jkmeans.checkpoints import Checkpoints
    from jkmeans.errors import UserError
    from jkmeans.sharding import SHARDED, make_mesh, place

    mesh = make_mesh()
    trees = {"model": {"rows": place(np.ones((8, 3), np.float32), mesh, SHARDED)}}
    with Checkpoints(Path(folder)) as checkpoints:
        checkpoints.save(1, trees, {}, None)
    print("saved", flush=True)
    if number == failing:
        from orbax.checkpoint._src.serialization import serialization

        async def refuse(*arguments, **options):
            raise OSError(28, "No space left on device")

        serialization.async_serialize_from_host = refuse
    try:
        with Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(2, trees, {}, None)
    except UserError as error:
        print(f"refused: {error}", flush=True)
        os._exit(2)
    print("saved again", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
