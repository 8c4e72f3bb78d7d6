"""Every method on all 70,000 images of MNIST, three seeds each.

python -m experiments.table --config configs/table_mnist.py --workdir runs/table_mnist

What it reaches stands in docs/results.md. A table begun before 2026-11-27 needs another --workdir:
its rows on views are others now.
"""

from ml_collections import ConfigDict

from configs import mnist
from jkmeans.configuration import Config
from jkmeans.methods import with_method


def get_config() -> Config:
    """The config: ``runs`` holds one complete config for each row."""
    joint = mnist.get_config()
    by_adam = plain_autoencoder(joint)

    plain = by_gradient_descent(by_adam)
    # Every image is reconstructed from a view of it, so that the embedding forgets the pose.
    views = affine_views(by_adam)
    views.training.n_pretrain_epochs = 60
    views.training.schedule = views.training.clustering_schedule = "cosine"
    # Or clustering alone sees views, after the pretraining of the rows without them.
    clustering_views = affine_views(plain)
    clustering_views.augmentation.pretraining = False
    clustering_views.training.clustering_learning_rate = 0.1

    config: Config = ConfigDict()
    config.n_seeds = 3
    config.runs = ConfigDict(sort_keys=False)  # The order of the rows.
    config.runs.update(after_gradient_descent(plain))
    # Faster: short products once the network is pretrained, and no pass over the data for the
    # targets. What it costs stands in docs/results.md.
    quick = {"network__precision": "bfloat16", "centroids__bank": "stored"}
    config.runs["dec, bfloat16"] = with_method(plain, "dec", **quick)
    config.runs["n2d"] = with_method(plain, "n2d")
    config.runs["n2d, consensus"] = by_eigenvectors(plain, "consensus")
    gaussian = {
        "objective__likelihood": "gaussian",
        "training__clustering_optimizer": "adam",
        "training__clustering_learning_rate": 3e-4,
    }
    config.runs["vade"] = with_method(plain, "vade", **gaussian)
    config.runs["autoencoder, views"] = with_method(views, "autoencoder")
    config.runs["n2d, views"] = with_method(views, "n2d", objective__starts=10)
    # A view goes to the cluster of its image: the nearest to the view can be another.
    of_image = {"objective__assignment": "stored"}
    on_views = {
        "dec": with_method(clustering_views, "dec"),
        "idec": with_method(clustering_views, "idec"),
        "dcn": with_method(clustering_views, "dcn", **of_image, objective__centroid_weight=0.5),
    }
    config.runs.update({f"{name}, views": run for name, run in on_views.items()})
    config.runs.update({f"{name}, BRB": soft_resets(run) for name, run in on_views.items()})
    # Of another kind: clusters that hold on to what k-means gave them (see the results).
    config.runs["vade, views"] = with_method(
        clustering_views,
        "vade",
        objective__likelihood="gaussian",
        objective__pixel_variance=1.0,
        objective__em_iterations=0,
        objective__responsibilities="stored",
        objective__mixture_rate_factor=0.01,
        training__clustering_optimizer="adam",
        training__clustering_learning_rate=1e-3,
        training__n_epochs=20,
    )
    config.runs["joint, views"] = with_method(
        clustering_views,
        "joint",
        **of_image,
        objective__centroid_weight=2.5,
        objective__warmup_epochs=5.0,
    )
    config.runs["joint, unit norm"] = for_a_table(joint)
    return config


def plain_autoencoder(joint: Config) -> Config:
    """What the methods of a table of 28 × 28 images share: the autoencoder of the literature.

    Args:
      joint: the config of joint deep k-means on these data.
    """
    plain = for_a_table(joint)
    plain.augmentation.shift = plain.augmentation.rotation = plain.augmentation.zoom = 0.0
    plain.network.normalize = False
    plain.centroids.bank = "refreshed"
    plain.centroids.n_init = 10
    plain.training.n_pretrain_epochs = 40
    plain.training.n_epochs = 15
    plain.training.clustering_learning_rate = 1e-4
    return plain


def by_gradient_descent(plain: Config) -> Config:
    """The same by stochastic gradient descent at a large rate, as in DEC-keras.

    It keeps digits apart that Adam mixes. The 300 epochs at a rate of 1 there are 80 here, at a
    rate of 3 that falls to 0.
    """
    plain = plain.copy_and_resolve_references()
    plain.network.initializer = "fan_in_uniform"
    plain.training.optimizer = plain.training.clustering_optimizer = "sgd"
    plain.training.learning_rate = 3.0
    plain.training.schedule = plain.training.clustering_schedule = "cosine"
    plain.training.n_pretrain_epochs = 80
    plain.training.clustering_learning_rate = 0.01
    return plain


def by_eigenvectors(plain: Config, layout: str) -> Config:
    """N2D by eigenvectors of the graph of neighbours and k-means, not by UMAP and a mixture.

    Args:
      plain: the config of the autoencoder.
      layout: "spectral", one clustering, or "consensus", what several agree on.
    """
    return with_method(
        plain,
        "n2d",
        objective__layout=layout,
        objective__clusterer="k-means",
        objective__starts=20,
    )


def affine_views(config: Config) -> Config:
    """A copy whose network sees random views of images."""
    config = config.copy_and_resolve_references()
    config.augmentation.shift = 2.0  # Pixels.
    config.augmentation.rotation = 10.0  # Degrees.
    config.augmentation.zoom = 0.1
    return config


def soft_resets(run: Config) -> Config:
    """A copy that mixes the hidden layers with fresh ones after 10 and 20 epochs (BRB).

    It takes twice the epochs, in the faster precision.
    """
    run = run.copy_and_resolve_references()
    run.network.precision = "bfloat16"
    run.reset.every = 10
    run.training.n_epochs = 30
    run.training.clustering_schedule = "constant"  # Else there is no rate left to learn anew.
    return run


def after_gradient_descent(plain: Config) -> dict[str, Config]:
    """The methods that go on from `by_gradient_descent`, at the rates that suit it."""
    faster = {"training__clustering_learning_rate": 0.1}
    return {
        "autoencoder": with_method(plain, "autoencoder"),
        "dec": with_method(plain, "dec"),
        "idec": with_method(plain, "idec", **faster),
        "dcn": with_method(plain, "dcn", **faster, objective__centroid_weight=0.02),
        "dkm": with_method(plain, "dkm", **faster),
    }


def for_a_table(config: Config) -> Config:
    """A copy that leaves out what takes time and nobody looks at."""
    config = config.copy_and_resolve_references()
    config.report.pictures = False
    config.checkpoint.every = 50
    config.checkpoint.keep = 1
    return config
