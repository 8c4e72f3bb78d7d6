"""The folder of an experiment: its config or settings, written once and compared ever after."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jkmeans import configuration
from jkmeans.configuration import Config
from jkmeans.fields import Field
from jkmeans.whole_files import write_json
from jkmeans.workdir import CONFIG_FILE, SETTINGS_FILE, claim, only_process_in, usable

_OTHER_DATA = "the data are other ones"


def claim_settings(folder: Path, settings: Mapping[str, Any], fingerprint: str) -> None:
    """Writes what decides a result into a new folder, or checks that it is what is there.

    Args:
      folder: made if missing.
      settings: by name; any that JSON has.
      fingerprint: of the data.

    Raises:
      UserError: the folder holds a run with other settings, on other data or of another experiment,
        or cannot be written.
    """
    plain = json.loads(json.dumps(settings))

    def differences(there: Any) -> list[str]:
        other_data = there["fingerprint"] != fingerprint
        different = [
            f"{name} is {value!r} here and {there.get(name)!r} there"
            for name, value in plain.items()
            if value != there.get(name)
        ]
        return different or [_OTHER_DATA] * other_data

    content = {"fingerprint": fingerprint, **plain}
    claim(folder, content, differences, kind="run", name=SETTINGS_FILE)


@contextlib.contextmanager
def held(
    workdir: Path,
    config: Config,
    fields: Mapping[str, Field],
    runtime: tuple[str, ...] = (),
    fingerprint: str = "",
) -> Iterator[None]:
    """Holds the folder of an experiment: a new one, or one that goes on with the same config.

    Args:
      workdir: made if missing.
      config: validated.
      fields: what it consists of.
      runtime: starts of the names of fields that may differ when an experiment goes on.
      fingerprint: of the data, where there are any.

    Raises:
      UserError: the folder holds an experiment with another config, on other data or of another
        kind, another process has it, or it cannot be written.
    """
    content = {"fingerprint": fingerprint, "config": configuration.to_json(config)}

    def differences(there: Any) -> list[str]:
        config_there = configuration.nest(configuration.convert_fields(there["config"], fields))
        different = configuration.differences(config, config_there, fields, runtime)
        other_data = there["fingerprint"] != fingerprint
        return different or [_OTHER_DATA] * other_data

    claim(workdir, content, differences, kind="experiment")
    with only_process_in(workdir):
        if json.loads((workdir / CONFIG_FILE).read_text()) != json.loads(json.dumps(content)):
            with usable(workdir):
                write_json(workdir / CONFIG_FILE, content)  # With what may differ.
        yield
