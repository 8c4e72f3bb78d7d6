"""What an experiment with faults on purpose is asked for."""

from typing import Any

from jkmeans.configuration import Config, Field, convert_fields, integer, nest, number, text
from jkmeans.errors import UserError
from jkmeans.fields import texts

KINDS = {
    "worker": "SIGKILL of a worker",
    "coordinator": "SIGKILL of the coordinator",
    "two": "SIGKILL of two at once",
    "save": "SIGKILL in the middle of a save",
    "notice": "SIGTERM to a worker, as before a preemption",
    "stop": "SIGSTOP of a worker",
    "slow": "a slow worker",
    "damage": "SIGKILL, and the newest checkpoint damaged",
    "disk": "the disk full",
}
"""What is done to a run."""


def _convert_kinds(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    if any(kind not in KINDS for kind in value):
        raise ValueError
    return tuple(value)


FIELDS: dict[str, Field] = {
    "seed": integer(0, "of which fault comes when, and to whom"),
    "n_faults": integer(1, "faults in all"),
    "faults_per_round": integer(1, "faults that one run goes through"),
    "kinds": Field(_convert_kinds, f"a tuple of {', '.join(KINDS)}", "what is done, in turn"),
    "n_processes": integer(2, "of a run; a dead one is replaced, so the result must be equal"),
    "spares": integer(0, "processes that the supervisor keeps ready"),
    "hang_seconds": number("a process silent for so long is ended", positive=True),
    "slow_seconds": number("how long a slow worker is slow", positive=True),
    "patience_seconds": number("a run that makes no progress for so long is lost", positive=True),
    "train_config": text("the config of experiments.train"),
    "train_flags": texts("more flags of experiments.train"),
}


def validate(config: Config) -> Config:
    """The config with every value in its proper type.

    Raises:
      UserError: a field is unknown, missing, or of a wrong type or value.
    """
    values = convert_fields(config, FIELDS)
    if values["hang_seconds"] < 2:
        raise UserError(
            f"config.hang_seconds is {values['hang_seconds']}; accepted: at least 2, because a "
            "sign of life comes twice a second"
        )
    if "two" in values["kinds"] and values["n_processes"] < 3:
        raise UserError(
            f"config.n_processes is {values['n_processes']}, but kinds holds 'two'; accepted: at "
            "least 3, or other kinds"
        )
    return nest(values)
