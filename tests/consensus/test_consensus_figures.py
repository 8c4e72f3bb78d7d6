"""Networks as they are drawn: what is to be told apart lies apart."""

import itertools

import numpy as np
import pytest

from jkmeans.consensus import figures
from jkmeans.consensus.figures import NetworkRow, draw_networks
from jkmeans.consensus.graphs import TOPOLOGIES, make_topology


@pytest.mark.parametrize(
    ("name", "n_nodes"), [*((name, 16) for name in TOPOLOGIES), ("torus", 99), ("hypercube", 64)]
)
def test_no_edge_runs_through_a_node(name, n_nodes):
    graph = make_topology(name, n_nodes)
    places = graph.positions
    starts, ends = places[graph.edges.T]
    along = (ends - starts)[:, None]  # [e, 1, 2]
    # Where on each edge it is nearest to each node.
    share = np.sum((places - starts[:, None]) * along, axis=2) / np.sum(along**2, axis=2)
    nearest = starts[:, None] + np.clip(share, 0, 1)[:, :, None] * along
    distances = np.linalg.norm(places - nearest, axis=2)
    distances[np.arange(graph.n_edges)[:, None], graph.edges] = np.inf
    between = np.linalg.norm(places[:, None] - places, axis=2)
    assert distances.min() > 0.1 * between[between > 0].min()


def test_texts_of_a_network_lie_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    rows = [
        NetworkRow(make_topology(name, 16), ("a", "b"), values, np.full((2, 16, 2), 7.96))
        for name in ("torus", "hypercube")
        # Little more than a decade has numbers at its small ticks, too.
        for values in [np.geomspace(0.15, 1.6, 32).reshape(2, 16)]
    ]
    draw_networks(tmp_path / "network.png", rows, "title", "subtitle", "value")
    (figure,) = drawn
    figure.draw_without_rendering()
    *panels, bar = figure.axes
    assert len(panels) == 4
    for ax in panels:
        # Without the room above small letters.
        boxes = [text.get_window_extent().expanded(1, 0.7) for text in ax.texts]
        assert len(boxes) == 16
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    labels = [*bar.get_yticklabels(), *bar.get_yticklabels(minor=True)]
    assert {label.get_fontsize() for label in labels if label.get_text()} == {8.0}
