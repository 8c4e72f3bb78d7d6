"""The folder of an experiment: its config or settings, written once and compared ever after."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jkmeans import configuration
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.fields import Field
from jkmeans.whole_files import write_json
from jkmeans.workdir import CONFIG_FILE, RESULTS_FILE, claim, usable

SETTINGS_FILE = "settings.json"
"""What experiments with a server begin with, in place of a config."""


def claim_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what decides a result into a new folder, or checks that it is what is there.

    Args:
      folder: made if missing.
      settings: by name; any that JSON has.

    Raises:
      UserError: the folder holds a run with other settings or of another experiment, or cannot be
        written.
    """
    plain = json.loads(json.dumps(settings))

    def differences(there: Any) -> list[str]:
        return [
            f"{name} is {value!r} here and {there.get(name)!r} there"
            for name, value in plain.items()
            if value != there.get(name)
        ]

    _refuse_foreign(folder, SETTINGS_FILE)
    claim(folder, plain, differences, kind="run", name=SETTINGS_FILE)


def claim_config(
    workdir: Path,
    config: Config,
    fields: Mapping[str, Field],
    runtime: tuple[str, ...],
    fingerprint: str,
) -> None:
    """Writes the config of an experiment into its folder, or checks that it goes on with it.

    Args:
      workdir: made if missing.
      config: validated.
      fields: what it consists of.
      runtime: starts of the names of fields that may differ when an experiment goes on.
      fingerprint: of the data.

    Raises:
      UserError: the folder holds an experiment with another config, on other data or of another
        kind, or cannot be written.
    """
    content = {"fingerprint": fingerprint, "config": configuration.to_json(config)}

    def differences(there: Any) -> list[str]:
        config_there = configuration.nest(configuration.convert_fields(there["config"], fields))
        different = configuration.differences(config, config_there, fields, runtime)
        other_data = there["fingerprint"] != fingerprint
        return different or ["the data are other ones"] * other_data

    _refuse_foreign(workdir, CONFIG_FILE)
    claim(workdir, content, differences, kind="experiment")
    write_json(workdir / CONFIG_FILE, content)  # With what may differ.


def _refuse_foreign(folder: Path, own: str) -> None:
    """Refuses a folder of another experiment, whose results would be taken for ours or replaced."""
    with usable(folder):
        names = (own, CONFIG_FILE, SETTINGS_FILE, RESULTS_FILE)
        there = [name for name in names if (folder / name).exists()]
    for name in there:
        if name != own and own not in there:
            raise UserError(
                f"{folder} has {name} of another experiment in it; accepted: another --workdir"
            )
