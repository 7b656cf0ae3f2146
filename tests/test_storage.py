"""A run directory that is gone, read-only or full, and damaged checkpoints: said in one line, never guessed."""

import json
import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from protocol.cli import exit_with
from protocol.errors import NoCheckpoint, StorageError
from protocol.keys import open_keys
from protocol.metrics import MetricsWriter, read_metrics
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import Manifest, checkpoint_id, listed, remove, seal, staging, write_hashed
from trainer.ranks import Ranks


def publish(rundir: RunDir) -> None:
    with staging(rundir.snapshots, "s00000001.i0001") as aside:
        files = {"model.safetensors": write_hashed(aside / "model.safetensors", b"weights")}
        manifest = Manifest(kind="full", run_id="r", id="s", parent=None, step=1, incarnation=1, model="m", files=files)
        seal(aside, rundir.snapshots / "s00000001.i0001", manifest)


WRITES = {
    "make": lambda rundir: RunDir(rundir.path / "deeper").make(),
    "endpoint": lambda rundir: rundir.write_endpoint(Endpoint(address="a", incarnation=1, host="h")),
    "incarnation": lambda rundir: rundir.claim_incarnation(),
    "snapshot": publish,
    "metrics": lambda rundir: MetricsWriter(rundir.metrics / "trainer.jsonl").close(),
    "keys": lambda rundir: open_keys(rundir.keys),
}
READS = {
    "fence": lambda rundir: rundir.refuse_if_superseded(1),
    "endpoint": lambda rundir: rundir.read_endpoint(),
    "list": lambda rundir: listed(rundir.snapshots),
}


@pytest.fixture
def rundir(tmp_path):
    result = RunDir(tmp_path / "run")
    result.make()
    return result


@pytest.fixture
def read_only(rundir):
    """Really: for root a filesystem that was remounted, for others a directory without permissions."""
    if os.geteuid():
        for path in [*rundir.path.iterdir(), rundir.path]:
            path.chmod(0o500)
        yield rundir
        for path in [rundir.path, *rundir.path.iterdir()]:
            path.chmod(0o700)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(rundir.path)], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        rundir.make()
        subprocess.run(["mount", "-o", "remount,ro", str(rundir.path)], check=True)
        yield rundir
    finally:
        subprocess.run(["umount", "-l", str(rundir.path)], check=True)


@pytest.mark.fault("G13")
@pytest.mark.parametrize("what", WRITES)
def test_a_read_only_run_directory_is_named_with_the_reason(read_only, what):
    with pytest.raises(StorageError, match=r"Read-only file system|Permission denied") as caught:
        WRITES[what](read_only)
    assert str(read_only.path) in str(caught.value)


@pytest.mark.fault("G13")
@pytest.mark.parametrize("what", ["endpoint", "incarnation", "snapshot"])
def test_a_run_directory_that_was_moved_is_not_made_anew(rundir, what):
    """A new one would be written in vain: nobody looks there."""
    rundir.path.rename(rundir.path.with_name("elsewhere"))
    with pytest.raises(StorageError, match="No such file or directory") as caught:
        WRITES[what](rundir)
    assert str(rundir.path) in str(caught.value) and not rundir.path.exists()


@pytest.mark.fault("G13")
@pytest.mark.parametrize("what", READS)
def test_reading_a_run_directory_that_was_moved_says_so(rundir, what):
    rundir.path.rename(rundir.path.with_name("elsewhere"))
    with pytest.raises(StorageError, match="was the run directory moved") as caught:
        READS[what](rundir)
    assert str(rundir.path) in str(caught.value)


@pytest.mark.fault("G13")
def test_a_storage_error_is_one_line_and_exit_code_73(rundir, capsys):
    rundir.path.rename(rundir.path.with_name("elsewhere"))
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: rundir.claim_incarnation())
    assert ended.value.code == 73
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_removed_stays_and_is_named(tmp_path, caplog):
    remove(tmp_path / "s00000001.i0001")
    assert "cannot remove" in caplog.text and "s00000001.i0001" in caplog.text


@pytest.mark.fault("L4")
def test_a_full_disk_costs_records_and_not_the_run(tmp_path, caplog):
    (tmp_path / "trainer.jsonl").symlink_to("/dev/full")
    with MetricsWriter(tmp_path / "trainer.jsonl") as writer:
        for step in range(3):
            writer.write({"step": step})
    assert writer.lost == 3 and caplog.text.count("No space left on device") == 1
    (tmp_path / "trainer.jsonl").unlink()
    with MetricsWriter(tmp_path / "trainer.jsonl") as writer:
        writer.write({"step": 3})
    assert [record["step"] for record in read_metrics(tmp_path / "trainer.jsonl")] == [3]


# -- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": free.getsockname()[1]}).items():
            patch.setenv(name, str(value))
        free.close()
        with Ranks("gloo", threads=1) as result:
            yield result


class FakePolicy:
    """Remembers what it was told to load; the real one needs DeepSpeed, and minutes."""

    def __init__(self) -> None:
        self.recipe = SimpleNamespace(trainer=SimpleNamespace(zero_stage=1))
        self.steps_done = 0
        self.loaded: Path | None = None

    def load(self, directory: Path, tag: str) -> None:
        self.loaded, self.steps_done = directory / tag, int(directory.name[1:9])


def save(rundir: RunDir, key: bytes, step: int) -> Path:
    """A checkpoint with all that `Checkpoints.resume` looks at."""
    name = checkpoint_id(step, 1)
    state = {"step": step, "world": 1, "zero_stage": 1, "inbox": {"exams": 0}, "model": "m"}
    with staging(rundir.checkpoints, name) as aside:
        (aside / "ds").mkdir()
        files = {
            "state.json": write_hashed(aside / "state.json", msgspec.json.encode(state)),
            "ds/rank0.pt": write_hashed(aside / "ds" / "rank0.pt", b"optimizer" * 100),
        }
        manifest = Manifest(
            kind="checkpoint", run_id="r", id=name, parent=None, step=step, incarnation=1, model="m", files=files
        )
        seal(aside, rundir.checkpoints / name, manifest, key)
    return rundir.checkpoints / name


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "ds" / "rank0.pt", 5),
    "flipped": lambda path: (path / "ds" / "rank0.pt").write_bytes(b"Optimizer" + b"optimizer" * 99),
    "without state": lambda path: (path / "state.json").unlink(),
    "another state": lambda path: (path / "state.json").write_text(json.dumps({"step": 99})),
    "not signed": lambda path: (path / "manifest.hmac").write_text("0" * 64),
    "half a manifest": lambda path: os.truncate(path / "manifest.json", 50),
}


def resume(rundir: RunDir, ranks: Ranks) -> tuple[object, FakePolicy]:
    from trainer.checkpoint import Checkpoints

    policy = FakePolicy()
    return Checkpoints(rundir, open_keys(rundir.keys), ranks, 2, "m").resume(policy), policy


@pytest.mark.fault("G14")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_loudly_for_the_one_before(rundir, ranks, caplog, damage):
    key = open_keys(rundir.keys).checkpoint
    older, newest = [save(rundir, key, step) for step in (2, 4)]
    DAMAGES[damage](newest)
    state, policy = resume(rundir, ranks)
    assert state.step == 2 and policy.loaded == older / "ds"
    assert f"skipped checkpoint {newest.name}" in caplog.text
    assert newest.exists()  # whoever looks into it finds it


@pytest.mark.fault("G15")
def test_without_any_intact_checkpoint_the_trainer_refuses_to_start_over(rundir, ranks):
    """Nothing is loaded, nothing is removed; a new start is only made in another run directory."""
    key = open_keys(rundir.keys).checkpoint
    for step, damage in zip((2, 4, 6), DAMAGES.values(), strict=False):
        damage(save(rundir, key, step))
    with pytest.raises(NoCheckpoint, match="none of the 3 checkpoints") as caught:
        resume(rundir, ranks)
    assert caught.value.exit_code == 74
    assert len(listed(rundir.checkpoints)) == 3


def test_a_run_without_checkpoints_starts_at_the_beginning(rundir, ranks):
    assert resume(rundir, ranks)[0] is None
