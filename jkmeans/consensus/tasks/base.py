"""What the tasks of the experiment share: graphs, cases that leave a file each, tables."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jkmeans.configuration import Config
from jkmeans.consensus.graphs import (
    EDGES,
    TOPOLOGIES,
    Graph,
    make_topology,
    random_geometric,
    read_edges,
)
from jkmeans.consensus.links import Nodes
from jkmeans.consensus.mixing import Mixing, Spectrum, make_mixing, spectrum
from jkmeans.consensus.traffic import measured_bytes
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption, listen_until_ready
from jkmeans.sharding import SHARDED, make_mesh
from jkmeans.telling import remark
from jkmeans.whole_files import write_whole

GEOMETRIC = "geometric"
GRAPH_NAMES = (*TOPOLOGIES, GEOMETRIC, EDGES)

Arrays = Mapping[str, np.ndarray]
"""What a case leaves: arrays by name."""


class Check:
    """Called now and then by what computes; raises `Interrupted` where the end was asked for."""

    def __init__(self, interruption: Interruption):
        self._interruption = interruption

    def __call__(self) -> None:
        """Here the computation may end."""
        if self._interruption.requested:
            self._interruption.leave()

    def fetch(self, values: Any) -> Any:
        """Values as NumPy arrays, awaited with an open ear for signals: a blocking call has none.

        Args:
          values: a pytree of JAX arrays.
        """

        def say() -> None:
            remark("stopping where this part of the case ends; once more to stop at once")

        listen_until_ready(jax.tree.leaves(values), self._interruption, say)
        return jax.tree.map(np.asarray, values)


class Case(NamedTuple):
    """One thing to compute.

    Attributes:
      name: of its file, unique.
      run: computes it.
    """

    name: str
    run: Callable[[Check], Arrays]


class Outcome(NamedTuple):
    """What a task makes of its cases, besides pictures and tables.

    Attributes:
      results: for ``results.json``.
      collapse: what went wrong in a case, and the remedy, as one sentence; empty if nothing did.
    """

    results: dict[str, Any]
    collapse: str = ""


class Task(NamedTuple):
    """What an experiment computes, and what it makes of it.

    Attributes:
      fingerprint: of the data and the graphs.
      cases: in their order.
      write: (workdir, arrays of each case by name) -> outcome; makes pictures and tables.
    """

    fingerprint: str
    cases: list[Case]
    write: Callable[[Path, Mapping[str, Arrays]], Outcome]


class Net(NamedTuple):
    """A graph with its weights and what they promise."""

    graph: Graph
    mixing: Mixing
    spectrum: Spectrum


def nets_of(config: Config) -> dict[str, Net]:
    """The graphs that a config asks for, by name.

    Raises:
      UserError: one does not fit the number of nodes, is not connected, or has no such weights.
    """
    nets = {}
    for name in config.graph.topologies:
        if name == EDGES:
            graph = read_edges(config.graph.edges, config.graph.n_nodes)
        elif name == GEOMETRIC:
            graph = random_geometric(config.graph.n_nodes, config.graph.radius, config.seed)
        else:
            graph = make_topology(name, config.graph.n_nodes)
        mixing = make_mixing(config.graph.mixing, graph)
        nets[name] = Net(graph, mixing, spectrum(mixing))
    return nets


def number_of_nodes(config: Config) -> int:
    """The nodes of the graphs of a config; where it says 0, those that the file of edges names.

    Raises:
      UserError: that file cannot be read.
    """
    if config.graph.n_nodes or EDGES not in config.graph.topologies:
        return config.graph.n_nodes
    return read_edges(config.graph.edges).n_nodes


def nodes_of(config: Config, nets: Mapping[str, Net]) -> Nodes:
    """Where the nodes of a config are.

    Raises:
      UserError: there are fewer devices than nodes.
    """
    if config.nodes == "vmap":
        return Nodes()
    n_nodes = next(iter(nets.values())).graph.n_nodes
    if n_nodes > len(jax.devices()):
        raise UserError(
            f"config.nodes is 'mesh' with {n_nodes} nodes, but JAX sees "
            f"{len(jax.devices())} devices; accepted: one device for each node (on a CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={n_nodes} makes them), "
            "or 'vmap', with all nodes on one device"
        )
    return Nodes(make_mesh(n_nodes))


MOST_ROUNDS = 10**8
"""Of gossip, for one average: a number that nobody waits for."""


def refuse_rounds(name: str, loss: float, topology: str, rounds: float) -> None:
    """Refuses a loss with which averages would take more than `MOST_ROUNDS`.

    Args:
      name: of the field of the loss.
      loss: its value.
      topology: the name of the graph.
      rounds: what an average takes.

    Raises:
      UserError: it is too much.
    """
    if loss and rounds > MOST_ROUNDS:
        raise UserError(
            f"{name} is {loss!r}, with which an average on the graph {topology!r} takes "
            f"{rounds:.3g} rounds; accepted: what takes at most {MOST_ROUNDS:,}, that is a "
            "smaller loss or a graph with more links"
        )


def number_type(config: Config) -> type:
    """NumPy's type of the numbers that are computed with and sent."""
    return np.float64 if config.precision == "float64" else np.float32


def measure(
    graph: Graph, program: Callable[..., Any], n_sharded: int, *arrays: Any, out: Any = SHARDED
) -> int | None:
    """Bytes of the messages of a program on a mesh, counted in the compiled program.

    Args:
      graph: of the nodes.
      program: see `Nodes.compile`.
      n_sharded: see there.
      *arrays: what the program takes.
      out: see there.

    Returns:
      The bytes (see `measured_bytes`); None where there are fewer devices than nodes.
    """
    if len(jax.devices()) < graph.n_nodes:
        return None
    nodes = Nodes(make_mesh(graph.n_nodes))
    return measured_bytes(nodes.compile(graph, program, n_sharded, out).lower(*arrays).compile())


def fingerprint_of(nets: Mapping[str, Net], *data: str) -> str:
    """Identifies graphs, weights and data."""
    digest = hashlib.blake2b(digest_size=16)
    for net in nets.values():
        digest.update(net.graph.edges.tobytes() + net.mixing.weights.tobytes())
    for part in data:
        digest.update(part.encode())
    return digest.hexdigest()


def rounds_to(errors: np.ndarray, wanted: float) -> int | None:
    """The first round after which an error is at most what is wanted, for good; None if never.

    Args:
      errors: [T+1], before the first round and after each.
      wanted: the error.
    """
    above = np.flatnonzero(~(errors <= wanted))
    if not above.size:
        return 0
    first = int(above[-1]) + 1
    return first if first < len(errors) else None


def tables(title: str, text: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """A table in Markdown, under a title and a paragraph, and the same as CSV with all digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"# {title}", "", text, ""]
    lines.append("| " + " | ".join(names) + " |")
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in names]
    lines.append("|" + "|".join(" ---: " if is_number else " --- " for is_number in numeric) + "|")
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: value for name, value in row.items() if _is_known(value)})
    return "\n".join(lines) + "\n", out.getvalue()


def write_tables(
    workdir: Path, name: str, title: str, text: str, rows: Sequence[Mapping[str, Any]]
) -> str:
    """Writes `tables` as ``<name>.md`` and ``<name>.csv``; returns the Markdown."""
    markdown, comma = tables(title, text, rows)
    write_whole(workdir / f"{name}.md", markdown.encode())
    write_whole(workdir / f"{name}.csv", comma.encode())
    return markdown


def refuse_lost_messages(config: Config, what: str) -> None:
    """Refuses lost messages where values are mixed symmetrically.

    Raises:
      UserError: naming the field.
    """
    if config.loss.messages:
        raise UserError(
            f"config.loss.messages is {config.loss.messages}, but {what} mixes symmetrically; "
            "accepted: 0, or loss.links"
        )


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _cell(value: Any) -> str:
    if not _is_known(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
