"""Two machines and one network filesystem: what one does through its own client, the other sees late, stale or broken.

`tests/nfs` is the filesystem: a server directory and clients with the caches of Linux's NFS client, which never expire
here unless a test says so. Everything above it is the real code.
"""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from doctor.history import History
from protocol.disk import write_atomic
from protocol.errors import StorageError, Superseded, UserError
from protocol.failure import failure, write_failure
from protocol.keys import open_keys
from protocol.metrics import MetricsWriter, Tail
from protocol.recipe import Recipe, TrainerTable
from protocol.resolve import dump
from protocol.rundir import Endpoint, RunDir, resolve_recipe
from protocol.snapshot import Corrupt, listed, open_sealed, sweep
from tests.nfs.mount import Mount, mounted, why_not
from tests.test_shared_disk import DATA, publish, read
from trainer.retention import tidy

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
NEVER = {"acregmin": 600.0, "acregmax": 600.0, "acdirmin": 600.0, "acdirmax": 600.0, "cto": True, "writeback": 600.0}
LOST = ["EIO", "ETIMEDOUT", "RETRY"]
NAME = "s00000007.i0002"


@dataclass(frozen=True)
class Disk:
    """One directory, as the server has it, and as two machines see it. The north trains, the south samples."""

    server: Path
    north: Path
    south: Path
    northern: Mount
    southern: Mount


@pytest.fixture(scope="module")
def mounts(tmp_path_factory) -> Iterator[tuple[Path, Mount, Mount]]:
    place = tmp_path_factory.mktemp("nfs")
    (place / "server").mkdir()
    with mounted(place / "server", place / "north") as north, mounted(place / "server", place / "south") as south:
        yield place / "server", north, south


@pytest.fixture
def disk(mounts, request) -> Iterator[Disk]:
    """An empty directory of the server, known to both."""
    server, north, south = mounts
    name = f"t{len(os.listdir(server))}"
    north.set(**NEVER), south.set(**NEVER)
    (server / name).mkdir()
    assert all(name in os.listdir(mount.path) for mount in (north, south))
    yield Disk(server / name, north.path / name, south.path / name, north, south)
    north.set(squash=False, slow=0.0), south.set(squash=False, slow=0.0)
    assert not [*north.pending(), *south.pending()], "a fault that never came"


def rundir(disk: Disk) -> tuple[RunDir, RunDir]:
    """A run directory that both machines know."""
    north, south = RunDir(disk.north), RunDir(disk.south)
    north.make(), south.make()
    return north, south


# -- the filesystem itself: without these, the tests below would prove nothing ----------------------------------------


def test_a_name_that_was_absent_stays_absent_until_its_directory_is_listed_or_expires(disk):
    assert not os.listdir(disk.south) and not (disk.south / "here").exists()
    (disk.north / "here").write_text("now")
    assert not (disk.south / "here").exists()
    disk.southern.set(cto=False)
    assert "here" not in os.listdir(disk.south)  # nocto: the old listing
    disk.southern.set(cto=True)
    assert "here" in os.listdir(disk.south) and (disk.south / "here").read_text() == "now"


def test_what_is_written_is_seen_elsewhere_when_it_is_closed_and_a_removed_file_is_stale(disk):
    with (disk.north / "log").open("wb", buffering=0) as file:
        file.write(b"one\n")
        assert (disk.north / "log").stat().st_size == 4 and (disk.south / "log").read_bytes() == b""
    assert (disk.south / "log").read_bytes() == b"one\n"
    with (disk.south / "log").open("rb", buffering=0) as file:
        (disk.north / "log").unlink()
        with pytest.raises(OSError, match="Stale"):
            file.read()


def test_an_open_file_is_given_its_size_before_it_is_written_as_safetensors_does(disk):
    with (disk.north / "f").open("wb", buffering=0) as file:
        file.truncate(100)
        assert (disk.north / "f").stat().st_size == 100
        file.write(b"data")
        file.truncate(2)
    assert (disk.server / "f").read_bytes() == (disk.south / "f").read_bytes() == b"da"


def test_a_file_that_is_open_here_keeps_its_directory_from_being_removed(disk):
    (disk.north / "d").mkdir()
    (disk.north / "d" / "f").write_bytes(b"data")
    with (disk.north / "d" / "f").open("rb", buffering=0) as file:
        (disk.north / "d" / "f").unlink()
        assert [name[:4] for name in os.listdir(disk.south / "d")] == [".nfs"]
        with pytest.raises(OSError) as caught:
            (disk.north / "d").rmdir()
        assert caught.value.errno == errno.ENOTEMPTY and file.read() == b"data"


def test_after_a_lost_reply_the_old_name_still_leads_to_what_was_renamed(disk):
    (disk.north / "old").mkdir()
    (disk.north / "old" / "f").write_bytes(b"data")
    disk.northern.lose("rename")
    with pytest.raises(OSError, match="Input/output"):
        os.rename(disk.north / "old", disk.north / "new")
    assert (disk.north / "old" / "f").read_bytes() == b"data" and os.listdir(disk.server) == ["new"]


# -- snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("G6", "G16")
def test_what_was_announced_is_read_at_once_where_nobody_looked_for_it_before(disk):
    north, south = rundir(disk)
    path, sha256 = publish(north.snapshots, NAME)
    assert read(south.snapshots / path.name, sha256, 0.0) == DATA


@pytest.mark.fault("G6", "G16")
def test_what_was_looked_for_too_early_is_read_when_the_directory_expires(disk):
    north, south = rundir(disk)
    assert not (south.snapshots / NAME).exists()
    path, sha256 = publish(north.snapshots, NAME)
    with pytest.raises(Corrupt, match="No such file"):
        open_sealed(south.snapshots / NAME, sha256)
    waiting = threading.Timer(0.3, lambda: disk.southern.expire())
    waiting.start()
    assert read(south.snapshots / path.name, sha256, 10.0) == DATA
    waiting.join()


@pytest.mark.fault("G9", "G17")
@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize("op", ["rename", "mkdir"])
def test_a_snapshot_whose_replies_were_lost_is_whole_and_nothing_lies_beside_it(disk, op, error):
    """The writer's client goes on to find the snapshot under the name aside, which the writer removes at the end."""
    north, south = rundir(disk)
    disk.northern.lose(op, "*.tmp-*" if op == "mkdir" else NAME, error)
    path, sha256 = publish(north.snapshots, NAME)
    assert read(path, sha256, 0.0) == DATA and read(south.snapshots / NAME, sha256, 0.0) == DATA
    assert os.listdir(disk.server / "snapshots") == [NAME]


@pytest.mark.fault("G9")
def test_a_snapshot_that_was_not_renamed_is_left_out_and_the_next_one_is_written(disk):
    north, south = rundir(disk)
    disk.northern.refuse("rename", NAME, "ETIMEDOUT")
    with pytest.raises(StorageError, match="timed out"):
        publish(north.snapshots, NAME)
    assert not os.listdir(disk.server / "snapshots")
    _path, sha256 = publish(north.snapshots, NAME)
    assert read(south.snapshots / NAME, sha256, 0.0) == DATA


@pytest.mark.fault("G1", "G18")
@pytest.mark.parametrize(("op", "error"), [("fsync", "ENOSPC"), ("fsync", "EDQUOT"), ("flush", "EDQUOT")])
def test_a_full_disk_that_is_told_late_leaves_nothing_half_written(disk, op, error):
    """A client says it when the data goes to the server, not when it is written. `flush` is what close does."""
    north, _south = rundir(disk)
    disk.northern.refuse(op, "rank0.pt" if op == "flush" else "model.safetensors", error)
    with pytest.raises(StorageError) as caught:
        publish(north.snapshots, NAME)
    assert os.strerror(getattr(errno, error)) in str(caught.value) and not os.listdir(disk.server / "snapshots")
    with pytest.raises(StorageError, match=os.strerror(getattr(errno, error))):
        disk.northern.refuse("fsync", "*endpoint*", error)
        north.write_endpoint(Endpoint(address="a", incarnation=1, host="h"))
    assert "endpoint.json" not in os.listdir(disk.server) and not list(disk.server.glob(".tmp-*"))


@pytest.mark.fault("G18")
@pytest.mark.parametrize("error", ["EINVAL", "ENOTSUP"])
def test_a_filesystem_that_cannot_flush_a_directory_is_no_full_disk(disk, error):
    north, south = rundir(disk)
    disk.northern.refuse("fsyncdir", error=error, times=3)
    _path, sha256 = publish(north.snapshots, NAME)
    assert read(south.snapshots / NAME, sha256, 0.0) == DATA
    disk.northern.refuse("fsyncdir", error="EIO")
    with pytest.raises(StorageError, match="Input/output"):
        write_atomic(north.path / "x", b"")


@pytest.mark.fault("G8", "G10", "G19")
def test_a_snapshot_that_is_removed_elsewhere_is_an_error_and_never_half_of_one(disk):
    north, south = rundir(disk)
    for step in range(4):
        _path, sha256 = publish(north.snapshots, f"s{step:08d}.i0002")
    oldest = open_sealed(south.snapshots / "s00000000.i0002")
    assert oldest.read("state.json") == b"{}"
    tidy(north, TrainerTable(max_staleness=0), set())
    with pytest.raises(Corrupt, match=r"No such file|Stale"):
        oldest.read("model.safetensors")
    newest = listed(south.snapshots)[-1]
    assert read(newest, sha256, 0.0) == DATA and len(listed(south.snapshots)) == 2


@pytest.mark.fault("G17")
@pytest.mark.parametrize("error", LOST)
def test_a_removal_whose_reply_was_lost_leaves_nothing(disk, error, caplog):
    north, _south = rundir(disk)
    for step in range(3):
        publish(north.snapshots, f"s{step:08d}.i0002")
    disk.northern.lose("rename", "s00000000.i0002", error)
    tidy(north, TrainerTable(max_staleness=0), set())
    assert sorted(os.listdir(disk.server / "snapshots")) == ["s00000001.i0002", "s00000002.i0002"]
    assert not caplog.records


@pytest.mark.fault("G19")
def test_what_cannot_be_removed_while_it_is_read_is_swept_at_the_next_start(disk):
    north, south = rundir(disk)
    for step in range(3):
        publish(north.snapshots, f"s{step:08d}.i0002")
    with (north.snapshots / "s00000000.i0002" / "model.safetensors").open("rb", buffering=0) as file:
        tidy(north, TrainerTable(max_staleness=0), set())
        left = [name for name in os.listdir(disk.server / "snapshots") if name.startswith(".del-")]
        assert len(left) == 1 and len(listed(north.snapshots)) == len(listed(south.snapshots)) == 2
        assert file.read() == DATA
    while any((disk.server / "snapshots").glob(".del-*/.nfs*")):  # the kernel tells the client of a close by and by
        time.sleep(0.01)
    sweep(north.snapshots, 3)
    assert len(os.listdir(disk.server / "snapshots")) == 2


@pytest.mark.fault("G8")
@pytest.mark.parametrize(("op", "error"), [("open", "ESTALE"), ("read", "EIO"), ("read", "ESTALE")])
def test_errors_of_the_mount_heal(disk, op, error):
    north, south = rundir(disk)
    _path, sha256 = publish(north.snapshots, NAME)
    disk.southern.refuse(op, "model.safetensors", error, times=2)
    assert read(south.snapshots / NAME, sha256, 10.0) == DATA


@pytest.mark.fault("G20")
def test_a_server_that_is_away_is_waited_for(disk):
    north, south = rundir(disk)
    _path, sha256 = publish(north.snapshots, NAME)
    began = time.monotonic()
    disk.southern.away(1.0)
    assert read(south.snapshots / NAME, sha256, 0.0) == DATA
    assert time.monotonic() - began > 0.9


# -- what two machines find each other by ----------------------------------------------------------------------------


@pytest.mark.fault("G16")
def test_an_endpoint_is_seen_at_once_also_where_it_was_looked_for_before_and_when_it_moves(disk):
    north, south = rundir(disk)
    assert south.read_endpoint() is None and not (south.path / "endpoint.json").exists()
    for number in (1, 2, 3):
        north.write_endpoint(Endpoint(address=f"tcp://{number}", incarnation=number, host="north"))
        found = south.read_endpoint()
        assert found and found.incarnation == number


@pytest.mark.fault("G17")
@pytest.mark.parametrize("error", LOST)
def test_an_endpoint_whose_reply_was_lost_was_written(disk, error):
    north, south = rundir(disk)
    for number in (1, 2):
        disk.northern.lose("rename", "endpoint.json", error)
        north.write_endpoint(Endpoint(address="a", incarnation=number, host="north"))
        assert south.read_endpoint().incarnation == number
    assert not list(disk.server.glob(".tmp-*"))


@pytest.mark.fault("G17")
def test_an_endpoint_that_could_not_be_written_leaves_the_old_one(disk):
    north, south = rundir(disk)
    north.write_endpoint(Endpoint(address="a", incarnation=1, host="north"))
    disk.northern.refuse("rename", "endpoint.json", "EIO")
    with pytest.raises(StorageError, match="Input/output"):
        north.write_endpoint(Endpoint(address="b", incarnation=2, host="north"))
    assert south.read_endpoint().incarnation == 1


@pytest.mark.fault("H3", "G16")
@pytest.mark.parametrize("cto", [True, False])
def test_incarnations_claimed_on_two_machines_are_never_the_same(disk, cto):
    """Exclusive creation is decided by the server, whatever the listings say."""
    north, south = rundir(disk)
    assert north.newest_incarnation() == south.newest_incarnation() == 0
    disk.northern.set(cto=cto), disk.southern.set(cto=cto)
    claimed = [which.claim_incarnation() for which in (north, south, south, north, south, north)]
    assert claimed == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault("H3", "G17")
def test_a_claim_whose_reply_was_lost_is_followed_by_another_one(disk):
    north, south = rundir(disk)
    disk.northern.lose("create", "1", "RETRY")
    assert north.claim_incarnation() == 2
    disk.northern.lose("create", "3", "EIO")
    with pytest.raises(StorageError, match="incarnations/3"):
        north.claim_incarnation()
    assert south.claim_incarnation() == 4


@pytest.mark.fault("H3")
def test_a_trainer_sees_at_once_that_another_machine_took_over(disk):
    north, south = rundir(disk)
    first = north.claim_incarnation()
    north.refuse_if_superseded(first)
    south.claim_incarnation()
    with pytest.raises(Superseded):
        north.refuse_if_superseded(first)


@pytest.mark.fault("G16")
def test_the_worker_that_comes_later_takes_the_keys_and_the_recipe_that_are_there(disk):
    """Though its machine remembers that there were none."""
    assert not any((disk.south / "run" / name).exists() for name in ("recipe.toml", "keys", ""))
    mine, theirs = disk.south.parent.parent / "a.toml", disk.south.parent.parent / "b.toml"
    mine.write_text(dump(Recipe(name="mine"))), theirs.write_text(dump(Recipe(name="theirs")))
    resolve_recipe(disk.north / "run", mine, [])
    run, found = resolve_recipe(disk.south / "run", None, [], keep=False)
    assert found.name == "mine"
    with pytest.raises(UserError, match="started with another"):
        resolve_recipe(disk.south / "run", theirs, ["seed=3"], keep=False)
    assert "mine" in (disk.server / "run" / "recipe.toml").read_text()
    assert not run.keys.exists()
    keys = open_keys(disk.north / "run" / "keys")
    assert not run.keys.exists()  # remembered
    assert open_keys(run.keys).run_id == keys.run_id
    assert sorted(os.listdir(disk.server / "run")) == sorted({"keys", "recipe.toml"} | set(os.listdir(run.path)))


@pytest.mark.fault("G17")
@pytest.mark.parametrize("error", LOST)
def test_keys_whose_reply_was_lost_are_whole(disk, error):
    disk.northern.lose("rename", "keys", error)
    keys = open_keys(disk.north / "keys")
    assert open_keys(disk.south / "keys").checkpoint == keys.checkpoint
    assert os.listdir(disk.server) == ["keys"]


def test_keys_of_a_root_that_the_server_does_not_trust_are_refused_in_one_line(disk):
    open_keys(disk.north / "keys")
    disk.southern.set(squash=True)
    with pytest.raises(UserError, match=r"belongs to user 65534, not to you.*root_squash") as caught:
        open_keys(disk.south / "keys")
    assert "\n" not in str(caught.value)


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("G17")
def test_of_failures_on_two_machines_the_first_stays_on_top(disk):
    assert not (disk.south / "FAILED.md").exists()
    disk.northern.lose("create", "FAILED.md", "RETRY")
    write_failure(disk.north, "trainer rank 0", 73, "no space")
    write_failure(disk.south, "sampler engine 0", 66, "no trainer")
    said = (disk.server / "FAILED.md").read_text()
    assert said.index("# trainer rank 0 failed") < said.index("## sampler engine 0 failed later")
    assert failure(disk.south, "trainer") == (73, "no space")


@pytest.mark.fault("G18")
def test_a_record_is_followed_from_another_machine_late_and_without_a_torn_line(disk):
    north, south = rundir(disk)
    tail = Tail(south.metrics / "trainer.jsonl")
    with MetricsWriter(north.metrics / "trainer.jsonl") as writer:
        writer.write({"kind": "step", "step": 1})
        assert not list(tail.lines())  # written, and not yet at the server
        disk.northern.write_back(10)
        assert not list(tail.lines())  # a part of a line
        disk.northern.write_back()
        assert [json.loads(line)["step"] for _, line in tail.lines()] == [1]
        writer.write({"kind": "step", "step": 2})
    assert [json.loads(line)["step"] for _, line in tail.lines()] == [2] and not list(tail.lines())


@pytest.mark.fault("G18", "L4")
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_record_that_does_not_reach_the_server_is_said_and_ends_no_worker(disk, error, caplog):
    north, _ = rundir(disk)
    with MetricsWriter(north.metrics / "trainer.jsonl") as writer:
        writer.write({"kind": "step", "step": 1})
        disk.northern.refuse("flush", "trainer.jsonl", error)
    assert writer.lost == 1 and f"trainer.jsonl: {os.strerror(getattr(errno, error))}" in caplog.text


@pytest.mark.fault("G18")
def test_the_doctor_beside_a_run_on_another_machine_misses_and_repeats_nothing(disk):
    north, south = rundir(disk)
    north.recipe.write_text(dump(Recipe(name="seen")))
    history, numbers = History.open(south.path), ("reward", "accuracy", "train/tokens", "step_time")
    figures = dict.fromkeys([*numbers, "time/wait_s", "time/publish_s", "sampler/tokens_per_s"], 1.0)
    seen = []
    with MetricsWriter(north.metrics / "trainer.jsonl") as writer:
        for step in range(1, 31):
            writer.write({"kind": "step", "step": step} | figures)
            disk.northern.write_back(97)  # so much of what waits, not whole lines
            history.refresh()
            seen.append(len(history.steps))
    history.refresh()
    assert [record["step"] for record in history.steps] == list(range(1, 31)) and not history.unreadable
    assert seen == sorted(seen) and seen[-1] < 30


# -- all of it, with the two real workers ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("G21", "G20")
def test_a_run_on_two_machines_survives_the_bad_days_of_its_disk():
    """The trained weights are its audit. The trainer moves to the other machine; at last the server is away 30 s."""
    command = [sys.executable, "-m", "tests.nfs", "--faults", "12", "--steps", "40", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=700, check=False)  # its own limit is 600
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["doubled"], found["left"], found["trained"]) == (0, 0, [], 160)
    assert sum(found["faults"].values()) == 12 and found["faults"]["away"] == 1
    assert "tests.nfs.client" not in subprocess.run(["mount"], capture_output=True, text=True, check=False).stdout
