"""k-means on the devices of a mesh: rows are placed and padded, then one program does the rest.

The core (`jkmeans.kmeans`) does not know the mesh, and `jkmeans.sharding` knows no algorithm; this
module joins them. `place` brings rows to the devices, `run` compiles a function of the core once
for each mesh and choice of options, and `fit`, `assign`, `nearest`, `inertia` and `distances` are
what the estimators call. Rows that the mesh does not divide are filled up with rows of weight zero,
which never count; results are cut to the rows that came in.
"""

from jkmeans.sharded.fits import (
    RESULT_SPECS,
    cut,
    fit,
    fit_rows,
    scale_and_origin,
    scaled_tol,
)
from jkmeans.sharded.placing import (
    Rows,
    mesh_of,
    place,
    precision,
    refuse_few_rows,
    unpadded,
)
from jkmeans.sharded.programs import BLOCKS, result_specs, run
from jkmeans.sharded.queries import assign, distances, evaluate_rows, inertia, nearest

__all__ = [
    "BLOCKS",
    "RESULT_SPECS",
    "Rows",
    "assign",
    "cut",
    "distances",
    "evaluate_rows",
    "fit",
    "fit_rows",
    "inertia",
    "mesh_of",
    "nearest",
    "place",
    "precision",
    "refuse_few_rows",
    "result_specs",
    "run",
    "scale_and_origin",
    "scaled_tol",
    "unpadded",
]
