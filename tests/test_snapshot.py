"""A sealed directory is whole or it is not there; a reader gets the sealed bytes or an error."""

import os
import random

import pytest

from policy.model import copy_model_files
from protocol import snapshot
from protocol.errors import StorageError
from protocol.snapshot import Corrupt, Manifest, checkpoint_id, open_sealed, seal, staging, write_hashed
from tests.tiny import make_model


def publish(parent, name="s00000001.i0001", key=None, data=b"weights" * 1000):
    with staging(parent, name) as aside:
        files = {"model.safetensors": write_hashed(aside / "model.safetensors", data)}
        manifest = Manifest(
            kind="full", run_id="r", id=name, parent=None, step=1, incarnation=1, model="m", files=files
        )
        return parent / name, seal(aside, parent / name, manifest, key)


def test_what_was_sealed_is_read_back(tmp_path):
    path, sha256 = publish(tmp_path)
    assert open_sealed(path, sha256).read("model.safetensors") == b"weights" * 1000
    assert [found.name for found in snapshot.listed(tmp_path)] == ["s00000001.i0001"]


@pytest.mark.fault("G4")
def test_every_flipped_bit_is_noticed(tmp_path):
    path, sha256 = publish(tmp_path, data=os.urandom(300))
    dice = random.Random(0)
    for name in ("model.safetensors", "manifest.json"):
        sound = (path / name).read_bytes()
        for _ in range(200):
            damaged = bytearray(sound)
            damaged[dice.randrange(len(sound))] ^= 1 << dice.randrange(8)
            (path / name).write_bytes(damaged)
            with pytest.raises(Corrupt):
                open_sealed(path, sha256).read("model.safetensors")
        (path / name).write_bytes(sound)
    assert open_sealed(path, sha256).read("model.safetensors")


@pytest.mark.fault("G5")
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_truncated_or_grown_file_is_noticed(tmp_path, change):
    path, sha256 = publish(tmp_path)
    (path / "model.safetensors").write_bytes(change(b"weights" * 1000))
    with pytest.raises(Corrupt, match="not the sealed"):
        open_sealed(path, sha256).read("model.safetensors")


def test_another_manifest_under_the_same_name_is_noticed(tmp_path):
    path, _ = publish(tmp_path)
    with pytest.raises(Corrupt):
        open_sealed(path, "0" * 64)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(StorageError, match="No space"), staging(tmp_path, "s00000001.i0001") as aside:
        (aside / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("G3")
def test_a_directory_without_a_manifest_is_no_snapshot(tmp_path):
    (tmp_path / "s00000009.i0001").mkdir()
    (tmp_path / ".tmp-s00000008.i0001-1-ab").mkdir()
    assert snapshot.listed(tmp_path) == []


def test_a_restarted_trainers_snapshots_are_newer_than_those_of_the_history_it_left(tmp_path):
    """Else it would prune what it has just announced, and talk to weights that were rolled back."""
    for name in ("s00000037.i0001", "s00000020.i0002", "s00000021.i0002", "s00000009.i0001"):
        publish(tmp_path, name)
    names = [path.name for path in snapshot.listed(tmp_path)]
    assert names == ["s00000009.i0001", "s00000037.i0001", "s00000020.i0002", "s00000021.i0002"]


@pytest.mark.fault("G7")
def test_an_id_is_never_used_twice(tmp_path):
    publish(tmp_path)
    with pytest.raises(StorageError):
        publish(tmp_path, data=b"others")
    assert (tmp_path / "s00000001.i0001" / "model.safetensors").read_bytes() == b"weights" * 1000


@pytest.mark.fault("G9")
def test_a_rename_whose_reply_was_lost_has_succeeded(tmp_path, monkeypatch):
    rename = os.rename

    def lossy(source, target):
        rename(source, target)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(snapshot.os, "rename", lossy)
    path, sha256 = publish(tmp_path)
    assert open_sealed(path, sha256).read("model.safetensors")


@pytest.mark.fault("G6")
def test_a_late_file_is_waited_for(tmp_path, monkeypatch):
    """A network filesystem may show a file seconds after it was announced."""
    path, sha256 = publish(tmp_path)
    hidden = path.rename(tmp_path / "hidden")
    monkeypatch.setattr(snapshot.time, "sleep", lambda _: hidden.exists() and hidden.rename(path))
    assert open_sealed(path, sha256, patience_s=60).read("model.safetensors")


def test_only_this_runs_signature_opens_a_checkpoint(tmp_path):
    path, _ = publish(tmp_path, key=b"ours")
    assert open_sealed(path, key=b"ours")
    with pytest.raises(Corrupt, match="not signed"):
        open_sealed(path, key=b"theirs")


@pytest.mark.fault("O4")
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ".hidden", "a" * 80, "a b", ""])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    path = tmp_path / "s00000001.i0001"
    path.mkdir()
    files = {name: snapshot.File(0, "")}
    manifest = Manifest(kind="full", run_id="r", id="s", parent=None, step=1, incarnation=1, model="m", files=files)
    (path / "manifest.json").write_bytes(snapshot.msgspec.json.encode(manifest))
    with pytest.raises(Corrupt, match="lead out"):
        open_sealed(path)


@pytest.mark.fault("O4")
def test_a_symbolic_link_is_not_followed(tmp_path):
    path, sha256 = publish(tmp_path)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt):
        open_sealed(path, sha256).read("model.safetensors")


def test_ids_carry_the_step():
    assert snapshot.step_of(snapshot.snapshot_id(42, 3)) == 42
    for wrong in ("s42", "../s00000001.i0001", "s00000001.i0001 ", "x00000001.i0001"):
        with pytest.raises(ValueError, match="no snapshot id"):
            snapshot.step_of(wrong)


@pytest.mark.fault("O4")
def test_a_sealed_directory_under_another_name_is_refused(tmp_path):
    """An old, well signed checkpoint that somebody renamed would count as the newest."""
    old, new = checkpoint_id(5, 1), checkpoint_id(9, 1)
    with staging(tmp_path, old) as aside:
        manifest = Manifest(kind="checkpoint", run_id="r", id=old, parent=None, step=5, incarnation=1, model="m")
        seal(aside, tmp_path / old, manifest, key=b"k")
    open_sealed(tmp_path / old, key=b"k")
    (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(Corrupt, match="is that of"):
        open_sealed(tmp_path / new, key=b"k")


def test_a_model_that_is_a_snapshot_of_another_run_leaves_its_manifest_there(tmp_path):
    """Found when a run was started from another run's newest weights: its own manifest could not be written."""
    source, target = make_model(tmp_path / "source"), tmp_path / "target"
    (source / "manifest.json").write_text("{}")
    target.mkdir()
    copy_model_files(source, target, "float32")
    assert (target / "config.json").is_file() and (target / "tokenizer.json").is_file()
    assert not (target / "manifest.json").exists()
