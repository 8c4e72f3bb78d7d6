"""Assign new examples to the clusters of a run.

    python -m experiments.predict --workdir runs/digits --input new.npy --output clusters.npz

The output holds labels [n] int32, distances [n] float32 (squared, in the embedding), centroids
[k, p] and, with --embeddings, embeddings [n, p] float32.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.evaluation.predict_file`."""
    from jkmeans.evaluation import predict_file

    predict_file(
        FLAGS.workdir,
        FLAGS.input,
        FLAGS.output,
        checkpoint=FLAGS.checkpoint,
        embeddings=FLAGS.embeddings,
        n_devices=FLAGS.n_devices,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("input", None, "An .npy file [n, *example_shape].")
    flags.DEFINE_string("output", None, "The .npz file to write.")
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a position.")
    flags.DEFINE_boolean("embeddings", False, "Whether to write embeddings too.")
    flags.DEFINE_integer("n_devices", 0, "Devices of the mesh; 0 for all.", lower_bound=0)
    launch(main, required=("workdir", "input", "output"))
