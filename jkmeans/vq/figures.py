"""The figures of the paper as lists of curves, the table of speed-ups, and both on the disk."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jkmeans.configuration import Config
from jkmeans.drawing import BLUE, DPI, GREEN, GRID, INK, ORANGE, RED, new_figure, plain_numbers
from jkmeans.vq.simulation import Setting

SEQUENTIAL = "averaging"
"""With one worker scheme A is the sequential algorithm: a mean of one version is that version."""

SCALING = "scaling"
"""The figure in which workers become many."""

_NAMES = {
    "averaging": "A: averaging",
    "displacements": "B: displacements",
    "asynchronous": "C: asynchronous",
}
_COLOURS = (INK, BLUE, RED, GREEN, "#9467bd", ORANGE, "#17becf", "#8c564b")


class Curve(NamedTuple):
    """One setting over its seeds.

    Attributes:
      setting: what was simulated.
      times: [E+1], in samples per worker.
      distortion: [seeds, E+1]; NaN from where a simulation diverged.
    """

    setting: Setting
    times: np.ndarray
    distortion: np.ndarray


class SpeedUp(NamedTuple):
    """How much sooner than one worker a setting reaches a distortion.

    Attributes:
      mean: over the seeds that reach it; NaN if none does.
      sd: sample standard deviation over them; NaN for fewer than two.
      n_reached: how many seeds reach it.
      n_diverged: how many seeds diverged.
      n_seeds: of all.
    """

    mean: float
    sd: float
    n_reached: int
    n_diverged: int
    n_seeds: int


def sequential_setting(config: Config) -> Setting:
    """One worker, with which all are compared."""
    return _setting(config, SEQUENTIAL, 1, config.tau)


def figures_of(config: Config) -> dict[str, tuple[str, list[Setting]]]:
    """The title and the settings of each figure, by the name of its file; the first is M = 1."""
    ours = config.figures
    one = sequential_setting(config)
    delay = f"exchanges of {config.delay:g} samples on average"

    def scheme(name: str, workers: Sequence[int]) -> list[Setting]:
        return [_setting(config, name, m, config.tau) for m in workers if m > 1]

    fixed = {
        "averaging": (f"Scheme A, τ = {config.tau}", scheme("averaging", ours.averaging)),
        "displacements": (
            f"Scheme B, τ = {config.tau}",
            scheme("displacements", ours.displacements),
        ),
        "tau": (
            f"Scheme B, M = {ours.tau_workers}",
            [_setting(config, "displacements", ours.tau_workers, tau) for tau in ours.tau],
        ),
        "delays": (f"Scheme C, {delay}", scheme("asynchronous", ours.delays)),
        SCALING: (
            f"Scheme C up to M = {max(ours.scaling, default=1)}, {delay}",
            scheme("asynchronous", ours.scaling)
            + scheme("displacements", [max(ours.scaling, default=1)]),
        ),
    }
    return {name: (title, [one, *found]) for name, (title, found) in fixed.items() if found}


def label(setting: Setting) -> str:
    """What a curve is called in figures and tables."""
    if setting.n_workers == 1:
        return "sequential, M = 1"
    words = f"{_NAMES[setting.scheme]}, M = {setting.n_workers}, τ = {setting.tau}"
    return words + (f", delay {setting.delay:g}" if setting.scheme == "asynchronous" else "")


def time_to(threshold: float, times: np.ndarray, distortion: np.ndarray) -> float:
    """When a curve is first at or below a distortion, between evaluations by straight lines.

    Args:
      threshold: the distortion.
      times: [E+1].
      distortion: [E+1]; NaN never counts.

    Returns:
      The time; NaN if it never is.
    """
    below = np.flatnonzero(distortion <= threshold)
    if not below.size:
        return float("nan")
    i = int(below[0])
    if i == 0:
        return float(times[0])
    part = (distortion[i - 1] - threshold) / (distortion[i - 1] - distortion[i])
    return float(times[i - 1] + part * (times[i] - times[i - 1]))


def speed_up(one: Curve, other: Curve, threshold: float) -> SpeedUp:
    """The time of one worker to reach a distortion over that of another setting, seed by seed.

    Args:
      one: M = 1.
      other: of the same seeds in the same order.
      threshold: f; the distortion to reach is C₁(T) + f (C₁(0) − C₁(T)), with C₁ the curve of one
        worker from the same seed and T its end. A seed where one worker ends no better than it
        began does not count as one that reaches it.
    """
    ratios = []
    for first, second in zip(one.distortion, other.distortion, strict=True):
        wanted = first[-1] + threshold * (first[0] - first[-1])
        ours, theirs = time_to(wanted, one.times, first), time_to(wanted, other.times, second)
        # Where one worker only makes things worse, all are there before they begin.
        ratios.append(ours / theirs if theirs else float("nan"))
    reached = [ratio for ratio in ratios if np.isfinite(ratio)]
    return SpeedUp(
        mean=float(np.mean(reached)) if reached else float("nan"),
        sd=float(np.std(reached, ddof=1)) if len(reached) > 1 else float("nan"),
        n_reached=len(reached),
        n_diverged=int(np.isnan(other.distortion[:, -1]).sum()),
        n_seeds=len(ratios),
    )


def table(
    figures: Mapping[str, tuple[str, list[Setting]]],
    curves: Mapping[Setting, Curve],
    threshold: float,
) -> str:
    """The speed-ups of all figures in Markdown, with how the threshold is chosen."""
    lines = [
        "# Speed-ups of parallel stochastic vector quantization",
        "",
        "Time is counted in samples per worker. A speed-up is the time that one worker needs to "
        "reach a distortion over the time that a scheme needs, mean ± sample standard deviation "
        "over the seeds that reach it. For each seed that distortion is C₁(T) + "
        f"{threshold:g} (C₁(0) − C₁(T)), with C₁ the curve of one worker and T its end.",
    ]
    for title, settings in figures.values():
        lines += [
            "",
            f"## {title}",
            "",
            "| setting | speed-up | seeds that reach it | diverged | final distortion |",
            "| ------- | -------: | ------------------: | -------: | ---------------: |",
        ]
        for setting in settings:
            curve = curves[setting]
            found = speed_up(curves[settings[0]], curve, threshold)
            last = curve.distortion[:, -1]
            last = last[np.isfinite(last)]
            final = f"{last.mean():.5g}" if last.size else "–"
            lines.append(
                f"| {label(setting)} | {_mean_and_sd(found)} | {found.n_reached} of "
                f"{found.n_seeds} | {found.n_diverged} | {final} |"
            )
    return "\n".join(lines) + "\n"


def comma_separated(curves: Mapping[Setting, Curve], seeds: Sequence[int]) -> str:
    """Every evaluation of every simulation, one a line; where it diverged, nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["scheme", "n_workers", "tau", "delay", "seed", "time", "distortion"])
    for setting, curve in curves.items():
        for seed, values in zip(seeds, curve.distortion, strict=True):
            delay = f"{setting.delay:g}" if setting.scheme == "asynchronous" else 0
            head = [setting.scheme, setting.n_workers, setting.tau, delay, seed]
            for time, value in zip(curve.times, values, strict=True):
                if np.isfinite(value):
                    writer.writerow([*head, time, f"{value:.9g}"])
    return out.getvalue()


def picture(title: str, curves: Sequence[Curve], *, logarithmic: bool = False) -> bytes:
    """A PNG: the distortion against simulated time, the mean over seeds and their range.

    Args:
      title: of the figure.
      curves: the first, in black, is what the others are compared with; dashed are those of
        another scheme than the second's.
      logarithmic: whether time is: equal speed-ups are then equal shifts.
    """
    figure = new_figure(9.6 if logarithmic else 7.2, 4.4)
    axes = figure.subplots()
    common = curves[1 % len(curves)].setting.scheme
    top = max(float(np.nanmean(curve.distortion[:, 0])) for curve in curves)
    low = min(float(np.nanmin(curve.distortion)) for curve in curves)
    # A scheme that overshoots may rise far above where all begin; its name then says how far.
    ceiling = top + 0.1 * (top - low) if low < top else math.inf
    for curve, colour in zip(curves, _palette(len(curves)), strict=True):
        values = curve.distortion
        mean = values.mean(axis=0)
        # The first is broad, for a scheme without speed-up lies on top of it. All end where the
        # first of their seeds diverged, with which there is no mean.
        axes.plot(
            curve.times,
            mean,
            color=colour,
            lw=2.6 if curve is curves[0] else 1.5,
            ls="-" if curve.setting.scheme in (SEQUENTIAL, common) else "--",
            label=label(curve.setting) + fate(values, mean, ceiling),
        )
        axes.fill_between(
            curve.times, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
        )
    if low < top:
        axes.set_ylim(low - 0.05 * (top - low), ceiling)
    if logarithmic:
        axes.set_xscale("log")
    first = min(float(curve.times[1]) for curve in curves) if logarithmic else 0.0
    axes.set_xlim(first, max(float(curve.times[-1]) for curve in curves))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("simulated time, samples per worker")
    n_seeds = len(curves[0].distortion)
    of_seeds = f", mean and range of {n_seeds} seeds" if n_seeds > 1 else ""
    axes.set_ylabel(f"distortion C(w){of_seeds}")
    if logarithmic:
        plain_numbers(axes.xaxis)
        axes.tick_params(axis="x", which="both", length=3, pad=3.5)  # All labels on one line.
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if logarithmic:
        # Curves go from corner to corner, and leave no place for names.
        figure.legend(frameon=False, fontsize=9, loc="outside right center")
    else:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    out = io.BytesIO()
    figure.savefig(out, dpi=DPI, format="png")
    return out.getvalue()


def fate(values: np.ndarray, mean: np.ndarray, ceiling: float) -> str:
    """What a picture does not show of a curve: seeds that diverged, and how far above it rises."""
    lost = int(np.isnan(values[:, -1]).sum())
    words = [f"{lost} of {len(values)} diverged"] if lost else []
    high = float(np.nanmax(mean, initial=-math.inf))
    if high > ceiling:
        words.append(f"up to {high:,.3g}")
    return f" ({', '.join(words)})" if words else ""


def _palette(n: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]


def _mean_and_sd(found: SpeedUp) -> str:
    if not np.isfinite(found.mean):
        return "–"
    return f"{found.mean:.2f}" + (f" ± {found.sd:.2f}" if np.isfinite(found.sd) else "")


def _setting(config: Config, scheme: str, n_workers: int, tau: int) -> Setting:
    return Setting(
        scheme=scheme,
        n_workers=n_workers,
        tau=tau,
        # Where nothing is delayed one setting must not have two names.
        delay=config.delay if scheme == "asynchronous" else 1.0,
        steps=(config.steps.name, config.steps.a, config.steps.b),
        duration=config.duration,
        n_evaluations=config.n_evaluations,
    )
