"""Centroids for other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_faiss(centroids: Any, *, inner_product: bool = False) -> Any:
    """A FAISS index of the centroids: the coarse quantizer of an IVF index.

    Cluster numbers become list numbers. An IVF index made with it must not train its lists again;
    FAISS sees that itself, because the quantizer holds as many vectors as there are lists.

    Args:
      centroids: [k, d] numbers, finite as float32.
      inner_product: whether vectors are compared by inner product (of centroids of unit length,
        as spherical k-means gives them) rather than by Euclidean distance.

    Returns:
      ``faiss.IndexFlatL2`` or ``faiss.IndexFlatIP`` with k vectors of float32.

    Raises:
      ImportError: faiss is not installed.
      ValueError: centroids are not [k, d], or not finite.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("to_faiss needs the package faiss: pip install faiss-cpu") from error
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(centroids, dtype=np.float32)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"centroids are of shape {vectors.shape}; accepted: [k, d]")
    if not np.isfinite(vectors).all():
        raise ValueError("centroids hold NaN or infinity as float32; accepted: finite numbers")
    d = vectors.shape[1]
    index = faiss.IndexFlatIP(d) if inner_product else faiss.IndexFlatL2(d)
    index.add(vectors)  # pyright: ignore[reportCallIssue]
    return index
