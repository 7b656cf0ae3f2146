"""Runs inside vLLM's worker process: loads a verified snapshot in place, and ends it when the sampler is gone.

vLLM calls the methods by name with two strings; no object crosses the process border. vLLM's engine processes
survive the death of their parent, so a thread here looks after that.
"""

import os
import signal
import threading
import time
from pathlib import Path

from safetensors.torch import load
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from protocol.snapshot import Corrupt, open_sealed

SAMPLER_PID = "VESPER_SAMPLER_PID"
"""Environment: the process whose death ends this one and its whole session."""


class SnapshotWorker:
    """Mixed into vLLM's worker by name (`worker_extension_cls`)."""

    def read_snapshot(self, path: str, sha256: str) -> str:
        """Reads a full snapshot, verified over the very bytes that are parsed; what is wrong with it, or "".

        No weight changes, so a snapshot that cannot be read costs nothing. vLLM samples nothing meanwhile: the caller
        has read the files before, so they come out of the page cache.
        """
        try:
            sealed = open_sealed(Path(path), sha256)
            names = [name for name in sealed.manifest.files if name.endswith(".safetensors")]
            self.shards = [load(sealed.read(name)) for name in names]
        except Corrupt as error:
            return str(error)
        return ""

    def apply_snapshot(self) -> None:
        """Replaces all weights by those that were read."""
        self.reload_weights(weights_iterator=(item for shard in self.shards for item in shard.items()))
        del self.shards
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
