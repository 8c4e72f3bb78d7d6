"""Checkpoints: every bit comes back, on any mesh; damage is noticed; a full disk harms nothing."""

import gc
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jkmeans import processes
from jkmeans.checkpoints import Checkpoints, DamagedError, _without_late_complaints
from jkmeans.errors import LostError, UserError
from jkmeans.methods import Clusters
from jkmeans.sharding import REPLICATED, SHARDED, make_mesh, place
from tests.test_processes import free_port


@pytest.fixture(autouse=True)
def _absl_level():
    """Checkpoints silence absl's logger; other tests should not notice."""
    logger = logging.getLogger("absl")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Tests and code of this module collect garbage often; what is there before is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Counters(NamedTuple):
    count: jax.Array
    mu: dict


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 1 / 3], np.float32)


def host_trees(value: int = 0):
    rng = np.random.default_rng(value)
    return {
        "model": {
            "parameters": {
                "encoder/0/kernel": rng.normal(size=(5, 4)).astype(np.float32),
                "encoder/10/bias": SPECIAL + np.float32(0),
            },
            "clusters": Clusters(rng.normal(size=(3, 4)).astype(np.float32)),
        },
        "training": {
            "bank": rng.normal(size=(16, 4)).astype(np.float32),
            "labels": rng.integers(-1, 3, 16).astype(np.int32),
            "optimizer": (Counters(np.int32(value), {"a": np.ones(2, np.float32)}), None),
            "key": rng.integers(0, 2**32, 2, np.uint32),
            "half": np.asarray(rng.normal(size=3), jax.numpy.bfloat16),
            "bytes": rng.integers(0, 255, 4).astype(np.uint8),
            "flag": np.array([True, False]),
        },
    }


SHARDED_FIELDS = ("bank", "labels")


def is_sharded(path) -> bool:
    return any(getattr(part, "key", None) in SHARDED_FIELDS for part in path)


def on_mesh(trees, n_devices=8):
    mesh = make_mesh(n_devices)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(leaf, mesh, SHARDED if is_sharded(path) else REPLICATED), trees
    )


def abstract(n_devices=8, trees=None):
    mesh = make_mesh(n_devices)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            np.shape(leaf),
            np.asarray(leaf).dtype,
            sharding=NamedSharding(mesh, SHARDED if is_sharded(path) else REPLICATED),
        ),
        trees or host_trees(),
    )


def save(folder, position, objective=None, keep=1, value=None):
    with Checkpoints(folder, keep=keep) as open_checkpoints:
        value = position if value is None else value
        open_checkpoints.save(position, on_mesh(host_trees(value)), {"n": position}, objective)


def load(folder, position, n_devices=8):
    with Checkpoints(folder) as open_checkpoints:
        return open_checkpoints.load(position, abstract(n_devices))


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# Round trips.


@pytest.mark.parametrize("n_devices", [8, pytest.param(2, marks=pytest.mark.slow), 1])
def test_every_bit_comes_back_on_any_mesh(tmp_path, n_devices):
    save(tmp_path, 7)
    restored = load(tmp_path, 7, n_devices)
    assert restored.position == 7
    assert_same_bits(restored.trees, host_trees(7))
    assert isinstance(restored.trees["model"]["clusters"], Clusters)
    assert isinstance(restored.trees["training"]["optimizer"][0], Counters)
    bank = restored.trees["training"]["bank"]
    assert len(bank.sharding.device_set) == n_devices
    assert bank.addressable_shards[0].data.shape == (16 // n_devices, 4)


def test_one_tree_alone(tmp_path):
    save(tmp_path, 7)
    with Checkpoints(tmp_path) as reader:
        restored = reader.load(7, {"model": abstract(2)["model"]})
    assert list(restored.trees) == ["model"]
    assert_same_bits(restored.trees["model"], host_trees(7)["model"])


def test_the_record_comes_back(tmp_path):
    record = {"config": {"a": [1, 2.5, None, "ü"]}, "results": None}
    with Checkpoints(tmp_path) as writer:
        writer.save(3, on_mesh(host_trees()), record, None)
    with Checkpoints(tmp_path) as reader:
        found = reader.record(3)
        assert {name: found[name] for name in record} == record
        assert reader.load(3, abstract()).record == found


def test_a_folder_that_is_not_there(tmp_path):
    with Checkpoints(tmp_path / "nothing") as reader:
        assert reader.positions() == []
        assert reader.best() is None
        with pytest.raises(DamagedError):
            reader.record(3)
    assert not (tmp_path / "nothing").exists()


# What is kept.


def test_newest_and_best_are_kept(tmp_path):
    objectives = {1: None, 2: 3.0, 3: 1.0, 4: 2.0, 10: 5.0, 20: None}
    expected = [[1], [1, 2], [2, 3], [3, 4], [3, 4, 10], [3, 10, 20]]
    with Checkpoints(tmp_path, keep=2) as writer:
        for (position, objective), left in zip(objectives.items(), expected, strict=True):
            writer.save(position, on_mesh(host_trees(position)), {}, objective)
            writer.wait()
            assert writer.positions() == left
        assert writer.best() == 3
    assert_same_bits(load(tmp_path, 3).trees, host_trees(3))


def test_retention_goes_on_in_a_new_process(tmp_path):
    for position, objective in {1: 1.0, 2: 2.0, 3: 3.0}.items():
        save(tmp_path, position, objective)
    with Checkpoints(tmp_path) as reader:
        assert reader.positions() == [1, 3]
        assert reader.best() == 1


def test_without_an_objective_there_is_no_best(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as reader:
        assert reader.best() is None


def test_a_save_in_progress_is_complete_on_leaving(tmp_path):
    with Checkpoints(tmp_path) as writer:
        writer.save(5, on_mesh(host_trees(5)), {}, None)
    assert writer.positions() == [5]
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_a_save_in_progress_is_complete_after_an_error_too(tmp_path):
    def fail():
        with Checkpoints(tmp_path) as writer:
            writer.save(6, on_mesh(host_trees(6)), {}, None)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert_same_bits(load(tmp_path, 6).trees, host_trees(6))


def test_a_save_does_not_see_what_happens_after(tmp_path):
    # The trainer donates its state to the next epoch while the write goes on.
    bump = jax.jit(lambda trees: jax.tree.map(lambda leaf: leaf * 0, trees), donate_argnums=0)
    tree = {"model": {"x": place(np.arange(4096.0, dtype=np.float32), make_mesh(8), SHARDED)}}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, tree, {}, None)
        jax.block_until_ready(bump(tree))
        writer.wait()
        spec = jax.ShapeDtypeStruct(
            (4096,), np.float32, sharding=NamedSharding(make_mesh(8), SHARDED)
        )
        found = writer.load(1, {"model": {"x": spec}}).trees["model"]["x"]
    np.testing.assert_array_equal(found, np.arange(4096.0))


# Damage.


@pytest.fixture
def _dropped():
    """Collects, within this test, the tasks that Orbax drops where it refuses something."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield
        time.sleep(0.05)  # Reads under way end in an event loop that is closed.
        gc.collect()


def data_files(folder):
    return [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]


def largest_file(folder):
    return max(data_files(folder), key=lambda p: (p.stat().st_size, p.name))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(bytes(content))


def change_record(folder):
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('\\"n\\": 2', '\\"n\\": 3'))
    assert '\\"n\\": 3' in path.read_text()


DAMAGE = {
    "a folder without files": lambda p: (shutil.rmtree(p), p.mkdir()),
    "no model": lambda p: shutil.rmtree(p / "model"),
    "no training": lambda p: shutil.rmtree(p / "training"),
    "no manifest": lambda p: (p / "model" / "manifest.ocdbt").unlink(),
    "no tree": lambda p: (p / "model" / "_METADATA").unlink(),
    "no record": lambda p: (p / "_CHECKPOINT_METADATA").unlink(),
    "garbage as record": lambda p: (p / "_CHECKPOINT_METADATA").write_bytes(b"\xff{"),
    "empty record": lambda p: (p / "_CHECKPOINT_METADATA").write_text("{}"),
    "cut record": lambda p: truncate(p / "_CHECKPOINT_METADATA"),
    "changed record": change_record,
    "cut model": lambda p: [truncate(f) for f in data_files(p / "model")],
    "cut training": lambda p: [truncate(f) for f in data_files(p / "training")],
    "flipped model": lambda p: [flip(f) for f in data_files(p / "model")],
    "flipped training": lambda p: [flip(f) for f in data_files(p / "training")],
    "cut manifest": lambda p: truncate(p / "training" / "manifest.ocdbt"),
}

# Those that are much like one that is left; slow tests.
LIKE_ANOTHER = {
    "no training", "no tree", "garbage as record", "empty record", "cut training",
    "flipped training", "cut manifest",
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 1.0, keep=2)
    save(folder, 2, 0.5, keep=2)
    return folder


@pytest.mark.usefixtures("_dropped")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=pytest.mark.slow) if d in LIKE_ANOTHER else d for d in DAMAGE],
)
def test_damage_is_noticed_and_the_one_before_is_whole(two, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    DAMAGE[damage](folder / "2")
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.positions() == [1, 2]
        with pytest.raises(DamagedError, match=f"checkpoint {folder / '2'} cannot be read: .") as e:
            checkpoints.load(2, abstract())
        assert "\n" not in str(e.value)
        checkpoints.best()  # Neither this nor a further save is stopped by it.
        assert checkpoints.set_aside(2) == folder / "damaged-2"
        assert checkpoints.positions() == [1]
        assert_same_bits(checkpoints.load(1, abstract()).trees, host_trees(1))
        checkpoints.save(3, on_mesh(host_trees(3)), {}, None)
        checkpoints.wait()
        assert checkpoints.positions() == [1, 3]
        assert (folder / "damaged-2").is_dir()
        assert_same_bits(checkpoints.load(3, abstract()).trees, host_trees(3))


def test_an_array_that_reads_well_but_is_another(two, tmp_path):
    """What no file format can notice: the arrays of one checkpoint under the record of another."""
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    shutil.rmtree(folder / "2" / "model")
    shutil.copytree(folder / "1" / "model", folder / "2" / "model")
    with pytest.raises(DamagedError, match="the checksum of model is wrong"):
        load(folder, 2)


def test_best_passes_over_a_damaged_record(two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    with Checkpoints(folder) as reader:
        assert reader.best() == 2
        (folder / "2" / "_CHECKPOINT_METADATA").write_text("{")
        assert reader.best() == 1


def test_setting_aside_twice(two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    with Checkpoints(folder) as reader:
        names = []
        for _ in range(3):
            names.append(reader.set_aside(2).name)
            shutil.copytree(two / "2", folder / "2")
    assert names == ["damaged-2", "damaged-2-2", "damaged-2-3"]


def other_shape(trees):
    trees["model"]["clusters"] = Clusters(np.zeros((5, 4), np.float32))


def other_type(trees):
    trees["model"]["clusters"] = Clusters(np.zeros((3, 4), np.int32))


def other_name(trees):
    trees["model"]["parameters"]["encoder/1/bias"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_shape, r"has float32\[3, 4\] as model/clusters/centroids.* has float32\[5, 4\];"),
        (other_type, r"has float32\[3, 4\] as model/clusters/centroids.* has int32\[3, 4\];"),
        (other_name, r"has nothing as model/parameters/encoder/1/bias.* has float32\[3\];"),
    ],
)
def test_a_checkpoint_of_another_network_is_not_damaged(two, change, said):
    """Else a user who edits the network would see all checkpoints set aside."""
    trees = host_trees()
    change(trees)
    with Checkpoints(two) as reader, pytest.raises(UserError, match=said):
        reader.load(2, abstract(trees=trees))


# Saves that were cut, and those of others.


def test_a_leftover_temporary_folder_is_never_read_and_then_removed(two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    leftover = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", leftover)
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.positions() == [1, 2]
        checkpoints.best()
        checkpoints.load(2, abstract())
        # It may be a save in progress of another process, such as a run that is being evaluated.
        assert leftover.exists()
        checkpoints.save(3, on_mesh(host_trees(3)), {}, None)
        checkpoints.wait()
        assert not leftover.exists()
        assert checkpoints.positions() == [1, 2, 3]


def test_reading_writes_nothing(two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    before = {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}
    with Checkpoints(folder) as reader:
        reader.load(reader.best(), abstract())
    assert {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]} == before


_KILLED = """
import sys
from tests import conftest, test_checkpoints as t
from jkmeans.checkpoints import Checkpoints
import contextlib, os, pathlib, signal, threading
folder = pathlib.Path(sys.argv[1])
def kill_inside():
    # The first temporary folder that has data in it.
    while True:
        with contextlib.suppress(OSError):
            if any(p.stat().st_size for p in folder.glob("*tmp*/**/d/*")):
                break
    os.kill(os.getpid(), signal.SIGKILL)
with Checkpoints(folder, keep=3) as writer:
    writer.save(1, t.on_mesh(t.host_trees(1)), {}, None)
    writer.wait()
    trees = t.host_trees(2)
    trees["training"]["bank"] = t.np.ones((2**21, 4), t.np.float32)
    threading.Thread(target=kill_inside, daemon=True).start()
    writer.save(2, t.on_mesh(trees), {}, None)
    writer.wait()
print("survived")
"""


def test_a_process_killed_inside_a_save(tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any("tmp" in p.name for p in tmp_path.iterdir())
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.positions() == [1]
        assert_same_bits(checkpoints.load(1, abstract()).trees, host_trees(1))
        checkpoints.save(2, on_mesh(host_trees(2)), {}, None)
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# Disks.


def test_a_disk_without_room_is_noticed_before_the_write(two, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with (
        Checkpoints(folder) as writer,
        pytest.raises(UserError, match=r"the disk of .* is full, .* the same command again"),
    ):
        writer.save(3, on_mesh(host_trees(3)), {}, None)
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    assert_same_bits(load(folder, 2).trees, host_trees(2))


@pytest.fixture
def small_disk(tmp_path):
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_a_disk_that_fills_during_the_write(small_disk, monkeypatch):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    usage = shutil.disk_usage(folder)
    trees = host_trees(2)
    trees["training"]["bank"] = np.random.default_rng(0).normal(size=(2**19, 4)).astype(np.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**40))

    def write():
        with Checkpoints(folder) as writer:
            writer.save(2, on_mesh(trees), {}, None)

    with pytest.raises(UserError, match=r"the disk of .* is full"):
        write()
    monkeypatch.undo()
    with Checkpoints(folder) as reader:
        assert reader.positions() == [1]
    assert_same_bits(load(folder, 1).trees, host_trees(1))
    save(folder, 3)  # Room was made: the cut save is cleaned up.
    assert_same_bits(load(folder, 3).trees, host_trees(3))


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_who_cannot_write_its_part_does_not_wait_for_the_others(failing, tmp_path):
    """Orbax has all processes wait for each other for ten minutes."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.saving", *map(str, (i, 2, port, tmp_path, failing))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        out, errors = started[failing].communicate(timeout=120)
    finally:
        for process in started:
            process.kill()
            with process:  # Closes its pipes.
                pass
    assert started[failing].returncode == 2, errors
    assert "saved\nrefused: the disk of " in out, errors
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["1"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "checkpoints") as writer,
        pytest.raises(UserError, match="cannot write checkpoints to"),
    ):
        writer.save(1, on_mesh(host_trees()), {}, None)


@pytest.mark.parametrize(("n_processes", "kind"), [(2, LostError), (1, UserError)])
def test_a_save_that_times_out_is_a_loss_where_there_are_others(
    tmp_path, monkeypatch, n_processes, kind
):
    class OutOfPatience:
        """A save at whose barrier Orbax has waited in vain."""

        def result(self, timeout=None):
            raise TimeoutError("Barrier timed out")

    monkeypatch.setattr(processes, "count", lambda: n_processes)
    writer = Checkpoints(tmp_path)
    writer._pending = OutOfPatience()
    with pytest.raises(Exception, match=r"Barrier timed out|cannot write") as caught:
        writer.wait()
    assert type(caught.value) is kind


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with Checkpoints(tmp_path) as writer, pytest.raises(TypeError):
        writer.save(1, on_mesh(host_trees()), {"not JSON": object()}, None)
    assert list(tmp_path.iterdir()) == []


def test_reads_that_nobody_waits_for_end_in_silence(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable))

    class Data:
        def __await__(self):
            yield

    async def read():
        try:
            await Data()
        except BaseException as error:
            raise ValueError("while reading") from error

    class Other:
        def __del__(self):
            raise ValueError("of something else")

    reading, other = read(), Other()
    reading.send(None)
    with pytest.raises(OSError, match="cut"), _without_late_complaints():
        raise OSError("cut")
    del reading
    assert not heard
    del other
    assert len(heard) == 1


def test_threads_save_and_load_at_once(tmp_path):
    """Orbax has one number for what a process does now; mixed up, saves wait for ever."""
    state = on_mesh(host_trees(), 1)
    with Checkpoints(tmp_path / "there") as checkpoints:
        checkpoints.save(1, state, {}, None)
    done, failed = [], []

    def save(number: int) -> None:
        with Checkpoints(tmp_path / str(number), keep=1) as checkpoints:
            for position in range(1, 9):
                checkpoints.save(position, state, {}, None)

    def load(number: int) -> None:
        for _ in range(8):
            Checkpoints(tmp_path / "there").load(1, abstract(1))

    def note(call, number: int) -> None:
        try:
            call(number)
            done.append(number)
        except Exception as error:
            failed.append(error)

    calls = [save, load] * 3
    # Daemons: pytest would wait for one that hangs.
    threads = [
        threading.Thread(target=note, args=(call, number), daemon=True)
        for number, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert sorted(done) == list(range(len(calls)))
