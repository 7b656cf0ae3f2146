"""The trainer's ranks and the few words they say to each other beside DeepSpeed's own traffic.

Everything here runs on a gloo group over CPU tensors, so it works where NCCL does not, and is numbers and raw
bytes: no object is pickled between ranks. A rank that waits for rollouts answers a small all-reduce every few
seconds, so no collective ever times out because samplers are slow.
"""

import os
from datetime import timedelta
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from protocol.failure import LOST_PEER
from trainer.backend import choose_backend
from trainer.place import here
from trainer.rendezvous import gone, meet

TIMEOUT = timedelta(minutes=30)


class Ranks:
    """Joins the process group that the launcher's environment describes; leaves it on exit."""

    def __init__(self, backend: str, threads: int) -> None:
        place = here()
        self.rank, self.world = place.rank, place.world
        if torch.cuda.is_available():
            self.device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
            os.environ["LOCAL_RANK"] = str(self.device.index)  # DeepSpeed takes the device from here
        else:
            self.device = torch.device("cpu")
            # Two threads on one core spin against each other: a step took 41 s instead of 3.
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // place.local_world))
        self.notes, self.peers = meet(place)
        self.backend = choose_backend(backend, self.notes, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # not before: the trial's process may need the GPU to itself
        # Before DeepSpeed, which would take NCCL. Without device_id: with gloo a later new_group would fail on CUDA.
        store = PrefixStore("ranks", self.notes.store)
        with self.notes.connected():
            dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.world, timeout=TIMEOUT)
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup), "a group of all ranks is a group on every rank"
            self._control = group

    @property
    def first(self) -> bool:
        return self.rank == 0

    def max(self, values: list[int]) -> list[int]:
        """Element by element over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def broadcast(self, data: bytes | None, size: int) -> bytes:
        """Rank 0's `data`, of `size` bytes, on every rank; what others pass is not looked at."""
        if self.world == 1:
            return data or b""
        sent = data if self.first else None
        tensor = torch.frombuffer(bytearray(sent), dtype=torch.uint8) if sent else torch.zeros(size, dtype=torch.uint8)
        dist.broadcast(tensor, 0, group=self._control)
        return sent or tensor.numpy().tobytes()

    def gather(self, table: np.ndarray) -> np.ndarray:
        """[k, n] float32 on each rank, k the same on all -> on rank 0 all of them side by side, filled up with zeros
        to the widest; on others their own."""
        widest = self.max([table.shape[1]])[0]
        own = torch.from_numpy(np.pad(table, ((0, 0), (0, widest - table.shape[1]))))
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.first else None
        dist.gather(own, parts, dst=0, group=self._control)
        return np.concatenate([part.numpy() for part in parts], axis=1) if parts else table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        """A lost connection is raised again with the name of the rank that broke it."""
        if kind is None:  # after an error the others may not answer any more
            dist.destroy_process_group()
        elif isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            who = " or ".join(map(str, gone(self.peers, self.rank, str(error))))
            raise RuntimeError(f"{who} is gone: {str(error).splitlines()[0]}") from error
