"""What a report is made of: runs of every kind, as arrays."""

import numpy as np

from jkmeans.report.clusters import ClusteredExamples


def history(truth=True):
    records = []
    for epoch in range(1, 13):
        phase = "pretrain" if epoch <= 4 else "cluster"
        record = {"epoch": epoch, "phase": phase, "time": "", "seconds": 1.0}
        record["loss/reconstruction"] = record["loss"] = 1.0 / epoch
        if phase == "cluster":
            record["loss/centroid"] = 0.1 / epoch
            record |= {"label_change": 0.5 / epoch, "inertia": 100.0 - epoch, "empty_clusters": 0}
        if truth:
            record |= {"acc": 0.5 + epoch / 30, "nmi": 0.4 + epoch / 30, "ari": None}
        records.append(record)
    return records


def run(n=120, k=4, p=5, shape=(8, 8), n_classes=4, seed=0, dtype=np.float32):
    """The arguments of a report on n examples in k separate groups."""
    rng = np.random.default_rng(seed)
    centroids = 10 * rng.normal(size=(k, p))
    labels = np.arange(n) % k
    embeddings = (centroids[labels] + rng.normal(size=(n, p))).astype(np.float32)
    return {
        "metrics": history(),
        "embeddings": embeddings,
        "labels": labels.astype(np.int32),
        "distances": np.linalg.norm(embeddings - centroids[labels], axis=1),
        "centroids": centroids,
        "examples": (255 * rng.random((n, *shape))).astype(dtype),
        "truth": labels % n_classes,
    }


def clusters_of(arguments, class_names=None):
    names = ("embeddings", "labels", "distances", "centroids", "examples", "truth")
    return ClusteredExamples.of(*(arguments[name] for name in names), class_names)


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def constant():
    arguments = run(n=60, shape=(3,))
    arguments["embeddings"][:] = 1.0
    arguments["examples"][:] = 0.0
    arguments["centroids"][:] = 1.0
    arguments["distances"][:] = 0.0
    return arguments | {"metrics": [{"epoch": 1, "phase": "cluster", "loss": 0.0}]}


def not_finite():
    arguments = run(n=60, p=1)
    arguments["embeddings"][:] = np.nan
    arguments["distances"][:] = np.nan
    arguments["examples"][0] = np.nan
    return arguments | {"metrics": [{"epoch": 1, "phase": "pretrain", "loss": None}]}


def empties():
    arguments = run(n=60, k=7, n_classes=2)
    arguments["labels"] = np.where(arguments["labels"] < 3, 1, 5)
    arguments["centroids"][0] = np.nan
    return arguments | {"metrics": []}


DEGENERATE = {
    "one cluster": lambda: run(n=40, k=1, n_classes=1, shape=(300,)),
    "one example": lambda: run(n=1, k=1, p=3),
    "fewer examples than clusters": lambda: run(n=5, k=8, p=3, shape=(200, 150, 4)),
    "constant": constant,
    "not finite": not_finite,
    "empty clusters": empties,
    "one dimension, scalars": lambda: run(p=1, shape=()),
    "neither image nor vector": lambda: (
        run(n=50, p=2, shape=(2, 3, 2)) | {"metrics": history()[:3]}
    ),
}


IN_PICTURES = {"one example", "not finite", "empty clusters", "one dimension, scalars"}
"""Of which the default run draws pictures; of the others it writes pages."""


class CountedRows:
    """Examples of a large file: rows are read one at a time, and counted in ``read``."""

    def __init__(self, examples: np.ndarray):
        self._examples = examples
        self.shape, self.dtype = examples.shape, examples.dtype
        self.read = 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, row):
        assert np.ndim(row) == 0
        self.read += 1
        return self._examples[row]
