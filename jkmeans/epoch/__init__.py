"""The compiled programs of a run: an epoch with its re-clustering is one XLA program.

`make_programs` builds them for a mesh. Data, bank and labels are sharded along the mesh axis,
parameters and clusters are replicated. A step has one all-reduce (of all gradients, all loss terms
and the number of examples at once; `Batch.mean` adds one or two for a method that uses it), a Lloyd
iteration one (of K·(p+1)+1 numbers), and the diagnostics of an epoch two.

Two ways of feeding share the same step. *Resident*: all examples are on the devices and
``Programs.epoch`` is one program. *Host-fed*: ``Programs.order`` says which rows each step takes,
``Programs.steps`` takes chunks of them from the host, ``Programs.finish`` ends the epoch. Both
give the same batches in the same order.

`state` is what changes, `recipe` what does not; `steps`, `bank` and `reclustering` are functions of
both, of the local rows of a device; `programs` puts them together and over the mesh.
"""

from jkmeans.epoch.optimizers import learning_rate
from jkmeans.epoch.programs import Programs, make_programs
from jkmeans.epoch.recipe import axis_of
from jkmeans.epoch.state import CLUSTER_SIZES, Rows, TrainState

__all__ = [
    "CLUSTER_SIZES",
    "Programs",
    "Rows",
    "TrainState",
    "axis_of",
    "learning_rate",
    "make_programs",
]
