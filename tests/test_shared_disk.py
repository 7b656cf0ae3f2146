"""Snapshots and checkpoints on a network filesystem that lags, lies and crashes: the sealed bytes, or an error in time.

`tests/lagfs.py` is the filesystem; everything above it is the real code.
"""

import ast
import errno
import gc
import itertools
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import disk, snapshot
from protocol.errors import StorageError
from protocol.snapshot import Corrupt, Manifest, hash_file, listed, open_sealed, remove, seal, staging, write_hashed
from tests.lagfs import Broken, LagFS, Refused, Stale

PATIENCE_S = 120.0
KEY = b"key of this run"
DATA = bytes(range(256)) * 40
NAMES = ["manifest.json", "manifest.hmac", "model.safetensors", "state.json"]


def publish(parent: Path, name: str = "c00000007.i0002", data: bytes = DATA) -> tuple[Path, str]:
    """A checkpoint with all that there is: a hashed file, one of another library in its own directory, a signature."""
    with staging(parent, name) as aside:
        (aside / "ds").mkdir()
        (aside / "ds" / "rank0.pt").write_bytes(data[::-1])
        files = {
            "model.safetensors": write_hashed(aside / "model.safetensors", data),
            "state.json": write_hashed(aside / "state.json", b"{}"),
            "ds/rank0.pt": hash_file(aside / "ds" / "rank0.pt"),
        }
        manifest = Manifest(
            kind="checkpoint", run_id="r", id=name, parent=None, step=7, incarnation=2, model="m", files=files
        )
        return parent / name, seal(aside, parent / name, manifest, KEY)


def read(path: Path, sha256: str | None, patience_s: float = PATIENCE_S) -> bytes:
    """All of it, as a sampler (by the announced hash) and a trainer (by the signature) read."""
    sealed = open_sealed(path, sha256, KEY, patience_s)
    assert sealed.read("ds/rank0.pt") == DATA[::-1] and sealed.read("state.json") == b"{}"
    return sealed.read("model.safetensors")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> tuple[Path, str]:
    return publish(tmp_path_factory.mktemp("shared"))


# -- bytes that are not the sealed ones --------------------------------------------------------------------------


@st.composite
def damages(draw) -> tuple[str, object]:
    """A name, and what happens to the bytes of that file."""
    start, size = draw(st.integers(0, 1 << 14)), draw(st.integers(1, 300))
    junk = draw(st.binary(min_size=1, max_size=300))
    bit = draw(st.integers(0, 7))

    def flip(data: bytes) -> bytes:
        place = start % len(data)
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    kinds = [
        flip,
        lambda data: data[: start % (len(data) + 1)],  # truncated
        lambda data: data + junk,  # grown
        lambda data: data[: start % len(data)] + junk + data[start % len(data) :],  # inserted
        lambda data: data[: start % len(data)] + data[start % len(data) + size :],  # a hole
        lambda data: data[: start % len(data)] + bytes(size) + data[start % len(data) + size :],  # a block of zeros
        lambda data: junk,  # replaced
    ]
    return draw(st.sampled_from(NAMES)), draw(st.sampled_from(kinds))


@pytest.mark.fault("G4", "G5")
@given(damages(), st.booleans())
@settings(max_examples=2000, deadline=None)
def test_any_damage_to_any_file_is_noticed_or_is_none(sealed, damage, announced):
    """Whoever knows the manifest's hash, or the key, gets the sealed bytes or Corrupt."""
    path, sha256 = sealed
    name, change = damage
    sound = (path / name).read_bytes()
    try:
        (path / name).write_bytes(change(sound))
        same = (path / name).read_bytes() == sound
        try:
            assert read(path, sha256 if announced else None, 0.0) == DATA
            assert same
        except Corrupt as error:
            assert not same
            assert name in str(error) or "not signed" in str(error)
    finally:
        (path / name).write_bytes(sound)


@pytest.mark.fault("G5")
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_shard_replaced_by_what_is_no_file_is_refused_at_once(tmp_path, make):
    """A pipe without a writer would be opened for ever; a refusal must leave no descriptor open."""
    path, sha256 = publish(tmp_path)
    (path / "model.safetensors").unlink()
    make(path / "model.safetensors")
    caught: list[Exception] = []

    def reader() -> None:
        try:
            read(path, sha256, 0.0)
        except Exception as error:
            caught.append(error)

    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    thread.join(20)
    assert isinstance(caught[0], Corrupt) and "model.safetensors" in str(caught[0])
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.fault("G3")
def test_a_half_written_directory_of_another_tool_is_ignored(tmp_path):
    """Shards under a right name, and no manifest: it is listed nowhere, opened by nobody, and in nobody's way."""
    half = tmp_path / "c00000009.i0002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(DATA)
    path, sha256 = publish(tmp_path)
    assert listed(tmp_path) == [path]
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        open_sealed(half)
    with pytest.raises(StorageError, match=r"c00000009\.i0002: Directory not empty"):
        publish(tmp_path, half.name)
    assert read(path, sha256, 0.0) == DATA


@pytest.mark.fault("G7")
def test_a_name_keeps_its_first_contents_whatever_is_published_under_it_again(tmp_path):
    """So what a client has cached of a name cannot be stale."""
    path, sha256 = publish(tmp_path)
    with pytest.raises(StorageError, match="Directory not empty"):
        publish(tmp_path, data=DATA[1:])
    assert read(path, sha256, 0.0) == DATA
    assert list(tmp_path.iterdir()) == [path]


# -- a view that lags --------------------------------------------------------------------------------------------


@pytest.mark.fault("G6")
@given(st.floats(0, 240))
@settings(deadline=None)
def test_what_was_announced_is_waited_for_up_to_two_minutes(sealed, delay_s):
    path, sha256 = sealed
    lag = LagFS(visible_at=delay_s)
    with lag.mounted(snapshot, disk):
        try:
            assert read(path, sha256) == DATA
            assert delay_s <= lag.clock.now <= PATIENCE_S
        except Corrupt as error:
            assert "No such file" in str(error)
            assert delay_s > PATIENCE_S - 5.0 and lag.clock.now <= PATIENCE_S  # it asks every five seconds


@pytest.mark.fault("G6", "G8")
@given(
    st.dictionaries(
        st.sampled_from([*NAMES, "rank0.pt"]),
        st.lists(
            st.one_of(
                st.builds(Refused, st.sampled_from([errno.ENOENT, errno.ESTALE, errno.EIO, errno.EAGAIN])),
                st.builds(Broken, st.sampled_from([errno.ESTALE, errno.EIO]), st.integers(0, 2000)),
            ),
            max_size=8,
        ),
    ),
    st.integers(100, 5000),
)
@settings(deadline=None)
def test_errors_in_mid_read_and_short_reads_heal(sealed, opens, chunk):
    path, sha256 = sealed
    lag = LagFS(opens=opens, chunk=chunk)
    with lag.mounted(snapshot, disk):
        assert read(path, sha256) == DATA
    assert not any(lag.opens.values())


@pytest.mark.fault("G8")
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT, errno.EIO])
def test_a_file_that_never_comes_back_is_an_error_in_time_and_not_the_end(sealed, number):
    path, sha256 = sealed
    lag = LagFS(opens={"model.safetensors": [Broken(number, 100)] * 1000})
    with lag.mounted(snapshot, disk):
        with pytest.raises(Corrupt, match=os.strerror(number)):
            read(path, sha256)
        assert lag.clock.now <= PATIENCE_S
        lag.opens.clear()
        assert read(path, sha256) == DATA


@pytest.mark.fault("G4", "G8")
@given(st.sampled_from(["model.safetensors", "state.json"]), st.lists(st.binary(max_size=99), max_size=8))
@settings(deadline=None)
def test_a_stale_read_heals_and_wrong_bytes_are_read_again_so_many_times_only(sealed, name, views):
    path, sha256 = sealed
    wrong = [view for view in views if view != b"{}"]
    lag = LagFS(opens={name: [Stale(view) for view in wrong]})
    with lag.mounted(snapshot, disk):
        if len(wrong) <= snapshot.REREADS:
            assert read(path, sha256) == DATA
            return
        with pytest.raises(Corrupt, match=f"{name}: its bytes are not the sealed ones"):
            read(path, sha256)
        assert lag.opened.count(name) == 1 + snapshot.REREADS


@pytest.mark.fault("G8")
@pytest.mark.parametrize("room", ["protocol", "policy", "sampler", "trainer"])
def test_no_file_is_memory_mapped(room):
    """A mapped file that shrinks ends the process (SIGBUS); a file that is read raises an error."""
    for path in sorted(Path(room).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {getattr(node, "id", getattr(node, "attr", getattr(node, "name", ""))) for node in nodes}
        assert not names & {"mmap", "memmap", "safe_open", "load_file"}, path


# -- renames, removals, crashes ----------------------------------------------------------------------------------


@pytest.mark.fault("G9")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ETIMEDOUT, errno.ESTALE])
def test_a_rename_whose_reply_was_lost_has_succeeded(tmp_path, number):
    lag = LagFS(lost_replies=[number])
    with lag.mounted(snapshot, disk):
        path, sha256 = publish(tmp_path)
    assert not lag.lost_replies and read(path, sha256, 0.0) == DATA


@pytest.mark.fault("G9")
def test_a_rename_that_failed_is_no_success(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lag = LagFS()
    lag.rename = fails
    with lag.mounted(snapshot, disk), pytest.raises(StorageError, match="Input/output error"):
        publish(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("G10")
@given(st.integers(0, 12))
@settings(deadline=None)
def test_a_reader_that_loses_a_race_against_removal_has_an_error_or_the_right_bytes(tmp_path_factory, moment):
    """The snapshot goes away before the reader's `moment`-th opening; no half of it passes for a whole."""
    path, sha256 = publish(tmp_path_factory.mktemp("race"))
    lag = LagFS()
    countdown = itertools.count(-moment)
    really = lag.open
    lag.open = lambda *arguments: (next(countdown) == 0 and remove(path), really(*arguments))[1]
    with lag.mounted(snapshot, disk):
        if moment < 5:
            with pytest.raises(Corrupt, match="No such file"):
                read(path, sha256)
        else:
            assert read(path, sha256) == DATA
    assert path.exists() == (moment >= 5)


@pytest.mark.fault("G10")
def test_a_snapshot_that_a_sampler_says_it_uses_is_not_removed(tmp_path):
    from protocol.recipe import TrainerTable
    from protocol.rundir import RunDir
    from trainer.retention import tidy

    rundir = RunDir(tmp_path)
    rundir.make()
    for step in range(5):
        publish(rundir.snapshots, f"s{step:08d}.i0001")
    tidy(rundir, TrainerTable(max_staleness=0), {"s00000001.i0001"})
    assert [path.name[:9] for path in listed(rundir.snapshots)] == ["s00000001", "s00000003", "s00000004"]


@pytest.mark.fault("G11")
def test_what_was_announced_survives_a_crash_of_the_file_server(tmp_path):
    """Only what was flushed is left after the crash: every file, its name, and the name of its directory."""
    run = tmp_path / "run"
    run.mkdir()
    lag = LagFS()
    with lag.mounted(snapshot, disk):
        path, sha256 = publish(run)
        lag.crash(run, tmp_path / "after")
    assert read(tmp_path / "after" / path.name, sha256, 0.0) == DATA


@pytest.mark.fault("G11")
def test_a_file_that_is_written_atomically_survives_a_crash_too(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lag = LagFS()
    with lag.mounted(snapshot, disk):
        disk.write_atomic(run / "endpoint.json", b"here")
        lag.crash(run, tmp_path / "after")
        lag.syncs = False
        disk.write_atomic(run / "endpoint.json", b"there")
        lag.crash(run, tmp_path / "later")
    assert (tmp_path / "after" / "endpoint.json").read_bytes() == b"here"
    assert (tmp_path / "later" / "endpoint.json").read_bytes() == b"here"


def test_the_crash_of_this_filesystem_is_a_real_one(tmp_path):
    """Without fsync nothing is left, or the tests above would prove nothing."""
    run = tmp_path / "run"
    run.mkdir()
    lag = LagFS(syncs=False)
    with lag.mounted(snapshot, disk):
        path, _ = publish(run)
        lag.crash(run, tmp_path / "after")
    assert path.exists() and not list((tmp_path / "after").iterdir())
