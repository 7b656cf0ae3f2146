"""All that a trainer needs to go on: weights, optimizer, schedule, and the ledger of trained groups.

One sealed, signed directory, so that all of it is saved or none. DeepSpeed's files are pickles: they are loaded
only after the signature and every hash have been checked. A trainer with another number of ranks loads what
DeepSpeed's converter makes of them.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from protocol.errors import NoCheckpoint, StorageError, UserError
from protocol.keys import Keys
from protocol.rundir import RunDir
from protocol.snapshot import (
    Corrupt,
    File,
    Manifest,
    Sealed,
    checkpoint_id,
    hash_file,
    listed,
    make_staging,
    open_sealed,
    seal,
    step_of,
    write_hashed,
)
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.ranks import Ranks
from trainer.retention import check_room, size, size_of_newest
from trainer.universal import GROWTH, convert

log = logging.getLogger(__name__)

TAG = "ds"
PATIENCE_S = 10.0
"""For a network filesystem that answers badly for a moment."""
ALIKE = {1, 2}
"""ZeRO stages that load each other's checkpoints. 0 keeps other files; 3 cuts up each parameter, not all in a row."""


class State(Struct, frozen=True, kw_only=True):
    """What DeepSpeed does not keep."""

    step: int
    world: int
    zero_stage: int
    inbox: dict
    model: str
    """Fingerprint of the model's configuration."""


class Checkpoints:
    """Saves and finds a run's checkpoints. Every method is called by all ranks together."""

    def __init__(self, rundir: RunDir, keys: Keys, ranks: Ranks, incarnation: int, model: str) -> None:
        self._rundir, self._keys, self._ranks = rundir, keys, ranks
        self._incarnation, self._model = incarnation, model
        self.newest: str | None = None
        """The id of the one that this trainer has loaded or written last."""

    def save(self, policy: Policy, inbox: Inbox) -> None:
        """Writes checkpoint `steps_done`, once.

        Raises StorageError on all ranks together: no room for it, or one of them could not write its part.
        """
        if self.newest and step_of(self.newest) == policy.steps_done:
            return
        name = checkpoint_id(policy.steps_done, self._incarnation)
        aside = Path(os.fsdecode(self._together(lambda: self._begin(name), only_first=True)))
        try:
            self._together(lambda: policy.save(aside, TAG))
            self._together(lambda: self._seal(aside, name, policy, inbox), only_first=True)
            self.newest = name
        finally:
            if self._ranks.first:
                shutil.rmtree(aside, ignore_errors=True)

    def resume(self, policy: Policy) -> State | None:
        """Loads the newest intact checkpoint, of any number of ranks; None where there is none at all.

        Raises NoCheckpoint, UserError, and StorageError where one of another number of ranks cannot be converted.
        """
        sealed = self._newest_intact() if self._ranks.first else None
        found = self._share(os.fsencode(sealed.path) if sealed else None)
        if not found:
            return None
        path = Path(os.fsdecode(found))
        data = self._share(sealed.read("state.json") if sealed else None)
        state = msgspec.json.decode(data, type=State)
        stage = policy.recipe.trainer.zero_stage
        if stage != state.zero_stage and not {stage, state.zero_stage} <= ALIKE:
            raise UserError(
                f"checkpoint {path} was written with trainer.zero_stage = {state.zero_stage}; "
                f"DeepSpeed cannot load it with {stage}"
            )
        if state.model != self._model:
            raise UserError(f"checkpoint {path} holds another model than recipe.model.path; use its own recipe")
        if stage == 0 or (state.world, state.zero_stage) == (self._ranks.world, stage):  # ZeRO 0 cuts nothing up
            policy.load(path, TAG)
        else:
            self._load_converted(policy, path, state)
        self.newest = path.name
        return state

    def _load_converted(self, policy: Policy, path: Path, state: State) -> None:
        """What was converted for this is removed again."""
        if self._ranks.first:
            log.info("converting checkpoint %s from %d ranks to %d", path.name, state.world, self._ranks.world)
        aside = Path(os.fsdecode(self._together(lambda: self._convert(path, state), only_first=True)))
        try:
            policy.load(aside, TAG, universal=True)
            self._ranks.max([0])  # all have read it
        finally:
            if self._ranks.first:
                shutil.rmtree(aside, ignore_errors=True)

    def _convert(self, path: Path, state: State) -> bytes:
        """The directory that holds the converted files."""
        self._rundir.refuse_if_superseded(self._incarnation)
        try:
            check_room(self._rundir.checkpoints, f"converting {path.name}", GROWTH * size(path))
            aside = make_staging(self._rundir.checkpoints, checkpoint_id(state.step, self._incarnation))
            try:
                aside.chmod(0o700)
                convert(path / TAG, aside / TAG)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        except StorageError as error:
            raise StorageError(f"{error}; or start it with --num_gpus={state.world}: no conversion") from None
        return os.fsencode(aside)

    def _together(self, work: Callable[[], bytes | None], only_first: bool = False) -> bytes:
        """Every rank works, or the first alone; its result on all ranks. The StorageError of one is that of all."""
        result, failure = b"", None
        if self._ranks.first or not only_first:
            try:
                result = work() or b""
            except OSError as error:
                failure = StorageError(f"cannot write a checkpoint: {error.strerror}; free space or mend permissions")
            except StorageError as error:
                failure = error
        if self._ranks.max([failure is not None])[0]:
            raise failure or StorageError("another rank could not write its part of a checkpoint; its log says why")
        return self._share(result if self._ranks.first else None)

    def _begin(self, name: str) -> bytes:
        """The directory to write into, if there is room for a checkpoint of the size of the last one."""
        self._rundir.refuse_if_superseded(self._incarnation)
        check_room(self._rundir.checkpoints, name, size_of_newest(self._rundir.checkpoints))
        return os.fsencode(make_staging(self._rundir.checkpoints, name))

    def _seal(self, aside: Path, name: str, policy: Policy, inbox: Inbox) -> None:
        state = State(
            step=policy.steps_done,
            world=self._ranks.world,
            zero_stage=policy.recipe.trainer.zero_stage,
            inbox=inbox.state(),
            model=self._model,
        )
        files: dict[str, File] = {"state.json": write_hashed(aside / "state.json", msgspec.json.encode(state))}
        files |= {f"{TAG}/{path.name}": hash_file(path) for path in sorted((aside / TAG).iterdir())}
        manifest = Manifest(
            kind="checkpoint",
            run_id=self._keys.run_id,
            id=name,
            parent=None,
            step=policy.steps_done,
            incarnation=self._incarnation,
            model=self._model,
            files=files,
        )
        seal(aside, self._rundir.checkpoints / name, manifest, self._keys.checkpoint)

    def _newest_intact(self) -> Sealed | None:
        found = listed(self._rundir.checkpoints)
        for path in reversed(found):
            try:
                # alone: DeepSpeed finds files by pattern, and would unpickle those that nobody signed too
                return open_sealed(path, key=self._keys.checkpoint, patience_s=PATIENCE_S).verified().alone()
            except Corrupt as error:
                log.error("skipped checkpoint %s: %s", path.name, error)
        if found:
            raise NoCheckpoint(f"none of the {len(found)} checkpoints in {self._rundir.checkpoints} is intact")
        return None

    def _share(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on all ranks, where it has any."""
        size = self._ranks.max([len(data or b"")])[0]
        return self._ranks.broadcast(data, size) if size else b""
