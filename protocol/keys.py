"""The run's keys: made on first use, by whichever worker comes first, readable by their owner alone.

keys/hub.key_secret       the trainer's CURVE key pair; the run id is a hash of its public half
keys/sampler.key_secret   the key pair that all samplers of the run share
keys/clients/*.key        public keys that the trainer lets in
keys/checkpoint.key       signs checkpoints, so that only this run's files are ever unpickled
"""

import hashlib
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import zmq.auth

from protocol.disk import is_listed
from protocol.errors import StorageError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Secrets stay out of `repr`, and so out of logs and tracebacks."""

    hub_public: bytes
    hub_secret: bytes = field(repr=False)
    sampler_public: bytes
    sampler_secret: bytes = field(repr=False)
    checkpoint: bytes = field(repr=False)
    clients: Path

    @property
    def run_id(self) -> str:
        return hashlib.sha256(self.hub_public).hexdigest()[:16]


def open_keys(directory: Path) -> Keys:
    """The keys in `directory`, made if absent. Raises UserError when others could read them, StorageError."""
    try:
        if not is_listed(directory):
            _make(directory)
        _refuse_if_shared(directory)
        hub_public, hub_secret = zmq.auth.load_certificate(directory / "hub.key_secret")
        sampler_public, sampler_secret = zmq.auth.load_certificate(directory / "sampler.key_secret")
        checkpoint = (directory / "checkpoint.key").read_bytes()
    except OSError as error:
        raise StorageError(f"cannot make or read the keys in {directory}: {error.strerror or error}") from error
    assert hub_secret and sampler_secret
    return Keys(
        hub_public=hub_public,
        hub_secret=hub_secret,
        sampler_public=sampler_public,
        sampler_secret=sampler_secret,
        checkpoint=checkpoint,
        clients=directory / "clients",
    )


def _make(directory: Path) -> None:
    """Made aside and renamed: of two workers that start together, the later one finds the earlier one's keys.

    They are looked for in a listing also after the rename: where only its reply was lost, the name aside must be
    forgotten before it is removed, for it may still lead to the keys.
    """
    aside = directory.with_name(f".tmp-keys-{os.getpid()}-{secrets.token_hex(4)}")
    aside.mkdir(mode=0o700, parents=True)
    for name in ("hub", "sampler"):
        zmq.auth.create_certificates(aside, name)
        (aside / f"{name}.key_secret").chmod(0o600)
    (aside / "clients").mkdir(mode=0o700)
    shutil.copy(aside / "sampler.key", aside / "clients" / "sampler.key")
    descriptor = os.open(aside / "checkpoint.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    try:
        os.rename(aside, directory)
    except OSError:
        if not is_listed(directory):
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_if_shared(directory: Path) -> None:
    for path in [directory, *directory.glob("*secret"), directory / "checkpoint.key"]:
        if path.stat().st_uid != os.geteuid():
            raise UserError(
                f"{path} belongs to user {path.stat().st_uid}, not to you: keys made by others open the run to them; "
                f"run as that user, on NFS not as root (root_squash)"
            )
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} can be read by others; run: chmod -R go= {directory}")
