"""A config file that is another one's data and network with another method.

``--config experiments/of_method.py:idec:configs/digits.py`` is what a launcher makes of
``--config configs/digits.py --config.objective.name=idec``: a method has fields and settings of
its own, which must be there before the command line changes any.
"""

import runpy
from typing import Any

from jkmeans.methods import with_method


def get_config(argument: str) -> Any:
    """The config of ``argument``: name of a method, colon, config file (with its own argument)."""
    name, file = argument.split(":", 1)
    path, *arguments = file.split(":", 1)
    config = runpy.run_path(path)["get_config"](*arguments)
    if "objective" not in config or config.objective.name == name:
        return config
    return with_method(config, name)
