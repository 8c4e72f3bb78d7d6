"""The task "vq": decentralised stochastic vector quantization beside one worker and all workers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans.configuration import Config
from jkmeans.consensus import figures
from jkmeans.consensus.averaging import Averaging, push_sum, symmetric
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
    write_tables,
)
from jkmeans.consensus.tasks.data import DEALS, check_enough, load_points, order_of, stretches
from jkmeans.consensus.tasks.data import FIELDS as DATA_FIELDS
from jkmeans.consensus.traffic import bytes_per_round
from jkmeans.consensus.vq import GAINS, Trace, quantize_together
from jkmeans.errors import UserError
from jkmeans.fields import Field, choice, integer, number, words
from jkmeans.sharding import REPLICATED, SHARDED
from jkmeans.sources.base import ArraySource
from jkmeans.vq.data import first_prototypes
from jkmeans.vq.simulation import Setting, Shares, run
from jkmeans.vq.steps import STEPS, make_steps

_ALONE = "alone"
_TOGETHER = "together"

FIELDS: dict[str, Field] = {
    **DATA_FIELDS,
    "vq.n_clusters": integer(1, "K"),
    "vq.scheme": choice(tuple(GAINS), "what of the nodes' moves is mixed: their mean, or sum"),
    "vq.deals": words(DEALS, "how samples are dealt to nodes"),
    "vq.rounds": integer(1, "rounds of gossip in an exchange"),
    "vq.tau": integer(1, "τ, samples of a node between two exchanges"),
    "vq.duration": integer(1, "T, samples that each node sees"),
    "vq.n_evaluations": integer(1, "points of a curve"),
    "vq.steps.name": choice(tuple(STEPS), "how steps depend on the number of the sample"),
    "vq.steps.a": number("the size of the steps", positive=True),
    "vq.steps.b": number("how fast 'rational' steps decay, per sample"),
}


def make_task(config: Config) -> Task:
    """The task of a validated config.

    Raises:
      UserError: graphs or data cannot be used.
    """
    if config.loss.links and config.loss.messages:
        raise UserError(
            f"config.loss.links is {config.loss.links} and config.loss.messages is "
            f"{config.loss.messages}; accepted: one of them 0, for vector quantization mixes in "
            "one way"
        )
    nets = nets_of(config)
    points = load_points(config)
    ours = config.vq
    if ours.duration < ours.tau * ours.n_evaluations:
        raise UserError(
            f"config.vq.duration is {ours.duration:,}, but there are {ours.n_evaluations} "
            f"evaluations of {ours.tau} samples at least; accepted: at least "
            f"{ours.tau * ours.n_evaluations:,}"
        )
    work = _Work(config, nets, points)
    cases = [
        Case(_ALONE, partial(work.reference, 1)),
        Case(_TOGETHER, partial(work.reference, work.n_nodes)),
    ]
    cases += [
        Case(f"{deal}_{name}", partial(work.decentralised, deal, name))
        for deal in ours.deals
        for name in nets
    ]
    return Task(fingerprint_of(nets, ArraySource(points).fingerprint()), cases, work.write)


class _Work:
    def __init__(self, config: Config, nets: dict[str, Net], points: np.ndarray):
        self.config, self.nets = config, nets
        self.points = points.astype(number_type(config))
        self.nodes = nodes_of(config, self.nets)
        self.n_nodes = next(iter(nets.values())).graph.n_nodes
        ours, rng = config.vq, np.random.default_rng(config.seed)
        if ours.n_clusters > len(points):
            raise UserError(
                f"config.vq.n_clusters is {ours.n_clusters:,}, but there are {len(points):,} "
                "samples; accepted: up to that many"
            )
        # Each the mean of some samples, so that none is a sample itself.
        n_averaged = max(1, min(20, len(points) // ours.n_clusters))
        first = first_prototypes(rng, self.points, ours.n_clusters, n_averaged)
        self.first = first.astype(self.points.dtype)
        check_enough(len(points), self.n_nodes)
        self.n_exchanges = ours.duration // (ours.tau * ours.n_evaluations)
        self.times = np.arange(ours.n_evaluations + 1) * self.n_exchanges * ours.tau

    def reference(self, n_workers: int, check: Check) -> Arrays:
        """One worker, or all of them with a shared version (scheme B)."""
        check()
        ours = self.config.vq
        setting = Setting(
            ours.scheme if n_workers > 1 else "averaging",
            n_workers,
            ours.tau,
            1.0,
            (ours.steps.name, ours.steps.a, ours.steps.b),
            int(self.times[-1]),
            ours.n_evaluations,
        )
        order = order_of(self.points, "shuffled", self.config.seed)
        found = run(setting, self.config.seed, self.first, self.points[order])
        return {"distortion": np.asarray(found.distortion)[: len(self.times)]}

    def averaging(self, links: Links, net: Net) -> Averaging:
        key, loss = jax.random.key(self.config.seed), self.config.loss
        if loss.messages:
            return push_sum(links, key, loss.messages)
        return symmetric(links, net.mixing, key if loss.links else None, loss.links)

    def decentralised(self, deal: str, name: str, check: Check) -> Arrays:
        """All nodes on one topology."""
        check()
        net, ours = self.nets[name], self.config.vq
        order = order_of(self.points, deal, self.config.seed)
        # A node sees its own samples in a random order.
        rng = np.random.default_rng(self.config.seed)
        parts = [rng.permutation(part) for part in np.array_split(order, self.n_nodes)]
        samples, counted = stretches(self.points[np.concatenate(parts)], self.n_nodes)
        shares = Shares(samples, counted.sum(axis=1).astype(np.int32))  # pyright: ignore
        first = np.tile(self.first[None], (self.n_nodes, 1, 1))
        steps = make_steps(ours.steps.name, ours.steps.a, ours.steps.b)

        def program(links: Links, shares: Shares, prototypes: jax.Array):
            return quantize_together(
                links,
                self.averaging(links, net),
                shares,
                prototypes,
                steps,
                gain=GAINS[ours.scheme](self.n_nodes),
                tau=ours.tau,
                n_rounds=ours.rounds,
                n_exchanges=self.n_exchanges,
                n_evaluations=ours.n_evaluations,
            )

        specs: Any = (REPLICATED, REPLICATED)
        out = (SHARDED, Trace(*specs))
        compiled = self.nodes.compile(net.graph, program, 2, out)
        prototypes, trace = check.fetch(compiled(shares, first))
        measured = measure(net.graph, program, 2, shares, first, out=out)
        return {
            **trace._asdict(),
            "prototypes": prototypes,
            "measured_bytes": np.array(-1 if measured is None else measured),
        }

    def bytes_a_round(self, net: Net) -> int:
        one = jax.ShapeDtypeStruct(self.first.shape, self.points.dtype)
        weight = jax.ShapeDtypeStruct((), self.points.dtype)
        return bytes_per_round(net.graph, (one, weight) if self.config.loss.messages else one)

    def write(self, workdir: Path, found: Mapping[str, Arrays]) -> Outcome:
        """The picture, the table, and what became of it all."""
        ours, rows = self.config.vq, []
        panels: dict[str, list[figures.Curve]] = {}
        diverged = []
        for deal in ours.deals:
            curves = panels.setdefault(f"samples {deal}", [])
            for name, net in self.nets.items():
                arrays = found[f"{deal}_{name}"]
                sent = self.bytes_a_round(net) * ours.rounds * self.n_exchanges
                measured = int(arrays["measured_bytes"])
                rows.append(
                    {
                        "samples": deal,
                        "topology": name,
                        "distortion": float(arrays["distortion"][-1]),
                        "spread of the nodes": float(arrays["spread"][-1]),
                        "bytes a round": self.bytes_a_round(net),
                        "bytes a round, compiled": None if measured < 0 else measured,
                        "bytes in all": sent * ours.n_evaluations,
                    }
                )
                curves.append(figures.Curve(name, arrays["distortion"], sent))
                if not np.isfinite(arrays["distortion"][-1]):
                    diverged.append(f"{name} with samples {deal}")
            one, every = (found[name]["distortion"] for name in (_ALONE, _TOGETHER))
            curves.append(figures.Curve("one worker", one, 0, ":"))
            curves.append(figures.Curve("all with a shared version", every, 0, "--"))
        text = (
            f"K = {ours.n_clusters}, {self.n_nodes:,} nodes, {ours.rounds} rounds of gossip after "
            f"every {ours.tau} samples, {int(self.times[-1]):,} samples each, scheme "
            f"'{ours.scheme}'. Distortion is of each node's samples with its own prototypes; one "
            f"worker ends at {found[_ALONE]['distortion'][-1]:.5g}, all with a shared version at "
            f"{found[_TOGETHER]['distortion'][-1]:.5g}."
        )
        markdown = write_tables(workdir, "vq", "Decentralised vector quantization", text, rows)
        figures.draw_curves(
            workdir / "vq.png",
            panels,
            title="Decentralised vector quantization",
            subtitle=f"{self.n_nodes} nodes, each with its own prototypes",
            value="distortion",
            per="samples of a node",
            logarithmic=False,
            a_point=int(self.times[1]),
        )
        print(markdown, flush=True)
        collapse = (
            f"vector quantization diverged on {', '.join(diverged)}; accepted: smaller steps, "
            "more rounds, or scheme 'averaging'"
        )
        return Outcome({"vq": rows}, collapse if diverged else "")
