"""The page of a run: one HTML file that needs nothing else, beside the pictures of the report.

Python writes all that can be read without a script: numbers, signs of failure, the confusion
matrix. `assets/page.js` draws the rest from the JSON in the page. Nothing in the page comes
from or goes to the network, and its Content-Security-Policy lets no script run but that one: data
set, classes and config may be called anything.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from jkmeans.report.clusters import ClusteredExamples
from jkmeans.report.confusion import MAX_CLASSES, readable_confusion
from jkmeans.report.formatting import as_written, embeddable_json, escape, readable_value
from jkmeans.report.maps import EmbeddingMap, map_embeddings
from jkmeans.report.page_data import data_for_script
from jkmeans.report.results import complete_results, flatten_config
from jkmeans.report.signs import Sign, failure_signs
from jkmeans.whole_files import write_whole

_CARDS = {
    "acc": "ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "purity",
    "inertia": "inertia",
    "n_clusters": "clusters",
    "empty_clusters": "empty",
    "n_examples": "examples",
    "n_epochs": "epochs",
    "train_seconds": "seconds",
}


def write_page(
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[Mapping[str, Any]],
    embeddings: np.ndarray,
    labels: np.ndarray,
    distances: np.ndarray,
    centroids: np.ndarray,
    examples: np.ndarray,
    truth: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
    config: Any = None,
    seed: int = 0,
    title: str = "",
    embedding_map: EmbeddingMap | None = None,
) -> Path:
    """Writes the page of a run: one HTML file to look through with a browser, without a network.

    It has the results and the config; signs of failure in words; curves of the metrics; a map of
    the embeddings in which each point shows its example; the nearest and the farthest examples of
    each cluster; the matched confusion matrix (with true classes, at most 30); sizes of clusters.
    An older page is replaced once the new one is complete.

    Args:
        path: the file, its folder made if missing.
        metrics: the records of the epochs, as `jkmeans.recorder.read_metrics` returns them; where
            they have `cluster_sizes` ([k] integers), sizes are shown over the epochs.
        embeddings: embeddings of the examples, [n, p].
        labels: cluster of each example, integers from 0 to k - 1, [n].
        distances: distance of each embedding to its centroid, [n]; of NaN the example comes last.
        centroids: [k, p].
        examples: the data as the user knows them, [n, *example_shape]: images if the shape is
            (h, w) or (h, w, 1 | 3 | 4), otherwise vectors. May be a memory map: only the rows
            that are shown are read.
        truth: true class of each example, [n].
        class_names: names of the classes 0, 1, …
        results: what the run reached, by name. Agreement with `truth` and the inertia are
            computed where they are missing.
        config: of the run: a mapping, nested or not, or anything with `to_dict`.
        seed: picks the examples in the map.
        title: heads the page: data set, method.
        embedding_map: where `map_embeddings` has placed these embeddings, if it has: t-SNE takes
            seconds.

    Returns:
        The file written.

    Raises:
        ValueError: the arrays do not belong together.
    """
    path = Path(path)
    clusters = ClusteredExamples.of(
        embeddings, labels, distances, centroids, examples, truth, class_names
    )
    results = complete_results(results, clusters, metrics)
    placed = embedding_map or map_embeddings(clusters, seed)
    style, script = _asset("page.css"), _asset("page.js")
    text = Template(_asset("page.html")).substitute(
        style=style,
        style_hash=_content_hash(style),
        script=script,
        script_hash=_content_hash(script),
        title=escape(title or "A run of jkmeans"),
        data=embeddable_json(data_for_script(clusters, metrics, placed)),
        cards=_cards(results),
        results=_definitions(results, readable_value),
        config=_definitions(flatten_config(config), as_written),
        signs=_signs(failure_signs(clusters, metrics)),
        confusion=_confusion(clusters),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    return path


def _cards(results: Mapping[str, Any]) -> str:
    return "\n".join(
        f"<div><dt>{label}</dt><dd>{escape(readable_value(results[name]))}</dd></div>"
        for name, label in _CARDS.items()
        if results.get(name) is not None
    )


def _definitions(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    if not values:
        return '<p class="quiet">Nothing was handed over.</p>'
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(show(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="definitions">\n{rows}\n</table>'


def _signs(signs: Sequence[Sign]) -> str:
    marks = {"found": "!", "none": "✓", "unknown": "?"}
    return "\n".join(
        f'<li class="{sign.status}"><span class="mark" aria-hidden="true">{marks[sign.status]}'
        f"</span><div><strong>{escape(sign.name)}</strong> {escape(sign.sentence)}</div></li>"
        for sign in sorted(signs, key=lambda sign: ("found", "none", "unknown").index(sign.status))
    )


def _confusion(clusters: ClusteredExamples) -> str:
    if clusters.truth is None or not 1 <= len(clusters.class_names) <= MAX_CLASSES:
        return ""
    matrix, names, heads, below = readable_confusion(clusters)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(_heading("col", text) for text in heads)
    body = "\n".join(
        f"<tr>{_heading('row', name)}"
        + "".join(
            # The style sheet has eleven shades: the policy of the page allows no inline style.
            f'<td class="s{round(10 * s)}">{f"{count:,}" if count else ""}</td>'
            for count, s in zip(counts.tolist(), shares.tolist(), strict=True)
        )
        + "</tr>"
        for name, counts, shares in zip(names, matrix, share, strict=True)
    )
    return (
        '<section aria-labelledby="confusion-title">\n'
        '<h2 id="confusion-title">Matched confusion matrix</h2>\n'
        f'<p class="quiet">Rows: true classes. Columns: {escape(below)}.</p>\n'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="confusion-title">\n'
        f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>\n</div>\n</section>"
    )


def _heading(scope: str, text: str) -> str:
    # The style sheet cuts long names.
    text = escape(text)
    return f'<th scope="{scope}" title="{text}">{text}</th>'


def _asset(name: str) -> str:
    return (resources.files("jkmeans.report") / "assets" / name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    """The hash by which a Content-Security-Policy knows a script or a style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
