"""Measure a run from its folder alone.

python -m experiments.evaluate --workdir runs/digits
python -m experiments.evaluate --workdir runs/mnist --split test --checkpoint best

What it prints is also written into the folder of the run: evaluation.json, evaluation-test.json of
that split, evaluation-x.json of --input x.npy.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.evaluation.evaluate`."""
    from jkmeans.evaluation import evaluate

    evaluate(
        FLAGS.workdir,
        checkpoint=FLAGS.checkpoint,
        input_path=FLAGS.input,
        labels_path=FLAGS.labels,
        split=FLAGS.split,
        n_devices=FLAGS.n_devices,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string(
        "checkpoint",
        "latest",
        "latest; best, of least objective, among those saved after an epoch of clustering and its "
        "warm-up; or a position, which is a number of steps.",
    )
    flags.DEFINE_string(
        "input",
        "",
        "An .npy file of other examples, in the units of the training data (digits 0 to 16, MNIST "
        "0 to 255), not scaled.",
    )
    flags.DEFINE_string("labels", "", "An .npy file with the classes of --input.")
    flags.DEFINE_string("split", "", "Another part of the run's data set: all, train or test.")
    flags.DEFINE_integer("n_devices", 0, "Devices of the mesh; 0 for all.", lower_bound=0)
    launch(main, required=("workdir",))
