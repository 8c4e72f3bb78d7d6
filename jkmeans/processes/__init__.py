"""Several processes that compute as one: joining, agreeing, going on after a death.

`joining` finds the place of a process among the others and brings them together; `agreement` is
what they say to each other besides collectives; `supervisor` starts them on one machine and again
when one dies, or wakes a `spare`; `heartbeat` is how it hears that they live. What becomes of them
when they are killed on purpose is for `jkmeans.chaos` to count.
"""

from jkmeans.processes.agreement import (
    agree,
    any_of,
    count,
    gather,
    is_first,
    is_loss,
    loss_sentence,
    n_on_this_host,
    number,
    on_first,
    part_of,
    same_folder,
    share,
    together,
)

__all__ = [
    "agree",
    "any_of",
    "count",
    "gather",
    "is_first",
    "is_loss",
    "loss_sentence",
    "n_on_this_host",
    "number",
    "on_first",
    "part_of",
    "same_folder",
    "share",
    "together",
]
