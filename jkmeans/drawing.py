"""What all pictures of the house share: colours, frames, titles, and files that are whole."""

from __future__ import annotations

import colorsys
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jkmeans.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150
INK = "#222222"
FAINT = "#8a8a8a"
GRID = "#e6e6e6"
BLUE, ORANGE, GREEN, RED = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"
LINES = (BLUE, ORANGE, GREEN, RED, "#9467bd", "#8c564b", "#17becf")


def whole_characters(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which no file and no window can hold.

    Names of files that are no UTF-8 have them.
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # pyright: ignore
    return figure


def head_figure(figure: Figure, title: str, subtitle: str) -> None:
    """Writes a title above a figure, wrapped to its width."""
    # Seven points a letter: no more of them than fit above the figure.
    letters = int(figure.get_figwidth() * 72 / 7)
    lines = [line for text in (title, subtitle) for line in textwrap.wrap(text, letters)]
    text = whole_characters("\n".join(lines))
    figure.suptitle(text, fontsize=11, color=INK, fontweight="bold", parse_math=False)


def panel_title(ax: Axes, text: str, size: float = 9.5, pad: float = 6) -> None:
    """Writes a title above a panel, to the left."""
    ax.set_title(
        whole_characters(text), fontsize=size, color=INK, loc="left", pad=pad, parse_math=False
    )


def soften(ax: Axes, size: float) -> None:
    """A panel with two faint axes and a faint grid; labels have ``size`` points."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=size, colors=INK, which="both", length=2.5)


def plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis with numbers as they are, not as powers of ten.

    The decades have labels; between them, as matplotlib has it, what there is room for.
    """
    from matplotlib.ticker import LogFormatter

    class Between(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(Between())


def say_instead(ax: Axes, text: str) -> None:
    """Writes why there is nothing to see in a panel."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=FAINT)
    ax.set_xticks([])
    ax.set_yticks([])


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def save_all(
    folder: str | os.PathLike[str],
    figures: Mapping[str, Callable[[], Figure]],
    names: Sequence[str],
) -> list[Path]:
    """Draws figures and writes each as `<name>.png`.

    Args:
        folder: where they go, made if missing.
        figures: what draws each of them.
        names: of all that there may be, in order: a file of one that is not there is removed.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        path = folder / f"{name}.png"
        if name in figures:
            save(figures[name](), path)
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def palette(n: int) -> np.ndarray:
    """Colours for n groups, [n, 3]: distinct up to ten, and round the colour circle beyond."""
    if n <= 10:
        from matplotlib import colormaps

        return np.asarray(colormaps["tab10"].colors)[:n]  # pyright: ignore[reportAttributeAccessIssue]
    # The golden angle keeps neighbouring numbers far apart, for any n.
    golden = (np.sqrt(5) - 1) / 2
    return np.asarray(
        [
            colorsys.hsv_to_rgb(i * golden % 1, (0.85, 0.6)[i % 2], (0.65, 0.85, 0.95)[i % 3])
            for i in range(n)
        ]
    )
