"""Deep clustering in scikit-learn's interface: a run of `jkmeans.training` behind an estimator."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from jkmeans import configuration, datasets, evaluation, sharded, sharding, training
from jkmeans.configuration import Config
from jkmeans.errors import CollapseError, UserError, refuse_mask
from jkmeans.estimators.base import at_least
from jkmeans.estimators.deep_config import parameters_of, values_of
from jkmeans.estimators.inputs import keeps_model
from jkmeans.estimators.run_folder import RunFolder
from jkmeans.interruption import Interrupted
from jkmeans.recorder import read_metrics, silence
from jkmeans.telling import warnings_collected
from jkmeans.whole_files import UNREADABLE, read_arrays, write_arrays
from jkmeans.workdir import CONFIG_FILE

FITTED_FILE = "fitted.npz"
"""What `DeepClustering.save` adds to the folder of a run: labels and embeddings of the fit."""

_LARGEST_SEED = 2**31 - 1
# float64 first: it is what anything else, such as lists and objects, becomes.
_DTYPES = [np.dtype(name) for name in ("float64", *datasets.DTYPES)]
_STOPPED_BY_CTRL_C = 130


class DeepClustering(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """Deep clustering: a network and its centroids, trained together.

    ``fit`` is a run of ``jkmeans.training.train``: an autoencoder is pretrained, k-means on its
    embeddings gives the first centroids, and the method trains both further. The run has the same
    bits as one of ``train_and_evaluate`` with the config ``config_`` on the same examples, scale
    and devices. The same ``random_state`` on the same machine gives the same bits.

    Parameters that still have their default give way to what the method cannot do without (VaDE
    has a variational network, the autoencoder has no clustering epochs, SwAV has views); others
    stand, and what contradicts the method is refused.

    Examples are vectors [n, d] or images [n, h, w] or [n, h, w, c]: NumPy arrays, memory maps,
    anything with ``__array__``, data frames of numbers. Networks compute in float32.

    Args:
      method: a key of ``jkmeans.methods.METHODS``, such as "idec", "dec", "dcn", "dkm", "vade".
      n_clusters: K.
      embedding_dim: p, numbers of an embedding.
      widths: of the hidden layers, or channels of the convolutions.
      network: "fully_connected", "convolutional", …, a key of ``jkmeans.networks.NETWORKS``, or a
        ``module:function`` of your own.
      n_pretrain_epochs: epochs of the autoencoder alone.
      n_epochs: epochs of clustering.
      batch_size: over all devices.
      learning_rate: of pretraining.
      clustering_learning_rate: of clustering.
      augmentation: random views of images: a dictionary with any of shift (pixels), rotation
        (degrees), zoom (part of the size), pretraining (whether pretraining sees views, too) and
        invariance (whether clustering sees examples and views, or views only); None for those of
        the method, which are none but for SwAV.
      scale: examples are multiplied by it, in ``fit`` and ever after. "auto" divides unsigned
        bytes by 255 and leaves all other types as they are; features are best of about unit
        variance. Give ``predict`` the units that ``fit`` had.
      options: further fields of the config by their full names, which win over everything above,
        such as ``{"objective.cluster_weight": 0.1, "centroids.n_init": 5}``; see
        ``jkmeans.configuration.FIELDS`` and the method.
      random_state: a seed, a RandomState (a seed is drawn from it), or None for a seed from
        NumPy's global generator, or that of the run which ``workdir`` holds.
      n_devices: of the mesh; 0 for all. A fitted model also predicts where there are fewer, with a
        warning.
      workdir: folder of the run, with its checkpoints, metrics and TensorBoard events. Where it
        holds an interrupted run of the same parameters and data, ``fit`` goes on with it. None for
        a temporary folder, which is removed with the estimator.
      verbose: whether to show a progress bar, or a line per epoch, and the results.

    Attributes:
      labels_: [n] int32, the cluster of each example; not there after `load` of a folder that
        `save` has not written.
      embeddings_: [n, p] float32, where labels_ is.
      cluster_centers_: [k, p] float32, in the space of the embeddings.
      inertia_: sum of squared distances of embeddings to the centers of their clusters.
      n_features_in_: numbers of an example.
      feature_names_in_: [d], if X was a data frame with names.
      n_epochs_: epochs that were trained, pretraining included.
      history_: a dictionary for each epoch: epoch, phase, loss, …, as in metrics.jsonl.
      config_: of the run, an ``ml_collections.ConfigDict``.
      workdir_: path of the folder of the run; of a copy or a loaded estimator, that of its own.
    """

    _parameter_constraints: ClassVar[dict] = {
        "method": [str],
        "n_clusters": [at_least(Integral, 1)],
        "embedding_dim": [at_least(Integral, 1)],
        "widths": ["array-like"],
        "network": [str],
        "n_pretrain_epochs": [at_least(Integral, 0)],
        "n_epochs": [at_least(Integral, 0)],
        "batch_size": [at_least(Integral, 1)],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "clustering_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "augmentation": [dict, None],
        "scale": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "options": [dict, None],
        "random_state": ["random_state"],
        "n_devices": [at_least(Integral, 0)],
        "workdir": [str, os.PathLike, None],
        "verbose": ["verbose"],
    }

    _run: RunFolder
    cluster_centers_: np.ndarray
    labels_: np.ndarray
    embeddings_: np.ndarray
    inertia_: float
    n_features_in_: int
    feature_names_in_: np.ndarray
    n_epochs_: int
    history_: list[dict[str, Any]]
    config_: Config

    def __init__(
        self,
        method="idec",
        n_clusters=10,
        *,
        embedding_dim=10,
        widths=(500, 500, 2000),
        network="fully_connected",
        n_pretrain_epochs=50,
        n_epochs=50,
        batch_size=256,
        learning_rate=1e-3,
        clustering_learning_rate=1e-3,
        augmentation=None,
        scale: Any = "auto",
        options=None,
        random_state=None,
        n_devices=0,
        workdir=None,
        verbose=False,
    ):
        self.method = method
        self.n_clusters = n_clusters
        self.embedding_dim = embedding_dim
        self.widths = widths
        self.network = network
        self.n_pretrain_epochs = n_pretrain_epochs
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.clustering_learning_rate = clustering_learning_rate
        self.augmentation = augmentation
        self.scale = scale
        self.options = options
        self.random_state = random_state
        self.n_devices = n_devices
        self.workdir = workdir
        self.verbose = verbose

    @keeps_model
    def fit(self, X: Any, y: Any = None) -> DeepClustering:
        """Trains the network and its centroids, or goes on with the run that workdir holds.

        Args:
          X: [n, d], [n, h, w] or [n, h, w, c], see the class.
          y: ignored.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or workdir cannot be used.
          CollapseError: the embeddings shrank to a point or ran away, or the loss is not finite.
          KeyboardInterrupt: Ctrl-C; with a workdir, the same fit goes on where it stopped.
        """
        self._validate_params()
        if self.workdir is not None and not os.fspath(self.workdir):
            raise ValueError("workdir is empty; accepted: a folder, or None for a temporary one")
        X = self._read(X, reset=True)
        with _value_errors(), _said(self.verbose):
            config = self._config(self._seed())
            sharded.refuse_few_rows(len(X), config.n_clusters)
            dataset = datasets.from_arrays(X, name="X", scale=self._scale(X))
            run = RunFolder.temporary() if self.workdir is None else RunFolder(self.workdir)
            with _stops(kept=self.workdir is not None):
                training.train(config, dataset, run.path)
            self._adopt(run, dataset.examples)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Trains, and returns the embeddings of the examples: [n, p] float32.

        Args:
          X: as for `fit`.
          y: ignored.
        """
        return self.fit(X).embeddings_.copy()

    def predict(self, X: Any) -> np.ndarray:
        """The cluster of each example.

        Args:
          X: [n, …] of the shape and in the units of the fit; of any accepted type.

        Returns:
          [n] int32.

        Raises:
          NotFittedError: there was no fit.
          ValueError: X has another shape, or is not finite.
        """
        return self._found(X).labels

    def transform(self, X: Any) -> np.ndarray:
        """The embedding of each example.

        Args:
          X: as for `predict`.

        Returns:
          [n, p] float32.
        """
        return self._found(X).embeddings

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the sum of squared distances of embeddings to the centers of their clusters.

        Args:
          X: as for `predict`.
          y: ignored.
        """
        return -float(np.sum(self._found(X).distances, dtype=np.float64))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes network, centroids, K and config to a folder, for `load`.

        It is the folder of a run, with its newest checkpoint: ``python -m experiments.predict
        --workdir FOLDER`` and ``jkmeans.evaluation.load_model`` read it. It appears under its name
        only when it is whole.

        Args:
          folder: a new or empty one, or one that `save` has written, which is replaced.

        Raises:
          NotFittedError: there was no fit.
          ValueError: the folder holds something else.
          OSError: it cannot be written.
        """
        check_is_fitted(self)
        folder = Path(folder).expanduser().resolve()  # Where it is a link, what that names.
        _refuse_to_replace(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                f"{folder} cannot be made: {error.filename} is a file; accepted: a new or empty "
                "folder"
            ) from error
        new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        try:
            with _value_errors():
                self._run.files().write(new)
            arrays: dict[str, Any] = {}
            if hasattr(self, "labels_"):
                arrays |= {"labels": self.labels_, "embeddings": self.embeddings_}
            if hasattr(self, "feature_names_in_"):
                arrays["feature_names"] = np.asarray(self.feature_names_in_, str)
            write_arrays(new / FITTED_FILE, arrays)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, n_devices: int | None = None) -> DeepClustering:
        """A fitted estimator from a folder that `save` has written, or from that of any run.

        The folder may go afterwards. The parameters are those of the run's config: a clone that
        is fitted on the same data finds the same.

        Args:
          folder: of `save`, or the workdir of ``experiments.train``.
          n_devices: of the mesh; 0 for all. None for as many as the run had, or, with a warning,
            for all where there are fewer.

        Raises:
          ValueError: it holds no checkpoint that can be read, or n_devices is given and there are
            fewer.
        """
        folder = Path(folder).expanduser().absolute()
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(
                f"{folder} holds no {CONFIG_FILE}; accepted: a folder that "
                f"{cls.__name__}.save has written, or that of a run"
            )
        with _value_errors(), _said(verbose=False):
            if n_devices is not None:
                sharding.make_mesh(n_devices)  # Refuses what there is not.
            there = RunFolder(folder)
            trained = there.model(0)
            config = trained.config
            estimator = cls(**parameters_of(cls, config, trained.scale))
            if n_devices is not None:
                estimator.set_params(n_devices=n_devices)
            estimator._adopt(there.files().unpacked())
        estimator.n_features_in_ = math.prod(trained.example_shape)
        estimator._take_up(folder / FITTED_FILE)
        return estimator

    def _take_up(self, path: Path) -> None:
        """What `save` has written besides the run; nothing of the folder of a run."""
        if not path.is_file():
            return
        try:
            arrays = read_arrays(path)
            if "labels" in arrays:
                self.labels_, self.embeddings_ = arrays["labels"], arrays["embeddings"]
            if "feature_names" in arrays:
                self.feature_names_in_ = arrays["feature_names"].astype(object)
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is damaged ({error}); accepted: what {type(self).__name__}.save has "
                "written; without this file the model loads without labels of its data"
            ) from error

    @property
    def workdir_(self) -> str:
        """The folder that the model is in."""
        check_is_fitted(self)
        return str(self._run.path)

    # The run

    def _config(self, seed: int) -> Config:
        return configuration.validate(configuration.nest(values_of(self, seed)))

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral) and self.random_state <= _LARGEST_SEED:
            return int(self.random_state)
        if self.random_state is None and self.workdir is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                path = Path(self.workdir).expanduser() / CONFIG_FILE
                return int(json.loads(path.read_text())["seed"])
        return int(check_random_state(self.random_state).randint(_LARGEST_SEED))

    def _scale(self, X: np.ndarray) -> float:
        if isinstance(self.scale, str):
            return 1 / 255 if X.dtype == np.uint8 else 1.0
        return float(self.scale)

    def _adopt(self, run: RunFolder, examples: np.ndarray | None = None) -> None:
        """Takes over what the folder of a run holds, and finds for examples: all or nothing."""
        model, results = run.model(self.n_devices), run.results()
        fitted: dict[str, Any] = {
            "_run": run,
            "config_": model.config,
            "cluster_centers_": np.array(model.centroids),
            "n_epochs_": model.epoch,
            "history_": read_metrics(run.path),
        }
        if results is not None:
            fitted["inertia_"] = float(results["inertia"])
        if examples is not None:
            found = evaluation.predict(model, examples)
            fitted |= {"labels_": found.labels, "embeddings_": found.embeddings}
        vars(self).update(fitted)

    # Examples

    def _read(self, X: Any, *, reset: bool) -> np.ndarray:
        """The examples, in a type that the trainer knows; their values are not looked at yet."""
        if isinstance(X, str | os.PathLike):
            raise ValueError(
                f"X is the path {os.fspath(X)!r}; accepted: an array, which numpy.load(path) gives "
                "(experiments.train takes the path of an .npy file)"
            )
        refuse_mask("X", X, ValueError)
        if not issparse(X) and hasattr(X, "__array__") and not hasattr(X, "columns"):
            X = X if isinstance(X, np.ndarray) else np.asarray(X)
        checks: Any = {"dtype": _DTYPES, "ensure_all_finite": False}
        if np.ndim(X) <= 2:
            rows: Any = validate_data(self, X, reset=reset, **checks)
            return rows
        X = check_array(X, allow_nd=True, input_name="X", estimator=self, **checks)
        if reset:
            # Takes back the names of the features of a fit before.
            validate_data(self, X, reset=True, skip_check_array=True)
            self.n_features_in_ = math.prod(X.shape[1:])
        return X

    def _found(self, X: Any) -> evaluation.Prediction:
        check_is_fitted(self)
        X = self._read(X, reset=False)
        with _value_errors(), _said(verbose=False):
            model = self._run.model(self.n_devices)
            examples = datasets.check_examples(X, expected_shape=model.example_shape, name="X")
            return evaluation.predict(model, examples)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_run")

    @property
    def _n_features_out(self) -> int:
        return self.cluster_centers_.shape[1]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _refuse_to_replace(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FITTED_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is there already and was not written by save; accepted: a new or empty "
            "folder, or one of an earlier save"
        )


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """What is a UserError in the commands is a ValueError here, as in scikit-learn."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def _stops(kept: bool) -> Iterator[None]:
    """What stops a run, as a caller of an estimator knows it.

    Args:
      kept: whether the folder of the run stays.
    """
    try:
        yield
    except Interrupted as error:
        # An Exception would be taken for a failed fit, by a grid search for one, which goes on.
        if error.exit_status == _STOPPED_BY_CTRL_C:
            raise KeyboardInterrupt(str(error)) from error
        raise SystemExit(error.exit_status) from error
    except CollapseError as error:
        if kept:
            raise
        raise CollapseError(
            f"{error} (a temporary folder, which is removed: give a workdir to keep it)"
        ) from error


@contextlib.contextmanager
def _said(verbose: Any) -> Iterator[None]:
    """Lets the trainer speak, or only its warnings, as warnings."""
    if verbose:
        yield
        return
    with silence(), warnings_collected() as collected:
        yield
    for text in collected:
        warnings.warn(text, RuntimeWarning, stacklevel=4)
