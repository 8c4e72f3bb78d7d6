r"""Assign new examples to the clusters of a run.

    python -m experiments.predict --workdir runs/digits --input new.npy --output clusters.npz
    python -m experiments.predict --workdir runs/digits --input many --output found --engine=ray

One .npy file and an --output that ends in .npz: it holds labels [n] int32, distances [n] float32
(squared, in the embedding), centroids [k, p] and, with --embeddings, embeddings [n, p] float32.

Otherwise --input is a file or a folder of files (.npy, Parquet, Zarr), and --output a folder of
parts with a manifest, which the same command goes on with after it was stopped; --merge adds
labels.npy, distances.npy and embeddings.npy of all rows. --workdir may be one of
experiments.cluster. With --engine=ray, workers on this machine or on a Ray cluster share the work
(see docs/dispatch.md).
"""

import os

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.evaluation.predict_file` or `jkmeans.dispatch.predict_files`."""
    if FLAGS.output.endswith(".npz"):
        from jkmeans.errors import UserError
        from jkmeans.evaluation import predict_file

        if FLAGS.engine != "process" or FLAGS.merge:
            given = "--merge" if FLAGS.merge else f"--engine={FLAGS.engine}"
            raise UserError(
                f"--output is {FLAGS.output!r}, one file, and {given} was given; accepted: the "
                "name of a folder"
            )
        if not FLAGS.input.endswith(".npy"):
            raise UserError(
                f"--output is {FLAGS.output!r}, one file, but --input is {FLAGS.input!r}; "
                "accepted: one .npy file, or the name of a folder for --output"
            )
        predict_file(
            FLAGS.workdir,
            FLAGS.input,
            FLAGS.output,
            checkpoint=FLAGS.checkpoint,
            embeddings=FLAGS.embeddings,
            n_devices=FLAGS.n_devices,
        )
        return
    if FLAGS.engine == "ray":
        # Before JAX is imported: the memory of accelerators is for the workers.
        os.environ["JAX_PLATFORMS"] = "cpu"
    if FLAGS.output.endswith(".npy"):
        from jkmeans.errors import UserError

        raise UserError(
            f"--output is {FLAGS.output!r}; accepted: a name that ends in .npz, or a folder"
        )
    from jkmeans.dispatch import Options, predict_files

    predict_files(
        FLAGS.workdir,
        FLAGS.input,
        FLAGS.output,
        checkpoint=FLAGS.checkpoint,
        embeddings=FLAGS.embeddings,
        merge=FLAGS.merge,
        engine_name=FLAGS.engine,
        options=Options(
            address=FLAGS.address,
            workers=FLAGS.workers,
            gpus_per_worker=FLAGS.gpus_per_worker,
            lease_seconds=FLAGS.lease_seconds,
        ),
        shard_rows=FLAGS.shard_rows,
        n_devices=FLAGS.n_devices,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string(
        "input",
        None,
        "A file [n, *example_shape], or a folder of files, in the units of the training data "
        "(digits 0 to 16, MNIST 0 to 255), not scaled.",
    )
    flags.DEFINE_string("output", None, "The .npz file to write, or a folder.")
    flags.DEFINE_string(
        "checkpoint",
        "latest",
        "latest; best, of least objective, among those saved after an epoch of clustering and its "
        "warm-up; or a position, which is a number of steps.",
    )
    flags.DEFINE_boolean("embeddings", False, "Whether to write embeddings too.")
    flags.DEFINE_integer("n_devices", 0, "Devices of the mesh; 0 for all.", lower_bound=0)
    flags.DEFINE_boolean("merge", False, "Whether to write all rows into one file a column too.")
    flags.DEFINE_enum("engine", "process", ["process", "ray"], "Who computes.")
    flags.DEFINE_integer(
        "shard_rows", 0, "Rows computed and written at a time; 0 for 64 MiB.", lower_bound=0
    )
    flags.DEFINE_string("address", "local", "Of a Ray cluster: local, auto or host:port.")
    flags.DEFINE_integer(
        "workers", 0, "On Ray; 0 for one for each CPU (or GPU) of the cluster.", lower_bound=0
    )
    flags.DEFINE_float(
        "gpus_per_worker", -1, "On Ray; -1 for one where there are any, 0 for the CPU."
    )
    flags.DEFINE_float(
        "lease_seconds", 60, "On Ray; a worker that is silent so long loses its shard.",
        lower_bound=1,
    )  # fmt: skip
    launch(main, required=("workdir", "input", "output"))
