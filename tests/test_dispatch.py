"""Predicting for many files: whatever happens to workers and master, every row is written once."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jkmeans import clustering, evaluation, training
from jkmeans.blocks import MOST_ROWS
from jkmeans.dispatch import engine, inputs, models, output, predict_files, read_predictions
from jkmeans.dispatch.master import MOST_DEATHS, Lease, Master, Part, Process, Shard
from jkmeans.errors import UserError
from jkmeans.interruption import Interrupted
from jkmeans.workdir import only_process_in
from tests import tiny

HERE = Process("here", 1)
LEASE_SECONDS = 10.0


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def numbered(name, n_rows):
    return inputs.InputFile(name, Path(name), n_rows, "as it was")


def write(folder, shard, worker, tag=b"") -> Part:
    """What a worker writes, without waiting for the disk: the rows by their names."""
    content = tag + "\n".join(f"{shard.file} {r}" for r in range(shard.start, shard.stop)).encode()
    write.attempts += 1
    attempt = f".{output.part_name(shard)}.here.1.{write.attempts}"
    (folder / output.PARTS_FOLDER / attempt).write_bytes(content)
    rows = shard.stop - shard.start
    return Part(attempt, rows, len(content), hashlib.sha256(content).hexdigest(), worker)


write.attempts = 0


class Killed(BaseException):
    """The master is dead."""


class World(RuleBasedStateMachine):
    """Anything happens in any order; in the end someone finishes the work, and rows are counted."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / output.PARTS_FOLDER).mkdir()
        self.clock = Clock()
        self.store = self.master = None
        self.workers: dict[str, Lease | None] = {}
        self.joined = 0
        self.deaths = 0
        self.broken: set[str] = set()

    @initialize(rows=st.lists(st.integers(1, 7), min_size=1, max_size=3), size=st.integers(1, 3))
    def begin(self, rows, size):
        self.files = [numbered(f"file-{i}", n) for i, n in enumerate(rows)]
        self.shards = [shard for file in self.files for shard in inputs.cut(file, size)]
        self._new_master()

    def _new_master(self):
        if self.store is not None:
            self.store._journal.close()
        self.store = output.PartStore(self.folder, {file.name: file for file in self.files})
        self.master = Master(
            self.shards, self.store, now=self.clock, process=HERE, lease_seconds=LEASE_SECONDS
        )

    def _worker(self, data, with_lease=False):
        names = [n for n, lease in self.workers.items() if lease is not None or not with_lease]
        return data.draw(st.sampled_from(names)) if names else None

    @rule()
    def join(self):
        self.joined += 1
        self.workers[f"w{self.joined}"] = None
        self.master.enter(f"w{self.joined}", HERE)

    @rule(data=st.data(), answers_lost=st.integers(0, 1))
    def ask(self, data, answers_lost):
        worker = self._worker(data)
        if worker is None or self.workers[worker] is not None:
            return
        heard = [self.master.ask(worker) for _ in range(1 + answers_lost)]
        assert len({answer.lease for answer in heard}) == 1
        self.workers[worker] = heard[-1].lease

    @rule(data=st.data())
    def renew(self, data):
        worker = self._worker(data, with_lease=True)
        if worker and not self.master.renew(worker, self.workers[worker]):
            self.workers[worker] = None

    @rule(data=st.data(), answers_lost=st.integers(0, 1), tag=st.sampled_from([b"", b" "]))
    def finish(self, data, answers_lost, tag):
        """Also of leases that lapsed long ago, and of a former life of the master."""
        worker = self._worker(data, with_lease=True)
        if worker is None:
            return
        lease, self.workers[worker] = self.workers[worker], None
        part = write(self.folder, lease.shard, worker, tag)
        heard = [self.master.done(worker, lease, part) for _ in range(1 + answers_lost)]
        assert len(set(heard)) == 1
        if not heard[-1]:
            output.discard_part(self.folder, part.attempt)

    @rule(data=st.data())
    def break_file(self, data):
        worker = self._worker(data, with_lease=True)
        if worker:
            lease, self.workers[worker] = self.workers[worker], None
            self.broken.add(lease.shard.file)
            self.master.failed(worker, lease, "damaged")

    @rule(data=st.data(), known=st.booleans())
    def kill_worker(self, data, known):
        worker = self._worker(data)
        if worker is None:
            return
        del self.workers[worker]
        self.deaths += 1
        if known:
            self.master.leave(worker, dead=True)

    @rule(seconds=st.floats(0, 2 * LEASE_SECONDS))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def kill_master(self):
        self._new_master()

    @rule(data=st.data(), where=st.sampled_from(["before", "renamed", "torn", "noted"]))
    def kill_master_while_it_keeps_a_part(self, data, where):
        worker = self._worker(data, with_lease=True)
        if worker is None:
            return
        lease = self.workers[worker]
        part = write(self.folder, lease.shard, worker)
        append = self.store._journal.append

        def die(content):
            if where == "torn":
                os.write(self.store._journal._file.fileno(), content[: len(content) // 2])
            elif where == "noted":
                append(content)
            raise Killed

        self.store._journal.append = die
        if where != "before":
            with contextlib.suppress(Killed):
                self.master.done(worker, lease, part)
        self._new_master()
        # Ray calls again where no answer came, as a worker does whose process died does not.
        if data.draw(st.booleans()):
            if not self.master.done(worker, lease, part):
                output.discard_part(self.folder, part.attempt)
            self.workers[worker] = None
        else:
            del self.workers[worker]

    @precondition(lambda self: self.master is not None)
    @rule()
    def count(self):
        status = self.master.status()
        kept = self.store.kept(self.shards)
        assert status.rows_done <= status.rows == sum(file.n_rows for file in self.files)
        assert len(status.running) <= len(self.shards) + len(status.workers)
        assert len(kept) <= len(self.shards)

    def teardown(self):
        try:
            if self.master is not None:
                self._end()
        finally:
            if self.store is not None:
                self.store.close()
            shutil.rmtree(self.folder)

    def _end(self):
        # Whoever has a lease is gone without a word; one worker is left.
        for _ in range(10 * len(self.shards) + 10):
            answer = self.master.ask("last")
            if answer.ended:
                break
            if answer.lease is None:
                self.clock.now += LEASE_SECONDS + 1
                continue
            part = write(self.folder, answer.lease.shard, "last")
            assert self.master.done("last", answer.lease, part)
        assert answer.ended, "work was lost"
        status = self.master.status()
        assert set(status.failed) <= self.broken or self.deaths >= MOST_DEATHS
        self.store.close()
        self.store = output.PartStore(self.folder, {file.name: file for file in self.files})
        kept = self.store.kept(self.shards)
        good = [file for file in self.files if file.name not in status.failed]
        # Raises where a row is missing, or there twice.
        plan = {"model": "", "described": "", "columns": []}
        manifest = output.make_manifest(self.files, kept, status.failed, plan)
        output.write_manifest(self.folder, manifest)
        rows = []
        for file in manifest["files"]:
            for part in file["parts"]:
                content = (self.folder / part["part"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == part["sha256"]
                rows += content.decode().split("\n")
        wanted = [f"{file.name} {row}" for file in good for row in range(file.n_rows)]
        assert [row.strip() for row in rows] == wanted


World.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestWorld = World.TestCase


# One case at a time.


@pytest.fixture
def made(tmp_path):
    """A master of three shards of ten rows, its clock and its folder."""
    (tmp_path / output.PARTS_FOLDER).mkdir()
    clock = Clock()
    files = {"a": numbered("a", 30)}
    shards = inputs.cut(files["a"], 10)

    stores = []

    def make():
        """Another life, once the one before is dead."""
        for store in stores:
            store.close()
        stores[:] = [output.PartStore(tmp_path, files)]
        return Master(shards, stores[0], now=clock, process=HERE, lease_seconds=LEASE_SECONDS)

    yield make, clock, tmp_path
    for store in stores:
        store.close()


def complete(master, folder, worker, lease):
    return master.done(worker, lease, write(folder, lease.shard, worker))


def test_a_lease_that_is_not_renewed_goes_to_the_next_and_the_late_result_is_refused(made):
    make, clock, folder = made
    master = make()
    lost = master.ask("slow").lease
    clock.now = 9
    assert master.renew("slow", lost)
    clock.now = 18
    assert master.ask("quick").lease.shard == Shard("a", 10, 20)
    clock.now = 19.5
    again = master.ask("other").lease
    assert again.shard == lost.shard == Shard("a", 0, 10)
    assert master.status().lapsed == 1
    assert master.status().silent == {"slow": 10.5, "quick": 1.5, "other": 0}
    assert complete(master, folder, "other", again)
    assert not complete(master, folder, "slow", lost)
    assert master.status().twice == 1
    assert master.status().different == 0


def test_a_late_result_that_is_the_first_is_kept(made):
    make, clock, folder = made
    master = make()
    lost = master.ask("slow").lease
    clock.now = 11
    again = master.ask("other").lease
    assert again.shard == lost.shard
    assert complete(master, folder, "slow", lost)
    assert not master.renew("other", again)
    assert master.ask("other").lease.shard == Shard("a", 10, 20)


def test_the_slowest_shard_is_given_to_a_second_worker_at_the_end(made):
    make, clock, folder = made
    master = make()
    slow = master.ask("slow").lease
    first = master.ask("quick").lease
    clock.now = 2
    complete(master, folder, "quick", first)
    second = master.ask("quick").lease
    clock.now = 2.9
    assert master.ask("third").lease is None  # Nothing takes long yet.
    assert master.renew("slow", slow)
    clock.now = 4
    complete(master, folder, "quick", second)
    copy = master.ask("quick").lease
    assert copy.shard == slow.shard
    assert copy.number != slow.number
    assert master.ask("third").lease is None  # Two are enough.
    assert master.status().copies == 1
    assert complete(master, folder, "quick", copy)
    assert not master.renew("slow", slow)
    assert master.ask("slow").ended


def test_a_dead_worker_costs_nobody_the_time_of_its_lease(made):
    make, _, _ = made
    master = make()
    lease = master.ask("dead").lease
    master.leave("dead", dead=True)
    assert "dead" not in master.status().silent
    assert master.ask("dead", HERE).ended  # Said before it died, heard after.
    assert not master.status().workers
    assert master.ask("next").lease.shard == lease.shard


def test_a_shard_that_kills_its_workers_is_given_up(made):
    make, *_ = made
    master = make()
    for i in range(MOST_DEATHS):
        assert master.ask(f"w{i}").lease.shard.start == 0
        master.leave(f"w{i}", dead=True)
    assert "10 workers died while they computed rows 0 to 9 of a" in master.status().failed["a"]
    assert master.ask("next").ended


def test_a_master_that_comes_back_takes_up_the_leases_that_are_renewed(made):
    make, _, folder = made
    master = make()
    done, held = master.ask("a").lease, master.ask("b").lease
    complete(master, folder, "a", done)
    master = make()
    assert master.status().life == 2
    assert master.status().shards_done == 1
    assert master.renew("b", held)
    assert master.ask("a").lease.shard == Shard("a", 20, 30)
    assert master.ask("c").lease is None
    assert complete(master, folder, "b", held)


def test_a_line_of_the_journal_that_was_cut_is_done_again_and_a_damaged_one_named(made):
    make, _, folder = made
    master = make()
    for worker in "ab":
        complete(master, folder, worker, master.ask(worker).lease)
    journal = folder / output.JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-5])
    assert len(output.read_journal(journal)) == 2  # The beginning, and one part.
    assert make().status().shards_done == 1
    content = journal.read_text().splitlines()
    content[1] = "{"
    journal.write_text("\n".join(content) + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*journal.jsonl is damaged"):
        make()


def test_a_part_that_is_gone_is_computed_again(made):
    make, _, folder = made
    master = make()
    complete(master, folder, "a", master.ask("a").lease)
    (folder / "parts" / "a.000000000000.npz").unlink()
    assert make().status().shards_done == 0


def test_what_was_computed_of_another_content_is_not_taken_for_this_one(tmp_path):
    (tmp_path / output.PARTS_FOLDER).mkdir()
    old, new = numbered("a", 10), numbered("a", 10)._replace(identity="written to")
    (shard,) = inputs.cut(old, 10)
    for file in (old, new):
        store = output.PartStore(tmp_path, {"a": file})
        assert store.kept([shard]) == {}
        assert store.keep(shard, write(tmp_path, shard, "w"))
        store.close()
    # The old content is back, with its time, but the part is of the new one.
    store = output.PartStore(tmp_path, {"a": old})
    assert store.kept([shard]) == {}
    store.close()


def test_the_part_of_another_is_not_taken_for_one_that_was_renamed(tmp_path):
    (tmp_path / output.PARTS_FOLDER).mkdir()
    file = numbered("a", 10)
    (shard,) = inputs.cut(file, 10)
    store = output.PartStore(tmp_path, {"a": file})
    kept, other = write(tmp_path, shard, "v"), write(tmp_path, shard, "w", tag=b" ")
    assert store.keep(shard, kept)
    output.discard_part(tmp_path, other.attempt)
    assert store.keep(shard, kept)  # Renamed before; the journal did not know.
    assert not store.keep(shard, other)
    store.close()


def test_a_folder_that_is_not_shared_is_said(made):
    make, _, folder = made
    master = make()
    lease = master.ask("a").lease
    part = write(folder, lease.shard, "a")
    output.discard_part(folder, part.attempt)
    with pytest.raises(UserError, match=r"worker a on here wrote .* shared by all hosts"):
        master.done("a", lease, part)


# Real files, one process.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "x.npy", tiny.blobs()[0])
    training.train_and_evaluate(
        tiny.config(data__path=str(folder / "x.npy"), training__n_epochs=1, n_devices=1),
        folder / "work",
    )
    return folder / "work"


SIZES = (3, 2500, MOST_ROWS, 77)


@pytest.fixture
def many(tmp_path):
    """A folder of files: also Parquet and Zarr, and names whose order is not that of letters."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zarr

    folder = tmp_path / "many"
    folder.mkdir()
    rows = [tiny.blobs(n=n, seed=n)[0] for n in SIZES]
    np.save(folder / "f-2.npy", rows[0])
    np.save(folder / "f-10.npy", rows[1])
    table = pa.table({f"c{i}": rows[2][:, i] for i in range(12)})
    pq.write_table(table, folder / "f-11.parquet", row_group_size=300)
    array = zarr.create_array(
        folder / "f-12.zarr", shape=rows[3].shape, chunks=(20, 12), dtype=np.float32
    )
    array[:] = rows[3]
    return folder, ["f-2.npy", "f-10.npy", "f-11.parquet", "f-12.zarr"], rows


def by_hand(workdir, rows):
    model = evaluation.load_model(workdir)
    found = [evaluation.predict(model, x) for x in rows]
    return {
        name: np.concatenate([getattr(f, name) for f in found])
        for name in ("labels", "distances", "embeddings")
    }


def test_a_folder_of_files_gives_what_each_gives_alone(run, many, tmp_path, capsys):
    folder, names, rows = many
    out = tmp_path / "out"
    manifest = predict_files(
        run, str(folder), str(out), embeddings=True, merge=True, shard_rows=MOST_ROWS
    )
    assert [file["file"] for file in manifest["files"]] == names
    assert [file["rows"] for file in manifest["files"]] == list(SIZES)
    assert [file["first_row"] for file in manifest["files"]] == [0, 3, 2503, 3527]
    assert [len(file["parts"]) for file in manifest["files"]] == [1, 3, 1, 1]
    assert manifest["complete"]
    wanted = by_hand(run, rows)
    for name, column in wanted.items():
        merged = np.load(out / f"{name}.npy")
        assert merged.dtype == column.dtype
        assert merged.tobytes() == column.tobytes()
    parts = [*read_predictions(out)]
    assert [(file, start) for file, start, _ in parts] == [
        ("f-2.npy", 0), ("f-10.npy", 0), ("f-10.npy", 1024), ("f-10.npy", 2048),
        ("f-11.parquet", 0), ("f-12.zarr", 0),
    ]  # fmt: skip
    np.testing.assert_array_equal(
        np.concatenate([columns["labels"] for *_, columns in parts]), wanted["labels"]
    )
    model = evaluation.load_model(run)
    np.testing.assert_array_equal(np.load(out / "centroids.npy"), model.centroids)
    # Again: nothing is computed. A file more: nothing else is.
    capsys.readouterr()
    assert predict_files(run, str(folder), str(out), embeddings=True) == manifest
    assert "everything is done already" in capsys.readouterr().err
    np.save(folder / "f-1.npy", rows[0])
    seen = []
    more = predict_files(run, str(folder), str(out), embeddings=True, watch=seen.append)
    assert more["files"][0]["file"] == "f-1.npy"
    assert more["n_rows"] == manifest["n_rows"] + 3
    assert seen[0].rows_done == manifest["n_rows"]


def test_an_output_of_other_files_is_left_as_it_is(run, many, tmp_path):
    folder, _, rows = many
    out = tmp_path / "out"
    predict_files(run, str(folder), str(out))
    before = (out / "manifest.json").read_bytes()
    # Of the same names, sizes and times, too, as archives and copies leave them.
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(
        UserError, match=r"files in .*, and --input has those in .*copy; accepted: "
    ):
        predict_files(run, str(tmp_path / "copy"), str(out))
    np.save(folder / "other.npy", rows[0])
    with pytest.raises(UserError, match=r"for f-10\.npy and 3 more, and --input has none of that"):
        predict_files(run, str(folder / "other.npy"), str(out))
    assert (out / "manifest.json").read_bytes() == before


def test_files_that_moved_go_on_where_the_plan_says_so(run, many, tmp_path):
    folder, _, _ = many
    out = tmp_path / "out"
    before = predict_files(run, str(folder), str(out))
    moved = folder.rename(tmp_path / "moved")
    plan = json.loads((out / "plan.json").read_text())
    (tmp_path / "link").symlink_to(moved)
    for place in (str(moved), f"{moved}/", str(tmp_path / "link")):
        (out / "plan.json").write_text(json.dumps(plan | {"input": place}))
        assert predict_files(run, str(moved), str(out)) == before
    # A folder of before there was such an entry.
    (out / "plan.json").write_text(json.dumps({k: v for k, v in plan.items() if k != "input"}))
    assert predict_files(run, str(moved), str(out)) == before
    assert json.loads((out / "plan.json").read_text()) == plan | {"input": str(moved)}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "line 1"),
        (b"\xff", "decode"),
        (b"[]", "no columns"),
        (b"7", "int"),
        (b"{}", "no col"),
        ({"shard_rows": 0}, "shard_rows is 0, not a whole number above 0"),
        ({"shard_rows": "x"}, "shard_rows is 'x', not"),
        ({"shard_rows": 1e3}, "shard_rows is 1000.0, not"),
        ({"columns": 3}, "columns is 3, not a list of names"),
        ({"columns": [3]}, "columns is .3., not a list of names"),
        ({"input": 3}, "input is 3, not a text"),
        ({"model": None}, "model is None, not a text"),
    ],
)
def test_a_damaged_plan_is_named(run, tmp_path, content, why):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    np.save(folder / "f.npy", tiny.blobs(n=3)[0])
    predict_files(run, str(folder), str(out))
    if isinstance(content, dict):
        content = json.dumps(json.loads((out / "plan.json").read_bytes()) | content).encode()
    (out / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"plan\.json is damaged \(.*{why}.*\); accepted: another"):
        predict_files(run, str(folder), str(out))
    assert (out / "plan.json").read_bytes() == content


def test_an_engine_that_there_is_none_of(run, many, tmp_path):
    with pytest.raises(UserError, match="engine_name is 'rya'; accepted: process, ray"):
        predict_files(run, str(many[0]), str(tmp_path / "out"), engine_name="rya")
    assert not (tmp_path / "out").exists()


def test_two_commands_with_one_output_take_turns(run, many, tmp_path):
    out = tmp_path / "out"
    predict_files(run, str(many[0]), str(out))
    with only_process_in(out), pytest.raises(UserError, match="accepted: another --output, or"):
        predict_files(run, str(many[0]), str(out))


def test_merged_files_of_other_rows_do_not_stay(run, many, tmp_path, capsys):
    folder, _, rows = many
    out = tmp_path / "out"
    predict_files(run, str(folder), str(out), merge=True)
    before = (out / "labels.npy").read_bytes()
    predict_files(run, str(folder), str(out))  # Nothing has changed.
    assert (out / "labels.npy").read_bytes() == before
    (folder / "f-10.npy").unlink()
    predict_files(run, str(folder), str(out))
    assert "removed labels.npy, distances.npy, merged of other rows" in capsys.readouterr().err
    assert not (out / "labels.npy").exists()
    predict_files(run, str(folder), str(out), merge=True)
    np.save(folder / "f-2.npy", rows[3][:3])
    os.utime(folder / "f-2.npy", ns=(0, 0))
    (folder / "f-9.npy").write_bytes(b"broken")
    with pytest.raises(UserError, match="but not merged"):
        predict_files(run, str(folder), str(out), merge=True)
    assert not (out / "labels.npy").exists()


def test_a_finished_file_that_was_damaged_is_of_the_input_still(run, many, tmp_path):
    folder, _, rows = many
    for name in ("f-2.npy", "f-11.parquet", "f-12.zarr"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out = tmp_path / "out"
    predict_files(run, str(folder), str(out))
    (folder / "f-10.npy").write_bytes(b"broken")
    np.save(folder / "f-1.npy", rows[0])
    with pytest.raises(UserError, match=r"1 of 2 files could not be used, the other 1 are done"):
        predict_files(run, str(folder), str(out))


def test_a_file_that_changed_is_computed_again(run, many, tmp_path):
    folder, _, rows = many
    out = tmp_path / "out"
    before = predict_files(run, str(folder), str(out))
    np.save(folder / "f-2.npy", rows[3][:3])
    os.utime(folder / "f-2.npy", ns=(0, 0))
    after = predict_files(run, str(folder), str(out))
    assert before["files"][0]["parts"] != after["files"][0]["parts"]
    assert before["files"][1:] == after["files"][1:]
    labels = next(read_predictions(out))[2]["labels"]
    assert labels.tobytes() == by_hand(run, [rows[3][:3]])["labels"].tobytes()


def test_damaged_files_are_named_and_the_others_done(run, many, tmp_path):
    folder, _, rows = many
    content = (folder / "f-2.npy").read_bytes()
    (folder / "f-2.npy").write_bytes(content[:-7])
    bad = rows[1].copy()
    bad[2000, 3] = np.nan
    np.save(folder / "f-10.npy", bad)
    np.save(folder / "f-13.npy", np.zeros((5, 13), np.float32))
    (folder / "f-14.parquet").write_bytes(b"PAR1 no PAR1")
    chunk = next(p for p in (folder / "f-12.zarr").rglob("*") if p.is_file() and "c" in p.parts)
    chunk.write_bytes(b"broken")
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        predict_files(run, str(folder), str(out), merge=True, shard_rows=MOST_ROWS)
    said = str(caught.value)
    assert said.startswith(
        "5 of 6 files could not be used, the other 1 are done, but not merged: f-10.npy ("
    )
    for sentence in (
        "NaN or infinity in 1 of 1,024 rows",
        "f-2.npy is truncated",
        "f-13.npy is of shape [5, 13]; accepted: [n, 12]",
        "f-14.parquet is not a Parquet file",
        "f-12.zarr cannot be read",
    ):
        assert sentence in said, sentence
    manifest = json.loads((out / "manifest.json").read_text())
    assert [file["file"] for file in manifest["files"]] == ["f-11.parquet"]
    assert len(manifest["failed"]) == 5
    assert not manifest["complete"]
    assert not (out / "labels.npy").exists()
    # Mended and removed, the same command does the rest.
    np.save(folder / "f-10.npy", rows[1])
    np.save(folder / "f-2.npy", rows[0])
    for name in ("f-13.npy", "f-14.parquet"):
        (folder / name).unlink()
    shutil.rmtree(folder / "f-12.zarr")
    manifest = predict_files(run, str(folder), str(out), merge=True, shard_rows=MOST_ROWS)
    assert manifest["complete"]
    wanted = by_hand(run, rows[:3])["labels"]
    assert np.load(out / "labels.npy").tobytes() == wanted.tobytes()


def test_stopped_in_the_middle_it_goes_on(run, many, tmp_path):
    folder, _, rows = many
    out = tmp_path / "out"

    def stop(status):
        if status.shards_done == 2 and not sent:
            sent.append(status)
            os.kill(os.getpid(), signal.SIGTERM)

    sent = []
    with pytest.raises(Interrupted):
        predict_files(run, str(folder), str(out), shard_rows=MOST_ROWS, watch=stop)
    assert not (out / "manifest.json").exists()
    assert 2 <= len([*(out / "parts").iterdir()]) < 6
    seen = []
    predict_files(run, str(folder), str(out), merge=True, watch=seen.append)
    assert seen[0].shards_done >= 2
    assert np.load(out / "labels.npy").tobytes() == by_hand(run, rows)["labels"].tobytes()


def test_a_part_that_was_changed_is_not_merged(run, many, tmp_path):
    folder, *_ = many
    out = tmp_path / "out"
    manifest = predict_files(run, str(folder), str(out))
    part = out / manifest["files"][1]["parts"][0]["part"]
    content = bytearray(part.read_bytes())
    content[300] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"f-10.npy.000000000000.npz cannot be used \(its checksum"):
        predict_files(run, str(folder), str(out), merge=True)
    assert not (out / "labels.npy").exists()
    part.unlink()
    predict_files(run, str(folder), str(out), merge=True)


def test_images_are_read_as_they_are(tmp_path):
    x = tiny.blobs()[0].reshape(-1, 3, 4)
    np.save(tmp_path / "x.npy", x)
    work = tmp_path / "work"
    training.train_and_evaluate(
        tiny.config(data__path=str(tmp_path / "x.npy"), training__n_epochs=1, n_devices=1), work
    )
    predict_files(work, str(tmp_path / "x.npy"), str(tmp_path / "out"), merge=True)
    wanted = by_hand(work, [x])
    assert np.load(tmp_path / "out" / "distances.npy").tobytes() == wanted["distances"].tobytes()
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x))
    with pytest.raises(UserError, match="in Fortran order; accepted: more than two dim"):
        predict_files(work, str(tmp_path / "fortran.npy"), str(tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, *(pytest.param(d, marks=pytest.mark.slow) for d in (np.float32, np.float64))],
)
def test_the_centroids_of_k_means_predict_too(tmp_path, dtype):
    from configs.cluster import get_config

    x = (np.abs(tiny.blobs(n=1100)[0]) * 20).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    config = get_config()
    config.input, config.n_clusters = str(tmp_path / "x.npy"), "5"
    config.report.pictures = False
    clustering.cluster(config, tmp_path / "c")
    out = tmp_path / "out"
    predict_files(tmp_path / "c", str(tmp_path / "x.npy"), str(out), merge=True)
    np.testing.assert_array_equal(np.load(out / "labels.npy"), np.load(tmp_path / "c/labels.npy"))
    np.testing.assert_allclose(
        np.load(out / "distances.npy"), np.load(tmp_path / "c/distances.npy"), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(UserError, match=r"--embeddings was given, but .* has no network"):
        predict_files(tmp_path / "c", str(tmp_path / "x.npy"), str(out), embeddings=True)
    with pytest.raises(UserError, match=r"--checkpoint is 'best', but .* accepted: 'latest'"):
        predict_files(tmp_path / "c", str(tmp_path / "x.npy"), str(out), checkpoint="best")


def test_a_job_on_some_columns_predicts_from_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = tiny.blobs(n=300)[0]
    folder = tmp_path / "c"
    folder.mkdir()
    np.save(folder / "centroids.npy", x[:3, [4, 1]])
    (folder / "summary.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"columns": ["c4", "c1"]}))
    columns = models.load_predictor(folder).input_columns
    assert columns == ("c4", "c1")
    pq.write_table(pa.table({f"c{i}": x[:, i] for i in range(12)}), tmp_path / "all.parquet")
    pq.write_table(pa.table({"c4": x[:, 4], "b": x[:, 1]}), tmp_path / "two.parquet")
    for name in ("all.parquet", "two.parquet"):
        file = inputs.inspect(tmp_path / name, (2,), columns)
        rows = inputs.Reader([file], (2,), columns).read(Shard(name, 10, 20))
        np.testing.assert_array_equal(rows, x[10:20][:, [4, 1]])
    pq.write_table(pa.table({"c4": x[:, 4], "b": x[:, 1], "a": x[:, 0]}), tmp_path / "no.parquet")
    with pytest.raises(UserError, match="c1"):
        inputs.inspect(tmp_path / "no.parquet", (2,), columns)


def test_what_cannot_be_used_is_refused_and_leaves_no_trace(run, many, tmp_path, monkeypatch):
    folder, *_ = many
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "a.txt").write_text("")
    for given, message in (
        ({"input_path": str(tmp_path / "none")}, "--input .*none does not exist; accepted"),
        ({"input_path": str(tmp_path / "empty")}, "--input .*empty has no file in it; accepted"),
        ({"input_path": str(tmp_path / "a.txt")}, "is no file of a kind that is known"),
        ({"output_path": str(tmp_path / "a.txt")}, "a.txt is a file; accepted: a folder"),
        (
            {"output_path": str(tmp_path / "other")},
            "a folder with other things in it, such as thesis.tex",
        ),
        ({"output_path": str(folder)}, "a folder with other things in it, such as f-10.npy"),
        ({"shard_rows": 1000}, r"--shard_rows is 1,000; accepted: a multiple of 1,024"),
        ({"workdir": str(tmp_path / "empty")}, "holds no checkpoint"),
    ):
        arguments = {"workdir": run, "input_path": str(folder), "output_path": str(out)} | given
        with pytest.raises(UserError, match=message):
            predict_files(**arguments)
        assert not out.exists()
    assert [f.name for f in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(UserError, match=r"one of 4 processes, .* accepted: --processes=1"):
        predict_files(run, str(folder), str(out))
    assert not out.exists()


def test_the_folder_of_another_model_is_refused(run, many, tmp_path, monkeypatch):
    folder, *_ = many
    out = tmp_path / "out"
    predict_files(run, str(folder), str(out))
    before = (out / "plan.json").read_bytes()
    np.save(tmp_path / "x.npy", tiny.blobs()[0])
    other = tiny.config(
        data__path=str(tmp_path / "x.npy"), training__n_epochs=1, n_devices=1, seed=1
    )
    training.train_and_evaluate(other, tmp_path / "work")
    with pytest.raises(UserError, match=r"another model predicted: checkpoint .* with digest"):
        predict_files(tmp_path / "work", str(folder), str(out))
    with pytest.raises(UserError, match="holds labels, distances, and labels, distances, embed"):
        predict_files(run, str(folder), str(out), embeddings=True)
    with pytest.raises(UserError, match=r"--shard_rows is 1,024, but .* are cut into 1,"):
        predict_files(run, str(folder), str(out), shard_rows=MOST_ROWS)
    assert (out / "plan.json").read_bytes() == before
    # One in which nothing was done yet is anybody's.
    empty = tmp_path / "empty"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed"):
        predict_files(tmp_path / "work", str(folder), str(empty), engine_name="ray", options=RAY)
    predict_files(run, str(folder), str(empty))
    # A copy of the run is the same model.
    shutil.copytree(run, tmp_path / "copy")
    predict_files(tmp_path / "copy", str(folder), str(out))


def test_a_name_too_long_for_parts_is_one_failed_file(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    longest, too_long = "a" * 234 + ".npy", "b" * 235 + ".npy"
    for name in (longest, too_long):
        np.save(folder / name, tiny.blobs()[0])
    with pytest.raises(UserError, match=r"1 of 2 .*bbb\.npy \(its name has 239 bytes; accepted"):
        predict_files(run, str(folder), str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert [file["file"] for file in manifest["files"]] == [longest]
    assert len(list((out / "parts").iterdir())) == 1


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0])
def test_leases_of_no_length_are_refused(run, many, tmp_path, seconds):
    with pytest.raises(UserError, match=r"lease_seconds is .*; accepted: a number of sec"):
        predict_files(
            run, str(many[0]), str(tmp_path / "out"),
            engine_name="ray", options=RAY._replace(lease_seconds=seconds),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


# With Ray.

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs pip install "jkmeans[ray]"'
)
RAY = engine.Options(address="local", workers=2, gpus_per_worker=-1, lease_seconds=60)


def test_without_ray_the_extra_is_named(run, many, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "jkmeans\[ray\]"'):
        predict_files(run, str(many[0]), str(tmp_path / "out"), engine_name="ray", options=RAY)


def bits_beside_one_process(program, run, tmp_path, *, n_files, n_blocks):
    """Runs a program that predicts on Ray; what it wrote has the bits of one process.

    Returns:
      What it said in the end, and all that it said to stderr.
    """
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(n_files):
        np.save(folder / f"{i}.npy", tiny.blobs(n=n_blocks * MOST_ROWS + 100 * i, seed=i)[0])
    # Not as in these tests, whose compiler does not optimise: as users run it.
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run), str(folder), str(tmp_path / "ray")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = [
        sys.executable, "-m", "experiments.predict", "--embeddings", "--merge",
        f"--workdir={run}", f"--input={folder}", f"--output={tmp_path / 'alone'}",
    ]  # fmt: skip
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("labels.npy", "distances.npy", "embeddings.npy"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


# The program of the test below: it kills a worker and then the master, and says what it saw.
_KILLS = """
import json, os, signal, sys
from jkmeans.dispatch import Options, predict_files

workdir, folder, out = sys.argv[1:]
killed, seen = [], {}

def watch(status):
    for name, process in status.workers.items():
        seen[name] = process.pid
    at_work = [name for name in status.running if name in status.workers]
    if status.ended or status.shards_done < 2 + 3 * len(killed):
        return
    if not killed and at_work:
        os.kill(status.workers[at_work[0]].pid, signal.SIGKILL)
        killed.append(at_work[0])
    elif len(killed) == 1:
        os.kill(status.process.pid, signal.SIGKILL)
        killed.append("master")

def last(status):
    watch(status)
    global end
    end = status

options = Options("local", 2, -1, 60)
predict_files(workdir, folder, out, embeddings=True, merge=True, engine_name="ray",
              options=options, shard_rows=1024, watch=last)
print(json.dumps({"killed": killed, "life": end.life, "workers": len(seen)}))
"""


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_and_a_killed_master_change_no_bit(run, tmp_path):
    said, errors = bits_beside_one_process(_KILLS, run, tmp_path, n_files=4, n_blocks=6)
    assert said["killed"][1] == "master"
    assert said["life"] == 2
    assert said["workers"] >= 2  # The one that takes a place may begin when all is done.
    assert "its shard goes to the others" in errors
    assert "the master died and has come back from its journal" in errors
    names = [path.name for path in (tmp_path / "ray" / "parts").iterdir()]
    assert len(names) == 4 * 7 - 1
    assert not [name for name in names if name.startswith(".")]


_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from jkmeans.dispatch import predict_files
from jkmeans.dispatch.engine import Options

workdir, folder, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False)
workers, lost = {}, []

def watch(status):
    node = workers.get("node")
    workers.setdefault("most before", 0)
    if node is None:
        workers["most before"] = max(workers["most before"], len(status.workers))
        if status.shards_done >= 2:
            workers["node"] = cluster.add_node(num_cpus=2)
    elif not lost:
        workers["most after"] = max(workers.get("most after", 0), len(status.workers))
        if workers["most after"] == 3 and not status.ended:
            cluster.remove_node(node, allow_graceful=False)
            lost.append(status.shards_done)

predict_files(workdir, folder, out, embeddings=True, merge=True, engine_name="ray",
              options=Options("auto", 0, -1, 60), shard_rows=1024, watch=watch)
print(json.dumps({k: workers.get(k) for k in ("most before", "most after")} | {"lost": lost}))
"""


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_grows_and_loses_a_node_changes_no_bit(run, tmp_path):
    """Two nodes of a Ray cluster, on one machine: one comes while work goes on, and dies."""
    said, _ = bits_beside_one_process(_NODES, run, tmp_path, n_files=8, n_blocks=400)
    assert (said["most before"], said["most after"], len(said["lost"])) == (1, 3, 1), said
