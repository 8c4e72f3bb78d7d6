"""Tables of methods over seeds: numbers, resuming, collapses, hostile names, what is refused."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import mnist, table_digits, table_mnist
from jkmeans import comparison, configuration, training
from jkmeans.comparison import compare, run_folder
from jkmeans.comparison_tables import Row, write_tables
from jkmeans.errors import CollapseError, UserError
from jkmeans.interruption import Interrupted
from jkmeans.methods import METHODS, with_method
from jkmeans.published import PUBLISHED, Published, published_result
from jkmeans.recorder import Recorder
from tests import tiny
from tests.test_launchers import run as launch

ROWS = ("dec", "autoencoder")  # Not in the order of the alphabet.

TABLE_NAMES = ("table.md", "table.tex", "table.csv", "runs.csv", "table.json", "table.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Blobs as .npy files, with so much noise that no score is 100 %."""
    folder = tmp_path_factory.mktemp("data")
    examples, labels = tiny.blobs()
    noise = np.random.default_rng(1).normal(size=examples.shape)
    examples += 3 * noise.astype(np.float32)
    np.save(folder / "x.npy", examples)
    np.save(folder / "y.npy", labels)
    return folder


def row_config(data: Path, method: str, **changes):
    paths = {"data__path": str(data / "x.npy"), "data__labels_path": str(data / "y.npy")}
    base = tiny.config(**paths | {"n_devices": 1, "checkpoint__every": 4} | changes)
    return with_method(base, method)


def table_config(data: Path, n_seeds: int = 2, names=ROWS, **changes):
    config = ConfigDict({"n_seeds": n_seeds})
    config.runs = ConfigDict(sort_keys=False)
    for name in names:
        config.runs[name] = row_config(data, name, **changes)
    return config


@pytest.fixture(scope="module")
def table(data, tmp_path_factory):
    """The folder of a table of two methods and two seeds, and what `compare` returned."""
    workdir = tmp_path_factory.mktemp("table")
    return workdir, compare(table_config(data), workdir)


@pytest.fixture
def trainings(monkeypatch):
    """Replaces training by results that depend on row and seed; the folders trained, in order."""
    trained: list[str] = []

    def fake(config, folder):
        training.claim_workdir(folder, config)
        trained.append(f"{folder.parent.name}/{folder.name}")
        if config.objective.name == "dcn":
            raise CollapseError(f"the embeddings of seed {config.seed} collapsed")
        acc = 0.5 + 0.1 * config.seed + 0.01 * len(config.objective.name)
        results = {"data": "blobs", "acc": acc, "inertia": 12.5, "train_seconds": 1.5}
        (folder / "results.json").write_text(json.dumps(results))
        return results

    monkeypatch.setattr(training, "train_and_evaluate", fake)
    return trained


def refuse_training(*arguments):
    raise AssertionError("a run was trained that had ended")


def texts(workdir: Path) -> dict[str, bytes]:
    return {name: (workdir / name).read_bytes() for name in TABLE_NAMES}


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, as a renderer would show them."""
    cells, escaped = [""], False
    for letter in line.strip():
        if letter == "|" and not escaped:
            cells.append("")
        elif letter == "\\" and not escaped:
            escaped = True
            continue
        else:
            cells[-1] += letter
        escaped = False
    assert cells[0] == cells[-1] == ""
    return [cell.strip() for cell in cells[1:-1]]


def markdown_cells(workdir: Path) -> list[list[str]]:
    lines = (workdir / "table.md").read_text().splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not under their heads"
    head, rule, *body = [cells_of(line) for line in lines]
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
    assert {len(line) for line in (head, rule, *body)} == {len(head)}
    return [head, *body]


# Numbers


def test_numbers_are_those_of_the_runs(table):
    workdir, summary = table
    assert summary == json.loads((workdir / "table.json").read_text())
    assert list(summary) == list(ROWS)
    with open(workdir / "table.csv", newline="") as file:
        by_name = {line["method"]: line for line in csv.DictReader(file)}
    with open(workdir / "runs.csv", newline="") as file:
        runs = {(line["method"], int(line["seed"])): line for line in csv.DictReader(file)}
    assert len(runs) == 4
    _, *body = markdown_cells(workdir)
    for name, cells in zip(ROWS, body, strict=True):
        results = [
            json.loads((run_folder(workdir, name, seed) / "results.json").read_text())
            for seed in range(2)
        ]
        for place, metric in enumerate(("acc", "nmi", "ari"), start=2):
            values = [one[metric] for one in results]
            mean, sd = np.mean(values), np.std(values, ddof=1)
            assert summary[name][metric] == {"mean": mean, "sd": sd, "values": values}
            assert float(by_name[name][f"{metric}_mean"]) == mean
            assert float(by_name[name][f"{metric}_sd"]) == sd
            assert cells[place] == f"{100 * mean:.1f} ± {100 * sd:.1f}"
            assert [float(runs[name, seed][metric]) for seed in range(2)] == values
        assert cells[:2] == [name, "2"]
        assert results[0]["acc"] != results[1]["acc"]
    latex = (workdir / "table.tex").read_text()
    assert latex.startswith("\\begin{tabular}{lrrrrr}\n\\toprule\n")
    dec = " & ".join(body[0]).replace("±", "$\\pm$")
    assert f"{dec} \\\\\n" in latex
    assert (workdir / "table.png").read_bytes().startswith(b"\x89PNG")


def test_columns_have_heads(table):
    assert markdown_cells(table[0])[0] == ["method", "seeds", "ACC %", "NMI %", "ARI %", "seconds"]


def test_networks_are_pretrained_once(table):
    """DEC and the autoencoder pretrain alike: one file for each seed."""
    assert len(list((table[0] / "pretrained").glob("*.npz"))) == 2


def test_no_half_files_are_left(table):
    assert not [p for p in table[0].iterdir() if p.name.startswith(".")]
    assert {p.name for p in table[0].iterdir()} == {*TABLE_NAMES, *ROWS, "pretrained"}


def test_one_seed_has_no_deviation(data, tmp_path, trainings):
    found = compare(table_config(data, n_seeds=1), tmp_path)["dec"]["acc"]
    assert (found["sd"], len(found["values"])) == (0.0, 1)
    assert markdown_cells(tmp_path)[1][2] == "53.0"


# Resuming


def test_a_second_call_trains_nothing(data, table, monkeypatch, capsys):
    before = texts(table[0])
    monkeypatch.setattr(training, "train_and_evaluate", refuse_training)
    assert compare(table_config(data), table[0]) == table[1]
    assert texts(table[0]) == before
    assert "ACC" in capsys.readouterr().out


def test_a_table_that_is_stopped_keeps_what_has_ended(data, tmp_path, trainings, monkeypatch):
    train = training.train_and_evaluate

    def stopped_in_the_third(config, folder):
        if len(trainings) == 2:
            raise Interrupted(signal.SIGTERM)
        return train(config, folder)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_and_evaluate", stopped_in_the_third)
        with pytest.raises(Interrupted):
            compare(table_config(data), tmp_path)
    assert [line[:2] for line in markdown_cells(tmp_path)[1:]] == [[name, "1"] for name in ROWS]
    compare(table_config(data), tmp_path)
    assert trainings == [f"{name}/seed_{seed}" for seed in range(2) for name in ROWS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_runs_is_heard(number, data, tmp_path, monkeypatch):
    """It comes while the table is written after the second run: that is done, then it stops."""
    began, before = [], signal.getsignal(number)

    def train(config, folder):
        began.append(folder)
        # While a run gets ready nobody listens for it, who could not end it.
        assert signal.getsignal(number) is before

    def write(workdir, rows):
        if len(began) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training, "train_and_evaluate", train)
    monkeypatch.setattr(comparison, "write_tables", write)
    monkeypatch.setattr(comparison, "_rows", lambda runs: [])
    with pytest.raises(Interrupted, match=number.name):
        compare(table_config(data), tmp_path)
    assert len(began) == 2


@pytest.mark.slow
def test_an_interrupted_table_goes_on(data, table, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        record = Recorder.epoch
        seen = []

        def epoch(recorder, phase, number, *arguments):
            record(recorder, phase, number, *arguments)
            seen.append(number)
            if len(seen) == 5:  # The first of seed 1.
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Recorder, "epoch", epoch)
        with pytest.raises(Interrupted):
            compare(table_config(data), tmp_path)
    assert [line[:2] for line in markdown_cells(tmp_path)[1:]] == [[name, "1"] for name in ROWS]
    capsys.readouterr()
    summary = compare(table_config(data), tmp_path)
    out, err = capsys.readouterr()
    assert "going on after epoch 1 of 4" in err
    assert "seed 0\n" not in out
    for name in ROWS:
        for metric in ("acc", "nmi", "ari", "inertia"):
            assert summary[name][metric] == table[1][name][metric]


def test_chosen_rows_are_trained_and_the_others_stay(data, tmp_path, trainings):
    config = table_config(data, names=("joint", "dec", "autoencoder"))
    assert list(compare(config, tmp_path, ["dec"])) == ["dec"]
    assert trainings == ["dec/seed_0", "dec/seed_1"]
    assert list(compare(config, tmp_path, ["autoencoder"])) == ["dec", "autoencoder"]
    assert trainings[2:] == ["autoencoder/seed_0", "autoencoder/seed_1"]
    assert list(compare(config, tmp_path)) == ["joint", "dec", "autoencoder"]
    assert trainings[4:] == ["joint/seed_0", "joint/seed_1"]


def test_seeds_take_turns_and_more_can_follow(data, tmp_path, trainings):
    compare(table_config(data, n_seeds=2), tmp_path)
    turns = ["dec/seed_0", "autoencoder/seed_0", "dec/seed_1", "autoencoder/seed_1"]
    assert trainings == turns
    summary = compare(table_config(data, n_seeds=3), tmp_path)
    assert trainings == [*turns, "dec/seed_2", "autoencoder/seed_2"]
    assert len(summary["dec"]["acc"]["values"]) == 3


def test_a_changed_config_is_refused_before_anything_is_trained(data, tmp_path, trainings):
    compare(table_config(data, n_seeds=1), tmp_path)
    del trainings[:]
    config = table_config(data, n_seeds=1, names=("joint", *ROWS))
    config.runs["autoencoder"].n_clusters = 4
    with pytest.raises(UserError, match=r"another config: n_clusters is 4 here and 3 there"):
        compare(config, tmp_path)
    assert trainings == []
    # Left alone it is not an error, but its results are not of this config.
    assert list(compare(config, tmp_path, ["dec"])) == ["dec"]


@pytest.mark.slow
def test_data_that_a_row_cannot_be_of_are_refused_before_anything_is_trained(tmp_path, trainings):
    for name, array in zip("xy", tiny.blobs(), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    config = table_config(tmp_path, n_seeds=1, names=("autoencoder", "vade"))
    with pytest.raises(
        UserError, match=r"config\.runs\['vade'\]: config\.objective\.likelihood is"
    ):
        compare(config, tmp_path / "table")
    assert trainings == []
    compare(config, tmp_path / "table", only=("autoencoder",))
    assert trainings == ["autoencoder/seed_0"]


def test_changed_data_go_through_the_check_of_the_run(tmp_path):
    examples, labels = tiny.blobs()
    np.save(tmp_path / "x.npy", examples)
    np.save(tmp_path / "y.npy", labels)
    config = table_config(tmp_path, n_seeds=1, names=("autoencoder",))
    compare(config, tmp_path / "table")
    np.save(tmp_path / "x.npy", tiny.blobs(seed=5)[0])
    ended = (tmp_path / "table" / "autoencoder" / "seed_0" / "results.json").stat().st_mtime
    os.utime(tmp_path / "x.npy", (ended + 5, ended + 5))
    with pytest.raises(UserError, match=r"config.runs\['autoencoder'\], seed 0: .* on other data"):
        compare(config, tmp_path / "table")


# Collapses


def test_a_collapsed_row_is_counted_and_the_others_go_on(data, tmp_path, trainings, capsys):
    config = table_config(data, names=("dcn", "dec"))
    summary = compare(config, tmp_path)
    sentences = [[seed, f"the embeddings of seed {seed} collapsed"] for seed in range(2)]
    assert summary["dcn"] == {"failures": sentences}
    assert len(summary["dec"]["acc"]["values"]) == 2
    assert markdown_cells(tmp_path)[1][:4] == ["dcn", "0 (2 collapsed)", "–", "–"]
    assert "dcn" in capsys.readouterr().out
    before, n_trained = texts(tmp_path), len(trainings)
    assert compare(config, tmp_path) == summary
    assert len(trainings) == n_trained
    assert texts(tmp_path) == before


@pytest.mark.slow
def test_a_real_collapse(data, tmp_path):
    """One cluster pulls everything to one point; the file of it is of the run's own folder."""
    config = ConfigDict({"n_seeds": 1, "runs": {}})
    config.runs["point"] = tiny.config(
        n_clusters=1,
        objective__centroid_weight=1e2,
        objective__warmup_epochs=0.0,
        training__n_epochs=100,
        training__collapse_ratio=1e-1,
        n_devices=1,
        data__path=str(data / "x.npy"),
    )
    summary = compare(config, tmp_path)
    [[seed, sentence]] = summary["point"]["failures"]
    assert seed == 0
    assert "collapsed in epoch" in sentence
    assert json.loads((tmp_path / "point" / "seed_0" / "collapsed.json").read_text()) == {
        "error": sentence
    }


# Labels and published numbers


def test_data_without_labels_have_inertia(data, tmp_path):
    config = table_config(data, n_seeds=1, names=("autoencoder",), data__labels_path="")
    summary = compare(config, tmp_path)
    head, row = markdown_cells(tmp_path)
    assert head == ["method", "seeds", "inertia", "seconds"]
    results = json.loads((tmp_path / "autoencoder" / "seed_0" / "results.json").read_text())
    assert float(row[2]) == pytest.approx(results["inertia"], rel=1e-3)
    assert summary["autoencoder"]["inertia"]["mean"] == results["inertia"]
    assert not (tmp_path / "table.png").exists()


def test_every_published_number_has_a_source_and_is_a_percentage():
    for rows in PUBLISHED.values():
        for key, row in rows.items():
            assert len(row.source) > 5, key
            assert key.split(",")[0] in METHODS
            for value in (row.acc, row.nmi, row.ari):
                assert value is None or 30 < value < 100, key
            assert row.sd is None or 0 < row.sd < 20


def test_published_numbers_are_beside_the_same_method_on_all_data():
    full = {
        name: configuration.validate(one) for name, one in table_mnist.get_config().runs.items()
    }
    known = PUBLISHED["mnist"]
    assert published_result(full["dec"]) == known["dec"]
    assert published_result(full["joint, views"]) is None
    views = configuration.validate(with_method(mnist.get_config(), "dec", augmentation__shift=2.0))
    assert published_result(views) == known["dec, views"]
    resets = configuration.validate(with_method(full["dcn"], "dcn", reset__every=10))
    assert published_result(resets) == known["dcn, BRB"]
    for field, value in (("split", "test"), ("n_examples", 5000), ("name", "digits")):
        part = full["dec"].copy_and_resolve_references()
        part.data[field] = value
        assert published_result(part) is None
    more = full["dec"].copy_and_resolve_references()
    more.n_clusters = 20
    assert published_result(more) is None


def test_published_numbers_in_every_form(tmp_path):
    theirs = Published(94.46, 80.0, None, 4.7, "a README_of_theirs")
    ours = [{"seed": 0, "acc": 0.5, "train_seconds": 2.0}]
    write_tables(tmp_path, [Row("vade", ours, [], theirs), Row("dec", ours, [], None)])
    head, vade, dec = markdown_cells(tmp_path)
    assert head[-2:] == ["published ACC / NMI / ARI %", "source"]
    assert vade[-2:] == ["94.5 ± 4.7 / 80.0 / –", "a README_of_theirs"]
    assert dec[-2:] == ["–", "–"]
    with open(tmp_path / "table.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["published_acc"], line["published_ari"]) == ("0.9446", "")
    assert (
        "94.5 $\\pm$ 4.7 / 80.0 / -- & a README\\_of\\_theirs \\\\"
        in (tmp_path / "table.tex").read_text()
    )


# Names

HOSTILE = (
    "a|b & 50 % of_c",
    "<script>x</script>",
    "../../up",
    "..",
    'quo"ted, "twice"',
    "*[x](y)* `z` #1 ~$n^2$ {\\frac}",
    "=1+1",
    "$\\nosuchcommand$",
)


def test_hostile_names_are_safe(tmp_path, data, trainings):
    config = ConfigDict({"n_seeds": 1})
    config.runs = ConfigDict(sort_keys=False, allow_dotted_keys=True)
    for name in HOSTILE:
        config.runs[name] = row_config(data, "dec")
    workdir = tmp_path / "inside"
    summary = compare(config, workdir)
    assert list(summary) == list(HOSTILE)
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]
    folders = [p for p in workdir.iterdir() if p.is_dir()]
    assert len(folders) == len(HOSTILE)
    assert [line[0] for line in markdown_cells(workdir)[1:]] == list(HOSTILE)
    assert "<script>" not in (workdir / "table.md").read_text()
    for file_name in ("table.csv", "runs.csv"):
        with open(workdir / file_name, newline="") as file:
            assert [line["method"] for line in csv.DictReader(file)] == list(HOSTILE)
    lines = (workdir / "table.tex").read_text().splitlines()[4:-2]
    assert len(lines) == len(HOSTILE)
    assert [line.replace("\\&", "").count(" & ") for line in lines] == [5] * len(HOSTILE)
    assert lines[0].startswith("a\\textbar{}b \\& 50 \\% of\\_c & ")
    # At the start of a line these would be arguments of the line break before it.
    assert lines[5].startswith("{*}{[}x{]}(y){*} ")
    assert "\\{\\textbackslash{}frac\\}" in lines[5]
    assert (workdir / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 101, 3, " dec", "\ud800"])
def test_names_that_cannot_be_shown_are_refused(name, data, tmp_path):
    config = ConfigDict({"n_seeds": 1, "runs": {}})
    config.runs[name] = row_config(data, "dec")
    with pytest.raises(UserError, match="accepted: 1 to 100 printable characters"):
        compare(config, tmp_path / "table")
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("names", [("a b", "a,b"), ("DEC", "dec"), ("dec", "pretrained")])
def test_names_that_share_a_folder_are_refused(names, data, tmp_path):
    config = ConfigDict({"n_seeds": 1, "runs": {name: row_config(data, "dec") for name in names}})
    with pytest.raises(UserError, match="would share a folder with"):
        compare(config, tmp_path)


def test_rows_have_the_order_of_the_author():
    assert list(table_digits.get_config().runs)[:3] == ["autoencoder", "joint", "dec"]
    assert list(table_mnist.get_config().runs)[-1] == "joint, unit norm"


# What is refused


def one_row(data, **changes):
    return ConfigDict({"n_seeds": 1, "runs": {"dec": row_config(data, "dec")}} | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_seeds": 0}, "config.n_seeds is 0; accepted: an integer of at least 1"),
        ({"n_seeds": "two"}, "config.n_seeds is 'two'; accepted: an integer of at least 1"),
        ({"n_seeds": None}, "config.n_seeds is None; accepted: an integer of at least 1"),
        ({"runs": {}}, "config.runs is {}; accepted: configs by names of rows"),
        ({"runs": 3}, "config.runs is 3; accepted: configs by names of rows"),
        ({"runs": {"dec": 3}}, "config.runs['dec'] is 3; accepted: a complete config"),
        ({"runs": {"dec": {"seed": 0}}}, "config.runs['dec']: config lacks the field 'n_seeds'"),
        ({"rows": 1}, "has a field 'rows'; accepted: n_seeds and runs"),
    ],
)
def test_bad_tables(changes, sentence, data, tmp_path):
    with pytest.raises(UserError) as error:
        compare(one_row(data, **changes), tmp_path / "table")
    assert sentence in str(error.value)
    assert not (tmp_path / "table").exists()


def test_other_configs_are_not_of_a_table(data, tmp_path):
    with pytest.raises(UserError, match="accepted: n_seeds and runs"):
        compare(row_config(data, "dec"), tmp_path)
    with pytest.raises(UserError, match="lacks the field 'runs'"):
        compare(ConfigDict({"n_seeds": 1}), tmp_path)
    config = one_row(data)
    config.runs.dec.n_seeds = 3
    with pytest.raises(UserError, match=r"config.runs\['dec'\].n_seeds is 3; accepted: 1"):
        compare(config, tmp_path)
    config.runs.dec.n_seeds, config.runs.dec.seed = 1, 9
    with pytest.raises(UserError, match=r"config.runs\['dec'\].seed is 9; accepted: 0"):
        compare(config, tmp_path)


def test_unknown_rows_are_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"--methods names 'dek'; accepted: 'dec', 'autoencoder'"):
        compare(table_config(data), tmp_path, ["dec", "dek"])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.n_seeds=0", "config.n_seeds is 0; accepted: an integer of at least 1"),
        # Quotes keep a name with a comma together, so that the last one is the one not known.
        pytest.param(
            *(
                '--methods="dec, BRB",dek',
                "--methods names 'dek'; accepted: 'autoencoder', 'joint'",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command_answers_in_one_sentence(flag, sentence, tmp_path):
    done = launch("table", "--config=configs/table_digits.py", f"--workdir={tmp_path / 'w'}", flag)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()
