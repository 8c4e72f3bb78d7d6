"""Whose a folder is."""

import concurrent.futures
import functools
import json
import os
import threading

import pytest
from ml_collections import ConfigDict

from jkmeans.configuration import integer
from jkmeans.errors import UserError
from jkmeans.experiment_folder import claim_settings, held
from jkmeans.whole_files import write_new_json
from jkmeans.workdir import (
    CONFIG_FILE,
    SEEDS,
    SETTINGS_FILE,
    TABLE_FILE,
    claim,
    only_process_in,
    refuse_other_kinds,
)

SIGNS = {
    CONFIG_FILE: ("config.json", "a run, a job or an experiment"),
    SETTINGS_FILE: ("settings.json", "an experiment"),
    SEEDS: ("seed_3/config.json", "the runs of several seeds"),
    TABLE_FILE: ("table.json", "a table of many runs"),
    "lost": ("checkpoints/7/_METADATA", "checkpoints but no config.json"),
    "others": ("results.json", "results.json of something else"),
}
FIELDS = {"n": integer(1, "of them"), "n_seeds": integer(1, "of these")}


def leave(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize("own", [CONFIG_FILE, SETTINGS_FILE, SEEDS, TABLE_FILE])
@pytest.mark.parametrize("sign", SIGNS)
def test_a_folder_of_another_kind_is_refused(tmp_path, own, sign):
    name, words = SIGNS[sign]
    leave(tmp_path, name)
    if own == sign:
        refuse_other_kinds(tmp_path, own)
        return
    with pytest.raises(UserError, match=rf"holds {words}.*; accepted: another --workdir"):
        refuse_other_kinds(tmp_path, own)


@pytest.mark.parametrize("own", [CONFIG_FILE, SETTINGS_FILE])
def test_own_files_stand_beside_what_else_a_run_leaves(tmp_path, own):
    for name in (own, "results.json", "checkpoints/7/_METADATA"):
        leave(tmp_path, name)
    refuse_other_kinds(tmp_path, own)


def test_a_folder_that_is_refused_is_left_as_it_was(tmp_path):
    leave(tmp_path, "results.json")
    with pytest.raises(UserError, match="of something else"):
        claim(tmp_path, {"n": 1}, lambda there: [], kind="run")
    with pytest.raises(UserError, match="of something else"):
        claim_settings(tmp_path, {"n": 1}, "")
    with pytest.raises(UserError, match="of something else"), held(tmp_path, config(), FIELDS):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def config(**values):
    return ConfigDict({"n": 1, "n_seeds": 1} | values)


def there(folder):
    return json.loads((folder / CONFIG_FILE).read_text())["config"]


def test_what_may_differ_is_noted_by_who_holds_the_folder(tmp_path):
    with held(tmp_path, config(), FIELDS, runtime=("n_seeds",)):
        assert there(tmp_path) == {"n": 1, "n_seeds": 1}
        more = held(tmp_path, config(n_seeds=2), FIELDS, runtime=("n_seeds",))
        with pytest.raises(UserError, match="another process is running"), more:
            pass
        assert there(tmp_path)["n_seeds"] == 1
    with held(tmp_path, config(n_seeds=2), FIELDS, runtime=("n_seeds",)):
        assert there(tmp_path)["n_seeds"] == 2
    other = held(tmp_path, config(n=2), FIELDS, runtime=("n_seeds",))
    with pytest.raises(UserError, match="another config: n is"), other:
        pass
    data = held(tmp_path, config(), FIELDS, runtime=("n_seeds",), fingerprint="other")
    with pytest.raises(UserError, match="the data are other ones"), data:
        pass
    assert there(tmp_path) == {"n": 1, "n_seeds": 2}


def test_a_folder_is_written_once_if_nothing_differs(tmp_path):
    with held(tmp_path, config(), FIELDS):
        pass
    before = (tmp_path / CONFIG_FILE).stat().st_mtime_ns
    with held(tmp_path, config(), FIELDS):
        assert (tmp_path / CONFIG_FILE).stat().st_mtime_ns == before


def test_whose_turn_it_is_is_said_by_the_name_that_the_user_gave(tmp_path):
    again = only_process_in(tmp_path, "--output")
    waits = pytest.raises(UserError, match="accepted: another --output, or wait")
    with only_process_in(tmp_path, "--output"), waits, again:
        pass


def test_of_several_at_once_one_claims_a_new_folder(tmp_path):
    everyone = threading.Barrier(8)

    def differences(content, there):
        return [] if there == content else [f"it is {there}"]

    def try_to(number):
        content = {"number": number}
        everyone.wait()
        try:
            claim(tmp_path / "w", content, functools.partial(differences, content), kind="run")
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(try_to, range(8)))
    winner = json.loads((tmp_path / "w" / CONFIG_FILE).read_text())["number"]
    assert [number for number, words in enumerate(said) if not words] == [winner]
    assert all(f"it is {{'number': {winner}}}" in words for words in said if words)
    assert [path.name for path in (tmp_path / "w").iterdir()] == [CONFIG_FILE]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    claim(tmp_path / "w", {"a": 1}, lambda there: [], kind="run")
    assert json.loads((tmp_path / "w" / CONFIG_FILE).read_text()) == {"a": 1}
    assert not write_new_json(tmp_path / "w" / CONFIG_FILE, {"a": 2})
    assert [path.name for path in (tmp_path / "w").iterdir()] == [CONFIG_FILE]
