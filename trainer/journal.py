"""What a replay leaves behind: the figures of every step, and a hash of the weights that came of it."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from protocol.errors import Diverged
from protocol.messages import Group, Pulse
from protocol.metrics import MetricsWriter
from protocol.rundir import RunDir
from protocol.snapshot import Corrupt, listed, open_sealed, snapshot_id, step_of
from trainer.engine import Policy
from trainer.parts import Source

log = logging.getLogger(__name__)


class Journal:
    """Takes the place of the Store and of the record's writer: a step's figures and the hash of what came of it.

    Weights are hashed after every step, and not written. first: whether this rank is the one that writes.
    """

    spent_s = 0.0

    def __init__(self, rundir: RunDir, first: bool) -> None:
        self._rundir, self._first = rundir, first
        self._figures = MetricsWriter(rundir.metrics / "trainer.jsonl" if first else Path(os.devnull))
        self._lines = MetricsWriter(rundir.path / "replay.jsonl" if first else Path(os.devnull))
        self._weights = ""
        self._steps = 0

    @property
    def lost(self) -> int:
        return self._figures.lost + self._lines.lost

    def publish(self, policy: Policy) -> Pulse:
        """Called by all ranks, which gather together."""
        self._weights = weights_hash(policy.weights())
        return Pulse(snapshot=snapshot_id(policy.steps_done, 1), manifest_sha256="")

    def keep(self, step: int, groups: list[Group]) -> None:
        """They were read from a stream."""

    def checkpoint(self, policy: Policy, inbox: Source) -> None:
        """A replay starts anew."""

    def quarantine(self, policy: Policy, groups: list[Group], inbox: Source) -> None:
        """Raises Diverged: later steps would not be those that were recorded."""
        raise Diverged(f"recorded step {policy.steps_done + 1} is not finite with these settings; the replay ends")

    def write(self, record: Mapping[str, Any]) -> None:
        """The record of a step, as `Record` makes it."""
        self._figures.write(record)
        if record["kind"] != "step":
            return
        self._steps += 1
        chosen = {name: record[name] for name in ("kind", "step", "groups", "loss", "grad_norm")}
        self._lines.write({**chosen, "weights": self._weights})
        log.info(
            "step %d  groups %d  loss %.8g  grad_norm %.8g  weights %s",
            record["step"], len(record["groups"]), record["loss"], record["grad_norm"], self._weights,
        )  # fmt: skip

    def begin(self, step: int) -> None:
        self._lines.write({"kind": "begin", "step": step, "weights": self._weights})
        if self._first:
            log.info("step %d  weights %s", step, self._weights)

    def end(self, pulse: Pulse, run: Path) -> None:
        """run: the recorded one, if it is there."""
        if not self._first:
            return
        said = compared(self._rundir.snapshots / pulse.snapshot, run / "snapshots")
        step = step_of(pulse.snapshot)
        self._lines.write({"kind": "end", "step": step, "steps": self._steps, "weights": self._weights, "run": said})
        log.info("replayed %d steps up to step %d: weights %s; %s", self._steps, step, self._weights, said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._figures.close()
        self._lines.close()


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of a sha256 over names, dtypes, shapes and bytes of all tensors, in the order of the names."""
    lines = []
    for name, tensor in weights:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def compared(mine: Path, snapshots: Path) -> str:
    """What the recorded run's own snapshot of the same step says about mine."""
    theirs = (
        [path for path in listed(snapshots) if step_of(path.name) == step_of(mine.name)] if snapshots.is_dir() else []
    )
    if not theirs:
        return "the recorded run has no snapshot of this step to compare with"
    try:
        same = _tensor_files(mine) == _tensor_files(theirs[-1])
    except Corrupt as error:
        return f"the recorded run's snapshot cannot be read: {error}"
    return f"{theirs[-1].name} of the recorded run has {'the same' if same else 'other'} weights"


def _tensor_files(snapshot: Path) -> dict[str, str]:
    files = open_sealed(snapshot).manifest.files
    return {name: file.sha256 for name, file in files.items() if name.endswith(".safetensors")}
