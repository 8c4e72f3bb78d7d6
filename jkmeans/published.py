"""Published results of deep clustering on full data sets, each with the place it was read.

ACC, NMI and ARI in percent, None where the source has no such number. Protocols differ (networks,
pretraining, views): the source says which. A number without a source is not here.
"""

from typing import NamedTuple

from jkmeans.augmentation import VIEWS
from jkmeans.configuration import Config


class Published(NamedTuple):
    """One published row.

    Attributes:
      acc: in percent.
      nmi: in percent, or None.
      ari: in percent, or None.
      sd: standard deviation of acc over seeds, or None.
      source: where it was read.
    """

    acc: float
    nmi: float | None
    ari: float | None
    sd: float | None
    source: str


_KERAS = "DEC-keras results.csv, mean of 10"

PUBLISHED: dict[str, dict[str, Published]] = {
    "mnist": {
        "autoencoder": Published(87.9, 80.7, 78.3, None, _KERAS),
        "dec": Published(91.2, 86.9, 85.6, 4.7, _KERAS),
        "idec": Published(88.1, None, None, None, "Guo et al. 2017, in the IDEC-toy README"),
        "dcn": Published(83.0, 81.0, 75.0, None, "Yang et al. 2017, in boyangumn/DCN issue 4"),
        "dkm": Published(84.6, 79.2, None, None, "a reimplementation, Rufaim's README"),
        "vade": Published(94.46, None, None, None, "VaDE README"),
        "n2d": Published(97.9, 94.2, None, None, "Papers-with-Code page, 1000 epochs"),
        "dec, views": Published(98.5, 96.0, None, None, "ConvDEC-DA, DEC-DA README"),
        "dec, BRB": Published(91.1, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
        "idec, BRB": Published(94.2, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
        "dcn, BRB": Published(96.4, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
    },
    "fashion-mnist": {
        "autoencoder": Published(60.6, 63.7, 47.4, None, _KERAS),
        "dec": Published(61.8, 65.1, 49.4, 3.6, _KERAS),
        "n2d": Published(67.2, 68.4, None, None, "Papers-with-Code page, 1000 epochs"),
        "dec, views": Published(58.6, 63.6, None, None, "ConvDEC-DA, DEC-DA README"),
        "dec, BRB": Published(59.6, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
        "idec, BRB": Published(56.0, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
        "dcn, BRB": Published(52.3, None, None, None, "BRB, ICLR 2025, views, 650 epochs"),
    },
}
"""By data set, and by the method with what was added to it: nothing, views or soft resets (BRB)."""

N_CLASSES = 10
"""Of every data set here; accuracies of another number of clusters are not comparable."""


def published_result(config: Config) -> Published | None:
    """What was published of the method of a config, on all of the same data.

    Args:
      config: validated.

    Returns:
      The row of `PUBLISHED`; None where there is none, or the config takes a part of the data or
      another number of clusters.
    """
    if config.data.split != "all" or config.data.n_examples or config.n_clusters != N_CLASSES:
        return None
    views = any(config.augmentation[view] for view in VIEWS)
    added = ", BRB" if config.reset.every else ", views" if views else ""
    return PUBLISHED.get(config.data.name, {}).get(f"{config.objective.name}{added}")
