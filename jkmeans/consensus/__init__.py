"""Decentralised computation: nodes that keep their data and only talk to their neighbours."""

from jkmeans.consensus.averaging import (
    Averaging,
    deviation,
    leave,
    mix,
    push_sum,
    resume,
    run_rounds,
    settle,
    symmetric,
)
from jkmeans.consensus.estimation import METHODS, LeastSquares, closed_form, make_method
from jkmeans.consensus.graphs import (
    TOPOLOGIES,
    Graph,
    from_networkx,
    make_graph,
    make_topology,
    random_geometric,
    read_edges,
)
from jkmeans.consensus.links import Links, LocalLinks, MeshLinks, Nodes
from jkmeans.consensus.mixing import MIXINGS, Mixing, Spectrum, make_mixing, spectrum
from jkmeans.consensus.traffic import all_reduce_bytes, bytes_per_round, measured_bytes

__all__ = [
    "METHODS",
    "MIXINGS",
    "TOPOLOGIES",
    "Averaging",
    "Graph",
    "LeastSquares",
    "Links",
    "LocalLinks",
    "MeshLinks",
    "Mixing",
    "Nodes",
    "Spectrum",
    "all_reduce_bytes",
    "bytes_per_round",
    "closed_form",
    "deviation",
    "from_networkx",
    "leave",
    "make_graph",
    "make_method",
    "make_mixing",
    "make_topology",
    "measured_bytes",
    "mix",
    "push_sum",
    "random_geometric",
    "read_edges",
    "resume",
    "run_rounds",
    "settle",
    "spectrum",
    "symmetric",
]
