"""Processes that are kept ready: they have imported everything, and wait to be told their place.

Importing JAX and the rest takes longer than anything else of a restart. A launcher that is started
with the variable below does it at once, says that it is ready, and reads its place from stdin.
"""

import contextlib
import importlib
import json
import os
import sys
from typing import IO, Any

VARIABLE = "JKMEANS_SPARE"
READY = "jkmeans: a spare process is ready"
"""The line that such a process writes when it has imported everything."""
_MODULES = (
    "jkmeans.training",
    "jkmeans.evaluation",
    "jkmeans.clustering",
    "jkmeans.training.seeds",
    # What these import only when they come to it.
    "sklearn.datasets",
    "tensorboardX",
    "jax.experimental.multihost_utils",
)
_PARTS_OF_OTHERS = ("jaxlib.mlir.dialects.mhlo", "sklearn.datasets.data", "sklearn.datasets.descr")
"""What JAX and scikit-learn load when they first need it; theirs to rename."""


def wait_for_place() -> None:
    """Waits, in a process that is kept ready, until it is told its place; ends with its parent."""
    if not os.environ.pop(VARIABLE, ""):
        return
    for name in _MODULES:
        importlib.import_module(name)
    for name in _PARTS_OF_OTHERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        os._exit(0)
    os.environ |= json.loads(line)


def give_place(pipe: IO[Any] | None, environment: dict[str, str]) -> bool:
    """Tells a process its place; whether it could be told."""
    assert pipe is not None
    try:
        pipe.write(json.dumps(environment).encode() + b"\n")
        pipe.close()
    except OSError:
        return False
    return True
