"""A config file that is another one's data and network with another method.

``--config experiments/of_method.py:idec:configs/digits.py`` is what a launcher makes of
``--config configs/digits.py --config.objective.name=idec`` (`experiments.config_flag.of_method`).
"""

from typing import Any

from experiments.config_flag import load
from jkmeans.methods import with_method


def get_config(argument: str) -> Any:
    """The config of ``argument``: name of a method, colon, config file (with its own argument)."""
    name, file = argument.split(":", 1)
    config = load(file)
    if "objective" not in config or config.objective.name == name:
        return config
    return with_method(config, name)
