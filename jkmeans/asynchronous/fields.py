"""The fields of a config's group ``ray``."""

from __future__ import annotations

from jkmeans.fields import Field, integer, number, text
from jkmeans.ray_session import ACCEPTED_GPUS, gpus_of_worker

RAY_FIELDS: dict[str, Field] = {
    "ray.address": text(
        "'local' for a cluster on this machine that begins and ends with the run; 'auto', or "
        "host:port, for one that is there and has this machine in it"
    ),
    "ray.checkpoint_exchanges": integer(
        2, "displacements that the death of the server may cost, at most; they are computed anew"
    ),
    "ray.max_restarts": integer(-1, "times that a process may come back; -1 for any number"),
    "ray.ahead": integer(
        0,
        "how many times tau samples a worker computes while an exchange is under way, at most; "
        "0: none",
    ),
    "ray.evaluate_seconds": number("between two evaluations of the shared version", positive=True),
    "ray.patience_seconds": number("how long the end of a run waits for a worker that hangs"),
    "ray.gpus_per_worker": Field(
        gpus_of_worker,
        ACCEPTED_GPUS,
        "GPUs of a worker; below 1 they are shared, 0 for the CPU",
    ),
}
"""What a config needs for `jkmeans.asynchronous`, besides what is to be computed."""
