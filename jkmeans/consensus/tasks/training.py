"""The task "training": a network trained by gossip, by all-reducing, and by each node alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans import datasets
from jkmeans.configuration import Config
from jkmeans.consensus import figures
from jkmeans.consensus.averaging import deviation
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
    refuse_lost_messages,
    write_tables,
)
from jkmeans.consensus.traffic import all_reduce_bytes, bytes_per_round
from jkmeans.consensus.training import DEALS, MODES, State, begin, deal_examples, train
from jkmeans.errors import UserError
from jkmeans.fields import Field, choice, integer, integers, number, words
from jkmeans.problems import OPTIMIZERS, PROBLEMS, fingerprint_of_examples, make_problem
from jkmeans.sharding import REPLICATED, SHARDED

FIELDS: dict[str, Field] = {
    "data.name": choice(datasets.NAMED, "the data set"),
    "data.n_examples": integer(0, "only the first so many; 0 for all"),
    "problem.name": choice(tuple(PROBLEMS), "model, loss and examples", or_function=True),
    "problem.widths": integers("of hidden layers"),
    "training.modes": words(MODES, "how nodes work together"),
    "training.deals": words(DEALS, "how examples are dealt to nodes"),
    "training.optimizer": choice(tuple(OPTIMIZERS), "of each node; momentum is .9"),
    "training.learning_rate": number("of a step", positive=True),
    "training.batch_size": integer(1, "examples of a node's batch"),
    "training.n_epochs": integer(1, "times that all nodes see as many examples as there are"),
}


def make_task(config: Config) -> Task:
    """The task of a validated config.

    Raises:
      UserError: graphs, data or problem cannot be used.
    """
    refuse_lost_messages(config, "training")
    if config.precision != "float32":
        raise UserError("config.precision is 'float64'; accepted: 'float32' for training")
    nets = nets_of(config)
    work = _Work(config, nets)
    cases = []
    for deal in config.training.deals:
        for mode in config.training.modes:
            # Only gossip knows a topology.
            for name in nets if mode == "gossip" else list(nets)[:1]:
                cases.append(Case(_case(deal, mode, name), partial(work.trained, deal, mode, name)))
    return Task(fingerprint_of(nets, fingerprint_of_examples(work.problem)), cases, work.write)


def _case(deal: str, mode: str, name: str) -> str:
    return f"{deal}_{mode}_{name}" if mode == "gossip" else f"{deal}_{mode}"


class _Work:
    def __init__(self, config: Config, nets: dict[str, Net]):
        self.config, self.nets = config, nets
        self.nodes = nodes_of(config, self.nets)
        self.problem = make_problem(config)
        self.n_nodes = next(iter(nets.values())).graph.n_nodes
        self.shares = {
            deal: deal_examples(self.problem, self.n_nodes, deal, config.seed)
            for deal in config.training.deals
        }
        ours = config.training
        self.optimizer = OPTIMIZERS[ours.optimizer](ours.learning_rate)
        n = sum(next(iter(self.shares.values())).counts)
        self.n_steps = max(1, int(n) // (ours.batch_size * self.n_nodes))
        self.parameters = jax.eval_shape(self.problem.init, jax.random.key(0))

    def trained(self, deal: str, mode: str, name: str, check: Check) -> Arrays:
        """One way to train, epoch by epoch."""
        net, ours, shares = self.nets[name], self.config.training, self.shares[deal]
        specs: Any = (SHARDED, SHARDED, REPLICATED)
        out = State(*specs)
        key = jax.random.key(self.config.seed)

        def start(links: Links, shares) -> tuple[State, jax.Array]:
            del shares
            state = begin(self.problem, self.optimizer, links, key)
            return state, jax.vmap(self.problem.error)(state.parameters)

        def steps(links: Links, shares, state: State, n_steps: int) -> tuple[State, jax.Array]:
            return train(
                self.problem,
                self.optimizer,
                links,
                net.mixing,
                shares,
                state,
                key,
                mode=mode,
                batch_size=ours.batch_size,
                n_steps=n_steps,
                loss_of_links=self.config.loss.links,
            )

        def epoch(links: Links, shares, parameters, optimizer, number):
            state = State(parameters, optimizer, number)
            state, loss = steps(links, shares, state, self.n_steps)
            spread = deviation(links, state.parameters, links.mean_of_all(state.parameters))
            errors = jax.vmap(self.problem.error)(state.parameters)
            return state, errors, spread, loss

        state, errors = self.nodes.compile(net.graph, start, 1, (out, SHARDED))(shares)
        results = (out, SHARDED, REPLICATED, REPLICATED)
        advance = self.nodes.compile(net.graph, epoch, 3, results)
        curve, spreads, losses = [np.asarray(errors)], [0.0], []
        for _ in range(ours.n_epochs):
            check()
            state, errors, spread, loss = advance(shares, *state)
            curve.append(check.fetch(errors))
            spreads.append(float(spread))
            losses.append(float(loss))
        measured = None
        if mode == "gossip":
            measured = measure(
                net.graph,
                lambda links, shares, *parts: steps(links, shares, State(*parts), 2)[0],
                3,
                shares,
                *jax.tree.map(np.asarray, state),
                out=out,
            )
        return {
            "errors": np.stack(curve),
            "spread": np.array(spreads),
            "losses": np.array(losses),
            "measured_bytes": np.array(-1 if measured is None else measured),
        }

    def write(self, workdir: Path, found: Mapping[str, Arrays]) -> Outcome:
        """The picture, the table, and what became of it all."""
        ours, rows, lost = self.config.training, [], []
        panels: dict[str, list[figures.Curve]] = {}
        for deal in ours.deals:
            curves = panels.setdefault(f"examples {deal}", [])
            for mode in ours.modes:
                for name in self.nets if mode == "gossip" else list(self.nets)[:1]:
                    arrays = found[_case(deal, mode, name)]
                    sent = {
                        "gossip": bytes_per_round(self.nets[name].graph, self.parameters),
                        "all_reduce": all_reduce_bytes(self.n_nodes, self.parameters),
                        "alone": 0,
                    }[mode]
                    label = {"gossip": f"gossip on {name}", "all_reduce": "all-reduce"}.get(
                        mode, mode
                    )
                    measured = int(arrays["measured_bytes"])
                    last = arrays["errors"][-1]
                    rows.append(
                        {
                            "examples": deal,
                            "training": label,
                            "held-out error, mean of nodes": float(last.mean()),
                            "worst node": float(last.max()),
                            "loss": float(arrays["losses"][-1]),
                            "spread of parameters": float(arrays["spread"][-1]),
                            "bytes a step": sent,
                            "bytes a step, compiled": None if measured < 0 else measured,
                            "bytes in all": sent * self.n_steps * ours.n_epochs,
                        }
                    )
                    style = {"gossip": "-", "all_reduce": "--", "alone": ":"}[mode]
                    curves.append(
                        figures.Curve(
                            label, arrays["errors"].mean(axis=1), sent * self.n_steps, style
                        )
                    )
                    if not np.isfinite(arrays["losses"][-1]):
                        lost.append(f"{label}, examples {deal}")
        text = (
            f"{self.n_nodes} nodes, {ours.n_epochs} epochs of {self.n_steps} steps, batches of "
            f"{ours.batch_size} a node. Bytes are of all nodes together."
        )
        markdown = write_tables(workdir, "training", "Decentralised training", text, rows)
        figures.draw_curves(
            workdir / "training.png",
            panels,
            title="Training by gossip on parameters",
            subtitle=f"held-out error, mean over {self.n_nodes} nodes",
            value="held-out error",
            per="epochs",
            logarithmic=False,
        )
        print(markdown, flush=True)
        collapse = (
            f"the loss is not finite with {'; '.join(lost)}; accepted: a smaller learning rate"
        )
        return Outcome({"training": rows}, collapse if lost else "")
