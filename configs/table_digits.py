"""Every method on the 1,797 digits of scikit-learn, five seeds each.

python -m experiments.table --config configs/table_digits.py --workdir runs/table_digits
"""

from ml_collections import ConfigDict

from configs import digits
from jkmeans.configuration import Config
from jkmeans.methods import with_method


def get_config() -> Config:
    """The config: ``runs`` holds one complete config for each row."""
    base = digits.get_config()
    base.centroids.bank = "refreshed"
    base.training.n_pretrain_epochs = 50
    base.training.n_epochs = 50
    base.checkpoint.every = 50
    base.checkpoint.keep = 1
    base.report.pictures = False

    def small_views(method: str, **changes) -> Config:
        views = {"augmentation__shift": 0.5, "augmentation__rotation": 10.0}
        return with_method(base, method, **{"augmentation__zoom": 0.1, **views, **changes})

    config: Config = ConfigDict()
    config.n_seeds = 5
    config.runs = ConfigDict(sort_keys=False)  # The order of the rows.
    config.runs["autoencoder"] = with_method(base, "autoencoder")
    config.runs["joint"] = with_method(base, "joint")
    config.runs["dec"] = with_method(base, "dec")
    config.runs["idec"] = with_method(base, "idec")
    config.runs["dcn"] = with_method(base, "dcn")
    config.runs["dkm"] = with_method(base, "dkm")
    config.runs["vade"] = with_method(base, "vade")
    config.runs["idec, views"] = small_views("idec", augmentation__invariance=True)
    longer = {"training__n_pretrain_epochs": 100, "training__n_epochs": 0, "objective__starts": 10}
    consensus = {"objective__layout": "consensus", "objective__clusterer": "k-means"}
    t_sne = {"objective__layout": "t-sne", "objective__n_neighbors": 40}
    config.runs["n2d, views"] = small_views("n2d", **longer)
    config.runs["n2d by t-SNE and k-means, views"] = small_views(
        "n2d", **longer, **t_sne, objective__clusterer="k-means", network__embedding_dim=64
    )
    config.runs["n2d by a consensus, views"] = small_views(
        "n2d", **longer | {"objective__starts": 20}, **consensus
    )
    config.runs["dec, BRB"] = with_method(base, "dec", reset__every=10)
    config.runs["swav"] = small_views("swav")
    config.runs["deepcluster_v2"] = small_views("deepcluster_v2")
    return config
