"""The task "kmeans": decentralised k-means beside Lloyd's algorithm on all points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans import kmeans
from jkmeans.configuration import Config
from jkmeans.consensus import figures
from jkmeans.consensus.averaging import Averaging, push_sum, symmetric
from jkmeans.consensus.kmeans import Shares, Trace, agreed_centroids, begin, iterate
from jkmeans.consensus.links import Links
from jkmeans.consensus.tasks.base import (
    Arrays,
    Case,
    Check,
    Net,
    Outcome,
    Task,
    fingerprint_of,
    measure,
    nets_of,
    nodes_of,
    number_type,
    refuse_rounds,
    write_tables,
)
from jkmeans.consensus.tasks.data import DEALS, check_enough, load_points, order_of, stretches
from jkmeans.consensus.tasks.data import FIELDS as DATA_FIELDS
from jkmeans.consensus.traffic import bytes_per_round
from jkmeans.errors import UserError
from jkmeans.fields import Field, integer, number, words
from jkmeans.kmeans.statistics import ClusterStatistics, inertia_of
from jkmeans.sharding import BY_STEP, REPLICATED, SHARDED
from jkmeans.sources.base import ArraySource

_FIRST_TOLERANCE = 1e-6
_CENTRAL = "central"
_MAX_LLOYD = 1000

FIELDS: dict[str, Field] = {
    **DATA_FIELDS,
    "kmeans.n_clusters": integer(1, "K"),
    "kmeans.n_iter": integer(1, "iterations"),
    "kmeans.deals": words(DEALS, "how points are dealt to nodes"),
    "kmeans.rounds": integer(0, "R, rounds of gossip in an iteration; 0 for what shrink needs"),
    "kmeans.shrink": number("what the rounds leave of a disagreement", positive=True),
}


def make_task(config: Config) -> Task:
    """The task of a validated config.

    Raises:
      UserError: graphs or data cannot be used.
    """
    if config.kmeans.shrink >= 1:
        raise UserError(f"config.kmeans.shrink is {config.kmeans.shrink}; accepted: 0 to below 1")
    nets = nets_of(config)
    points = load_points(config)
    if config.kmeans.n_clusters > len(points):
        raise UserError(
            f"config.kmeans.n_clusters is {config.kmeans.n_clusters:,}, but there are "
            f"{len(points):,} points; accepted: up to that many"
        )
    work = _Work(config, nets, points)
    cases = [Case(_CENTRAL, work.central)]
    for deal in config.kmeans.deals:
        for name in nets:
            for loss in work.losses:
                cases.append(
                    Case(f"{deal}_{name}_{loss}", partial(work.decentralised, deal, name, loss))
                )
    return Task(fingerprint_of(nets, ArraySource(points).fingerprint()), cases, work.write)


class _Work:
    def __init__(self, config: Config, nets: dict[str, Net], points: np.ndarray):
        self.config, self.nets = config, nets
        self.points = points.astype(number_type(config))
        # What rounding makes of points that are all in one place.
        rounding = 4 * np.finfo(self.points.dtype).eps * float(np.abs(self.points).max())
        self.rounding = self.points.size * rounding**2
        self.nodes = nodes_of(config, self.nets)
        self.losses = {"none": 0.0}
        if config.loss.links:
            self.losses["links"] = config.loss.links
        if config.loss.messages:
            self.losses["messages"] = config.loss.messages
        for name, net in nets.items():
            for kind, loss in self.losses.items():
                rounds = net.spectrum.rounds(min(_FIRST_TOLERANCE, config.kmeans.shrink))
                refuse_rounds(f"config.loss.{kind}", loss, name, self._with_loss(rounds, kind))
        self.n_nodes = next(iter(nets.values())).graph.n_nodes
        check_enough(len(points), self.n_nodes)

    @property
    def statistics(self) -> ClusterStatistics:
        """The shapes of what a node sends."""
        k, d, dtype = self.config.kmeans.n_clusters, self.points.shape[1], self.points.dtype
        shapes: Any = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((k, d), (k,), ())]
        return ClusterStatistics(*shapes)

    def bytes_a_round(self, net: Net, loss: str) -> int:
        weight = jax.ShapeDtypeStruct((), self.points.dtype)
        values = (self.statistics, weight) if loss == "messages" else self.statistics
        return bytes_per_round(net.graph, values)

    def rounds(self, net: Net, loss: str, relative: float) -> int:
        """Enough for the disagreement to shrink so far, on average over what is lost."""
        rounds = net.spectrum.rounds(relative)
        return int(np.ceil(self._with_loss(rounds, loss)))

    def _with_loss(self, rounds: float, loss: str) -> float:
        return rounds / (1 - self.losses[loss])

    def n_rounds(self, net: Net, loss: str) -> int:
        return self.config.kmeans.rounds or self.rounds(net, loss, self.config.kmeans.shrink)

    def averaging(self, links: Links, net: Net, loss: str, purpose: int) -> Averaging:
        key = jax.random.fold_in(jax.random.key(self.config.seed), purpose)
        if loss == "messages":
            return push_sum(links, key, self.losses[loss])
        return symmetric(links, net.mixing, None if loss == "none" else key, self.losses[loss])

    @property
    def first_key(self) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), 2)

    def central(self, check: Check) -> Arrays:
        """Lloyd's algorithm on all points, from the same first centroids."""
        check()
        k = self.config.kmeans.n_clusters
        x = jnp.asarray(self.points)
        mean = self.points.mean(axis=0, dtype=np.float64)
        deviation = self.points.std(axis=0, dtype=np.float64)
        noise = jax.random.normal(self.first_key, (1, k, x.shape[1]), x.dtype)[0]
        first = jnp.asarray(mean + deviation * np.asarray(noise), x.dtype)

        def step(centroids: jax.Array, _: None):
            found = kmeans.assign(x, centroids)
            statistics = kmeans.cluster_statistics(x, found.labels, k, distances=found.distances)
            return kmeans.centroids_from(statistics, centroids), statistics.inertia

        @jax.jit
        def program(first):
            _, inertia = lax.scan(step, first, None, length=self.config.kmeans.n_iter)
            end = kmeans.lloyd(x, first, max_iter=_MAX_LLOYD, empty="keep")
            return inertia, end.inertia, end.n_iter, end.centroids

        inertia, end, n_iter, centroids = check.fetch(program(first))
        return {"inertia": inertia, "end": end, "n_iter": n_iter, "centroids": centroids}

    def decentralised(self, deal: str, name: str, loss: str, check: Check) -> Arrays:
        """Decentralised k-means on one topology, with one kind of loss."""
        check()
        net, ours = self.nets[name], self.config.kmeans
        order = order_of(self.points, deal, self.config.seed)
        shares = Shares(*stretches(self.points[order], net.graph.n_nodes))
        n_rounds = self.n_rounds(net, loss)
        rate = net.spectrum.rate if loss == "none" else 1.0
        if loss == "messages":
            rate = float("nan")

        def begun(links: Links, shares: Shares):
            first = agreed_centroids(
                self.averaging(links, net, loss, 0),
                self.first_key,
                shares,
                ours.n_clusters,
                self.rounds(net, loss, _FIRST_TOLERANCE),
            )
            averaging = self.averaging(links, net, loss, 1)
            return averaging, begin(averaging, shares, first)

        def program(links: Links, shares: Shares):
            averaging, state = begun(links, shares)
            state, trace = iterate(links, averaging, shares, state, ours.n_iter, n_rounds, rate)
            return state.centroids, trace

        def only_rounds(links: Links, values: ClusterStatistics):
            averaging = self.averaging(links, net, loss, 1)
            state = lax.fori_loop(
                0, n_rounds, lambda t, s: averaging.round(s, t), averaging.start(values)
            )
            return averaging.read(state)

        specs: Any = (REPLICATED, REPLICATED, REPLICATED, BY_STEP)
        out = (SHARDED, Trace(*specs))
        compiled = self.nodes.compile(net.graph, program, 1, out)
        centroids, trace = check.fetch(compiled(shares))
        values = jax.tree.map(
            lambda leaf: np.zeros((net.graph.n_nodes, *leaf.shape), leaf.dtype), self.statistics
        )
        measured = measure(net.graph, only_rounds, 1, values)
        inertia = jax.jit(
            lambda c: inertia_of(kmeans.assign(jnp.asarray(self.points), c).distances)
        )
        # Of some nodes where there are many: those that disagree most, and a few others.
        asked = np.argsort(-trace.spread[-1])[:16]
        everywhere = np.array([float(inertia(centroids[node])) for node in asked])
        return {
            **trace._asdict(),
            "centroids": centroids,
            "everywhere": everywhere,
            "n_rounds": np.array(n_rounds),
            "measured_bytes": np.array(-1 if measured is None else measured),
        }

    def write(self, workdir: Path, found: Mapping[str, Arrays]) -> Outcome:
        """Pictures, the table, and what became of it all."""
        central = found[_CENTRAL]
        end = float(central["end"])
        end = end if end > self.rounding else 0.0
        rows, lost_nodes = [], []

        def above(inertia: np.ndarray) -> np.ndarray:
            """In percent of where Lloyd's algorithm ends; NaN where that is 0."""
            return 100 * (inertia / end - 1) if end else np.full_like(inertia, np.nan)

        panels: dict[str, list[figures.Curve]] = {}
        by: dict[str, int] = {}
        disagreement, bounds = {}, {}
        for deal in self.config.kmeans.deals:
            curves = panels.setdefault(f"points {deal}", [])
            for name, net in self.nets.items():
                for loss in self.losses:
                    arrays = found[f"{deal}_{name}_{loss}"]
                    n_rounds = int(arrays["n_rounds"])
                    sent = self.bytes_a_round(net, loss)
                    excess = above(arrays["inertia"])
                    worst = above(arrays["everywhere"]).max()
                    share = f"{100 * self.losses[loss]:.6g}%"
                    label = name if loss == "none" else f"{name}, {share} of {loss} lost"
                    measured = int(arrays["measured_bytes"])
                    rows.append(
                        {
                            "points": deal,
                            "topology": name,
                            "lost": loss if loss == "none" else f"{share} {loss}",
                            "rounds an iteration": n_rounds,
                            "inertia of all, %": float(excess[-1]) if end else None,
                            "worst node on all points, %": float(worst) if end else None,
                            "disagreement": float(arrays["disagreement"][-1]),
                            "its bound": float(arrays["bound"][-1]) if loss == "none" else None,
                            "bytes a round": sent,
                            "bytes a round, compiled": None if measured < 0 else measured,
                            "bytes in all": sent * n_rounds * len(excess),
                        }
                    )
                    style = "-" if loss == "none" else ("--" if loss == "messages" else ":")
                    curves.append(figures.Curve(label, np.abs(excess), sent, style))
                    if not np.isfinite(arrays["inertia"][-1]):
                        lost_nodes.append(f"{label} with points {deal}")
                    by[label] = n_rounds
                    if deal == self.config.kmeans.deals[-1]:
                        disagreement[label] = arrays["disagreement"]
                        if loss == "none":
                            bounds[label] = arrays["bound"]
        size = self.points.shape
        text = (
            f"{size[0]:,} points of {size[1]} features, K = {self.config.kmeans.n_clusters}, "
            f"{self.n_nodes:,} nodes, {self.config.kmeans.n_iter} iterations. Lloyd's algorithm on "
            f"all points from the same first centroids ends after {int(central['n_iter'])} "
            f"iterations with an inertia of {end:.6g}; percentages are what is above it. Of all: "
            "each node's points with its own centroids in the last iteration; worst node: all "
            "points with the centroids of one node. Bytes are of all nodes together."
        )
        markdown = write_tables(workdir, "kmeans", "Decentralised k-means", text, rows)
        if end:
            figures.draw_curves(
                workdir / "kmeans.png",
                panels,
                title="Decentralised k-means",
                subtitle="how far its inertia is from where Lloyd's algorithm on all points ends",
                value="|inertia − central|, %",
                rounds_a_point=by,
            )
        figures.draw_disagreement(
            workdir / "disagreement.png",
            disagreement,
            bounds,
            f"Disagreement of the nodes, points {self.config.kmeans.deals[-1]}",
        )
        self._draw_networks(workdir, found)
        print(markdown, flush=True)
        collapse = (
            f"nodes lost their centroids on {', '.join(lost_nodes)}: one that hears too little "
            "gives its weight away until nothing is left of it; accepted: a smaller "
            "loss.messages"
        )
        return Outcome(
            {"inertia": end, "central_n_iter": int(central["n_iter"]), "kmeans": rows},
            collapse if lost_nodes else "",
        )

    def _draw_networks(self, workdir: Path, found: Mapping[str, Arrays]) -> None:
        deal = self.config.kmeans.deals[-1]
        variance = self.points.var(axis=0).sum()
        # Of points in one place there is no spread.
        spread = np.sqrt(variance) if variance * len(self.points) > self.rounding else 1.0
        rows = []
        for name, net in list(self.nets.items())[: figures.MOST_NETWORKS]:
            values = found[f"{deal}_{name}_none"]["spread"] / spread
            picked, when = figures.chosen_early(values)
            rows.append(
                figures.NetworkRow(net.graph, [f"iteration {t:,}" for t in when], picked, None)
            )
        figures.draw_networks(
            workdir / "network.png",
            rows,
            f"How far each node's centroids are from the others', points {deal}",
            "without losses",
            "distance to the mean of all nodes, relative to the spread of the points",
        )
