"""The task "estimation": gossip, and least squares by nodes that measure a part each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans.configuration import Config
from jkmeans.consensus import figures
from jkmeans.consensus.averaging import deviation, run_rounds, symmetric
from jkmeans.consensus.estimation import (
    EXCHANGES,
    METHODS,
    LeastSquares,
    check_step,
    closed_form,
    curvature,
    exercise,
    make_method,
    sensors,
    suggested_step,
)
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
    refuse_lost_messages,
    refuse_rounds,
    rounds_to,
    write_tables,
)
from jkmeans.consensus.traffic import all_reduce_bytes, bytes_per_round
from jkmeans.errors import UserError
from jkmeans.fields import Field, choice, integer, number, numbers, words
from jkmeans.sharding import REPLICATED, SHARDED

ALL_REDUCE = "gradient_descent"
STARTS = ("slowest", "random")
_BEYOND = 1.3
_EXTRA_ROUNDS = 10
_STALLED = 1e-6
_UNLIKELY = 1e-9
_SMALL = 2000


def _convert_matrix(value: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    if any(not isinstance(row, list | tuple) for row in value):
        raise TypeError
    rows = tuple(numbers("").convert(tuple(row)) for row in value)
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError
    return rows


FIELDS: dict[str, Field] = {
    "gossip.tolerance": number("what is left of the distance to the mean", positive=True),
    "estimation.problem": choice(("exercise", "sensors"), "what is measured"),
    "estimation.matrix": Field(
        _convert_matrix, "a tuple of rows of equally many numbers", "A of the exercise"
    ),
    "estimation.x": numbers("x of the exercise"),
    "estimation.n_unknowns": integer(1, "n of the sensors"),
    "estimation.noise": number("σ, of each measurement"),
    "estimation.methods": words(tuple(METHODS), "how x is estimated"),
    "estimation.step": number("η of all methods; 0 for what suits each"),
    "estimation.tolerance": number("relative distance to the closed form", positive=True),
    "estimation.max_rounds": integer(1, "T, after which a method is given up"),
}


def make_task(config: Config) -> Task:
    """The task of a validated config.

    Raises:
      UserError: graphs, problem or steps cannot be used.
    """
    refuse_lost_messages(config, "estimation")
    for name in ("gossip", "estimation"):
        if config[name].tolerance >= 1:
            raise UserError(
                f"config.{name}.tolerance is {config[name].tolerance}; accepted: above 0 and below "
                "1, for it is a part of the first distance"
            )
    nets = nets_of(config)
    if config.loss.links and "extra" in config.estimation.methods:
        raise UserError(
            f"config.estimation.methods has 'extra', which does not stand links that fail "
            f"(loss.links is {config.loss.links}); accepted: the other methods, or 0"
        )
    problem = _problem_of(config, next(iter(nets.values())))
    optimum = closed_form(problem)
    if not np.any(optimum):
        raise UserError(
            f"config.estimation.x is {tuple(config.estimation.x)}, and the closed form 0: errors "
            "are relative to its length; accepted: an x that is not 0"
        )
    curved = curvature(problem)
    if curved.mean < np.finfo(np.float64).tiny:
        raise UserError(
            f"config.estimation.matrix is {config.estimation.matrix}, of which squares vanish in "
            "float64; accepted: numbers that are not all so small"
        )
    for net in nets.values():
        for method in config.estimation.methods:
            if config.estimation.step:
                check_step(method, config.estimation.step, curved, net.mixing)
    work = _Work(config, nets, problem, optimum)
    cases = [
        Case(f"gossip_{name}_{start}", partial(work.gossip, name, start))
        for name in nets
        for start in STARTS
    ]
    for method in config.estimation.methods:
        # All-reducing knows no topology.
        for name in list(nets)[:1] if method == ALL_REDUCE else nets:
            cases.append(Case(f"{method}_{name}", partial(work.estimate, method, name)))
    return Task(fingerprint_of(nets), cases, work.write)


def _problem_of(config: Config, net: Net) -> LeastSquares:
    ours = config.estimation
    if ours.problem == "sensors":
        return sensors(net.graph, ours.n_unknowns, ours.noise, config.seed)[0]
    if len(ours.x) != len(ours.matrix[0]):
        raise UserError(
            f"config.estimation.x has {len(ours.x)} numbers, but the rows of matrix have "
            f"{len(ours.matrix[0])}; accepted: as many"
        )
    return exercise(net.graph, np.array(ours.matrix), np.array(ours.x), ours.noise, config.seed)


class _Work:
    def __init__(self, config: Config, nets: dict[str, Net], problem, optimum: np.ndarray):
        self.config, self.nets, self.optimum = config, nets, optimum
        dtype = number_type(config)
        self.problem = LeastSquares(
            *(np.asarray(part).astype(dtype) for part in (problem.matrix, problem.measured))
        )
        self.curved = curvature(problem)
        self.nodes = nodes_of(config, self.nets)
        self.one = jax.ShapeDtypeStruct(optimum.shape, dtype)
        for name, net in nets.items():
            loss = config.loss.links
            shrinks = (1 - loss) * (1 - net.spectrum.rate)  # A round, on average.
            least = -np.log(config.gossip.tolerance)
            refuse_rounds("config.loss.links", loss, name, least / shrinks if shrinks else np.inf)

    @property
    def key(self) -> jax.Array | None:
        return jax.random.key(self.config.seed) if self.config.loss.links else None

    def predicted_rate(self, net: Net) -> float:
        """Of the mean over failures, where links fail."""
        loss = self.config.loss.links
        return loss + (1 - loss) * net.spectrum.rate

    def predicted_rounds(self, net: Net) -> int:
        rate = self.predicted_rate(net)
        if rate < 1e-12:
            return 1
        return max(1, int(np.ceil(np.log(self.config.gossip.tolerance) / np.log(rate))))

    def gossip(self, name: str, start: str, check: Check) -> Arrays:
        """Rounds of gossip from the worst start, or a random one."""
        check()
        net = self.nets[name]
        n, dtype = len(self.optimum), number_type(self.config)
        if start == "slowest":
            first = np.tile(net.spectrum.slowest[:, None], (1, n))
        else:
            first = np.random.default_rng(self.config.seed).standard_normal((net.graph.n_nodes, n))
        # Around a mean that is not 0, of the size of the deviations.
        first = (1 + first / first.std()).astype(dtype)
        n_rounds = int(_BEYOND * self.predicted_rounds(net)) + _EXTRA_ROUNDS
        averaging = partial(symmetric, mixing=net.mixing, loss=self.config.loss.links)

        def program(links: Links, values: jax.Array):
            gossip = averaging(links, key=self.key)
            mean = links.mean_of_all(values)
            _, errors = run_rounds(
                gossip.round, values, n_rounds, record=lambda x: deviation(links, x, mean)
            )
            return errors

        def only_rounds(links: Links, values: jax.Array):
            return run_rounds(averaging(links, key=self.key).round, values, n_rounds)[0]

        errors = self.nodes.compile(net.graph, program, 1, REPLICATED)(first)
        errors = check.fetch(errors)
        found: dict[str, Any] = {"errors": errors / float(errors[0])}
        if start == STARTS[0]:
            measured = measure(net.graph, only_rounds, 1, first)
            found["measured_bytes"] = np.array(-1 if measured is None else measured)
        return found

    def step(self, method: str, net: Net) -> float:
        return self.config.estimation.step or suggested_step(method, self.curved, net.mixing)

    def estimate(self, method: str, name: str, check: Check) -> Arrays:
        """A method until it is near enough to the closed form, stands still, or is given up."""
        net, ours = self.nets[name], self.config.estimation
        step, dtype = self.step(method, net), number_type(self.config)
        chunk = 10 if net.graph.n_nodes * len(self.optimum) <= _SMALL else 50
        chunk = min(chunk, ours.max_rounds)
        patience = max(chunk, self.rounds_without_links(net))
        size = float(np.linalg.norm(self.optimum))
        optimum = self.optimum.astype(dtype)

        def make(links: Links, a, y):
            gradient = LeastSquares(a, y).gradient
            return make_method(
                method, links, net.mixing, gradient, step, key=self.key,
                loss=self.config.loss.links,
            )  # fmt: skip

        def start(links: Links, a, y, x):
            return make(links, a, y).start(x)

        def rounds(count: int, links: Links, a, y, state, first, optimum):
            state, errors = run_rounds(
                make(links, a, y).round,
                state,
                count,
                first=first,
                record=lambda state: deviation(links, state.x, optimum),
            )
            return state, errors[1:]

        def only_rounds(links: Links, a, y, state):
            return run_rounds(make(links, a, y).round, state, chunk)[0]

        zeros = np.zeros((net.graph.n_nodes, len(self.optimum)), dtype)
        state = self.nodes.compile(net.graph, start, 3)(*self.problem, zeros)
        measured = measure(net.graph, only_rounds, 3, *self.problem, state)

        @cache
        def advance(count: int):
            return self.nodes.compile(net.graph, partial(rounds, count), 3, (SHARDED, REPLICATED))

        errors, shots, shot_rounds, done = [np.ones(1)], [zeros], [0], 0
        while done < ours.max_rounds:
            check()
            count = min(chunk, ours.max_rounds - done)
            state, found = advance(count)(*self.problem, state, np.int32(done), optimum)
            found, done = check.fetch(found) / size, done + count
            errors.append(found)
            if done >= 2 * shot_rounds[-1]:
                shots.append(np.asarray(state.x))
                shot_rounds.append(done)
            is_near = found[-1] <= ours.tolerance / 10
            if is_near or not np.isfinite(found[-1]) or _stands_still(errors, patience):
                break
        if shot_rounds[-1] < done:
            shots.append(np.asarray(state.x))
            shot_rounds.append(done)
        return {
            "errors": np.concatenate(errors),
            "x": np.asarray(state.x),
            "shots": np.stack(shots),
            "shot_rounds": np.array(shot_rounds),
            "measured_bytes": np.array(-1 if measured is None else measured),
            "step": np.array(step),
        }

    def rounds_without_links(self, net: Net) -> int:
        """Rounds in a row in which every link may have failed; more is too unlikely to be that."""
        loss = self.config.loss.links
        if not loss:
            return 0
        return int(np.log(_UNLIKELY) / (len(net.graph.edges) * np.log(loss))) + 1

    def write(self, workdir: Path, found: Mapping[str, Arrays]) -> Outcome:
        """Pictures, tables, and what became of it all."""
        results = {"gossip": self._write_gossip(workdir, found)}
        results["estimation"] = self._write_estimation(workdir, found)
        self._draw_networks(workdir, found)
        # Of a case that diverged the last error is no number.
        diverged = [name for name, arrays in found.items() if not np.isfinite(arrays["errors"][-1])]
        collapse = (
            f"the numbers of {', '.join(diverged)} overflowed {self.config.precision}; accepted: "
            "measurements and unknowns of moderate size, or a smaller estimation.step"
        )
        return Outcome(results, collapse if diverged else "")

    def _write_gossip(self, workdir: Path, found: Mapping[str, Arrays]) -> list[dict[str, Any]]:
        tolerance, rows, curves = self.config.gossip.tolerance, [], []
        for name, net in self.nets.items():
            worst = found[f"gossip_{name}_slowest"]
            errors = worst["errors"]
            random = found[f"gossip_{name}_random"]["errors"]
            reached, predicted = rounds_to(errors, tolerance), self.predicted_rounds(net)
            sent = bytes_per_round(net.graph, self.one)
            rate = errors[reached] ** (1 / reached) if reached else None
            rows.append(
                {
                    "topology": name,
                    "nodes": net.graph.n_nodes,
                    "edges": net.graph.n_edges,
                    "most neighbours": int(net.graph.degrees.max()),
                    "spectral gap": net.spectrum.gap,
                    "rate, predicted": self.predicted_rate(net),
                    "rate, measured": rate,
                    "rounds, predicted": predicted,
                    "rounds, slowest start": reached,
                    "rounds, random start": rounds_to(random, tolerance),
                    "bytes a round": sent,
                    "bytes a round, compiled": _measured(worst),
                    "bytes to the mean": None if reached is None else reached * sent,
                }
            )
            curves.append(figures.GossipCurve(name, errors, random, self.predicted_rate(net), sent))
        loss = self.config.loss.links
        text = (
            "Distance of all nodes to the mean, relative to the first, down to "
            f"{tolerance:g}. From the slowest mode of the mixing matrix the spectral gap predicts "
            "the number of rounds; from normal numbers it bounds it. Bytes are of all nodes "
            f"together, {self.one.shape[0]} numbers of {self.config.precision} a message."
            + (f" Links fail with probability {loss:g}; predictions are of the mean." * bool(loss))
        )
        markdown = write_tables(workdir, "gossip", "Gossip averages", text, rows)
        figures.draw_gossip(workdir / "gossip.png", curves, tolerance)
        print(markdown, flush=True)
        return rows

    def _write_estimation(self, workdir: Path, found: Mapping[str, Arrays]) -> list[dict]:
        ours, rows = self.config.estimation, []
        curves: dict[str, list[figures.Curve]] = {}
        size = float(np.linalg.norm(self.optimum))
        for method in ours.methods:
            for name, net in self.nets.items():
                if f"{method}_{name}" not in found:
                    continue
                arrays = found[f"{method}_{name}"]
                errors = arrays["errors"]
                sent = EXCHANGES[method] * bytes_per_round(net.graph, self.one)
                if method == ALL_REDUCE:
                    sent = all_reduce_bytes(net.graph.n_nodes, self.one)
                reached = rounds_to(errors, ours.tolerance)
                nodes = np.linalg.norm(arrays["x"] - self.optimum, axis=1) / size
                rows.append(
                    {
                        "method": method,
                        "topology": "all-reduce" if method == ALL_REDUCE else name,
                        "step": float(arrays["step"]),
                        "bound of the step": self._bound(method, net),
                        f"rounds to {ours.tolerance:g}": reached,
                        "rounds": len(errors) - 1,
                        "error, all nodes": float(errors[-1]),
                        "error, worst node": float(nodes.max()),
                        "bytes a round": sent,
                        "bytes a round, compiled": (
                            None if method == ALL_REDUCE else _measured(arrays)
                        ),
                        f"bytes to {ours.tolerance:g}": reached and reached * sent,
                    }
                )
                label = "all-reduce" if method == ALL_REDUCE else name
                curves.setdefault(method, []).append(figures.Curve(label, errors, sent))
        text = (
            "Least squares by "
            f"{next(iter(self.nets.values())).graph.n_nodes} nodes with one measurement each. "
            "Errors are distances to the closed form, relative to its length: root mean square "
            "over nodes, and of the worst node at the end. Bytes are of all nodes together."
        )
        markdown = write_tables(workdir, "estimation", "Estimates", text, rows)
        figures.draw_estimation(workdir / "estimation.png", curves, ours.tolerance)
        print(markdown, flush=True)
        return rows

    def _bound(self, method: str, net: Net) -> float:
        from jkmeans.consensus.estimation import largest_step

        return largest_step(method, self.curved, net.mixing)

    def _draw_networks(self, workdir: Path, found: Mapping[str, Arrays]) -> None:
        methods = [name for name in self.config.estimation.methods if name != ALL_REDUCE]
        if not methods:
            return
        exact = [name for name in methods if name != "decentralised_descent"]
        method = (exact or methods)[0]
        size = float(np.linalg.norm(self.optimum))
        rows = []
        for name, net in list(self.nets.items())[: figures.MOST_NETWORKS]:
            arrays = found[f"{method}_{name}"]
            shots, rounds = figures.chosen(arrays["shots"], arrays["shot_rounds"])
            errors = np.linalg.norm(shots - self.optimum[None, None], axis=2) / size
            rows.append(
                figures.NetworkRow(
                    net.graph, [f"after {t:,} rounds" for t in rounds], errors, shots
                )
            )
        figures.draw_networks(
            workdir / "network.png",
            rows,
            f"What each node believes: {figures.WORDS[method]}",
            f"closed form: {figures.short_vector(self.optimum)}",
            "distance to the closed form, relative to its length",
        )


def _measured(arrays: Arrays) -> int | None:
    value = int(arrays["measured_bytes"])
    return None if value < 0 else value


def _stands_still(errors: list[np.ndarray], rounds: int) -> bool:
    """Whether the error is what it was so many rounds before, or hardly less.

    Args:
      errors: before the first round, and after each, in parts.
      rounds: at least those of the last part.
    """
    newest = errors[-1]
    if rounds <= len(newest):
        return bool(abs(newest[0] - newest[-1]) <= _STALLED * newest[-1])
    every = np.concatenate(errors)
    return len(every) > rounds and bool(np.ptp(every[-1 - rounds :]) <= _STALLED * every[-1])
