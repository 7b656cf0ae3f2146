"""Runs inside vLLM's worker: loads a verified snapshot in place, and ends it when the sampler is gone.

vLLM calls the methods by name with strings and numbers; no object crosses the process border. vLLM's engine processes
survive the death of their parent, so a thread here looks after that.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from safetensors.torch import load
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from protocol.snapshot import Corrupt, open_sealed

READERS = 2
"""Files that are read and hashed at the same time; each is in memory twice meanwhile."""
SAMPLER_PID = "VESPER_SAMPLER_PID"
"""Environment: the process whose death ends this one and its whole session."""


class Reading:
    """Reads a full snapshot in a thread, each file verified over the very bytes that are parsed; several side by side.

    `problem` is "" when `shards` holds all of it; `failure` is what ended the reading and is no fault of the files.
    """

    def __init__(self, path: Path, sha256: str, patience_s: float) -> None:
        self.wanted = True
        self.problem, self.failure = "", None
        self.shards: list[dict[str, Tensor]] = []
        self._arguments = path, sha256, None, patience_s, lambda: self.wanted
        self.thread = threading.Thread(target=self._read, name="snapshot", daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            sealed = open_sealed(*self._arguments)
            names = [name for name in sealed.manifest.files if name.endswith(".safetensors")]
            with ThreadPoolExecutor(READERS) as readers:
                self.shards = list(readers.map(lambda name: load(sealed.read(name)), names))
        except Corrupt as error:
            self.problem = str(error)
        except Exception as error:  # snapshot_read raises it
            self.failure = error


class Runner(Protocol):
    """What vLLM's worker computes with, as seen from here."""

    def get_model(self) -> nn.Module: ...


class SnapshotWorker:
    """Mixed into vLLM's worker by name (`worker_extension_cls`)."""

    # The worker's own. They are only named here: vLLM refuses an extension that has what the worker has.
    model_runner: Runner
    reload_weights: Callable[..., None]

    def read_snapshot(self, path: str, sha256: str, patience_s: float) -> None:
        """Begins to read a full snapshot, in a thread: the engine goes on sampling with the weights that it has.

        No weight changes, so a snapshot that cannot be read costs nothing.
        """
        self.reading = Reading(Path(path), sha256, patience_s)

    def snapshot_read(self, wanted: bool) -> str | None:
        """What is wrong with it, or "" once all of it is here; None while it is being read.

        Not wanted any more: the thread waits for a slow disk no longer. Raises what ended it and is no fault of files.
        """
        self.reading.wanted = wanted
        if self.reading.thread.is_alive():
            return None
        if self.reading.failure:
            raise self.reading.failure
        return self.reading.problem

    def forget_snapshot(self) -> None:
        """What was read is not loaded: another worker could not read it."""
        del self.reading

    def apply_snapshot(self) -> None:
        """Replaces all weights by those that were read."""
        self.reload_weights(weights_iterator=(item for shard in self.reading.shards for item in shard.items()))
        del self.reading
        if next(self.model_runner.get_model().parameters()).device.type == "cpu":
            self._repack_tied_head()

    def _repack_tied_head(self) -> None:
        """The CPU backend keeps a packed copy of the output layer; where it is tied to the embedding no tensor of
        that layer is loaded, so nobody packs it again and it would stay at the old weights."""
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


def _end_with_sampler(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        time.sleep(0.5)


if os.environ.get(SAMPLER_PID):
    threading.Thread(target=_end_with_sampler, args=(int(os.environ[SAMPLER_PID]),), daemon=True).start()
