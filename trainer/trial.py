"""Whether a communication backend works between these ranks, found out by processes that may hang or crash.

    python -m trainer.trial BACKEND RANK WORLD DEVICE HOST PORT     (each rank starts one)

The processes form a group of their own through the ranks' store, and sum up small and large tensors. The sums are
looked at: a broken peer-to-peer path gives wrong numbers without an error.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from subprocess import Popen
from typing import IO

import torch
import torch.distributed as dist

# torch documents TCPStore, and forgets it in __all__.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

from protocol.failure import died
from protocol.process import die_with_parent, end, start
from trainer.notes import Notes

DEADLINE_S = 120.0
"""For the import of torch, CUDA's start, the backend's own and the sums."""
SIZES = (1, 2**24)
"""Float32 numbers in a sum: 4 bytes, and 64 MiB, which take other paths through NCCL."""
TRY = "trainer.trial"
FIRST = f"{TRY}/failed"
"""In the store: the first failure of any rank's process."""
FAILED = "failed: "
LONGEST = 400
"""Characters of a backend's message that are quoted."""


def works(backend: str, notes: Notes, device: torch.device, deadline_s: float = DEADLINE_S) -> str:
    """Called by all ranks together; empty where the sums came out right on all, else why not, the same on all.

    device: this rank's, with its number where it is a GPU. The ranks' store must be served over TCP.
    """
    served = _served(notes.store)
    place = [str(notes.rank), str(notes.world), str(device), served.host, str(served.port)]
    command = [sys.executable, "-m", TRY, backend, *place]
    with tempfile.TemporaryFile() as log:
        child = start(command, log=log, environment={"NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")})
        try:
            with notes.connected():
                ending = _wait(child, notes.store, deadline_s)
        finally:
            end(child, grace_s=0.0)
        said = _said(log)
    failed = ""
    if ending:
        own = said.removeprefix(FAILED) if said.startswith(FAILED) else ": ".join(filter(None, [ending, said]))
        with notes.connected():
            failed = notes.store.compare_set(FIRST, "", own).decode()  # the first failure: later ones follow from it
    return next(filter(None, notes.swap("the trial", failed, str, deadline_s + 60)), "")


def _wait(child: Popen, store: Store, deadline_s: float) -> str:
    """How the process ended, "" when it did well. Once another rank's has failed it is not waited for any longer."""
    deadline = time.monotonic() + deadline_s
    while child.poll() is None:
        if store.check([FIRST]):
            return "another rank's trial failed"
        if time.monotonic() > deadline:
            return f"no answer within {deadline_s:g} s"
        time.sleep(0.1)
    return died(child.returncode) if child.returncode else ""


def _served(store: Store) -> TCPStore:
    """The store under its prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore)
    return store


def _said(log: IO[bytes]) -> str:
    """What a reader wants of the output: our own last word, else NCCL's warning, else the last line."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(FAILED)]
    warned = [line.partition("NCCL WARN ")[2] for line in lines if "NCCL WARN " in line]
    found = (ours or warned or lines or [""])[-1]
    return found if len(found) <= LONGEST else f"{found[:LONGEST]} ..."


def sum_up(backend: str, rank: int, world: int, device: torch.device, store: Store) -> None:
    """Raises what the backend raises, and RuntimeError where a sum is wrong."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=DEADLINE_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    for size in SIZES:
        tensor = torch.full((size,), rank + 1.0, device=device)
        dist.all_reduce(tensor)
        wrong = int((tensor != world * (world + 1) / 2).sum())
        if wrong:
            raise RuntimeError(f"of a sum over {world} ranks {wrong} of {size} numbers are wrong")
    dist.destroy_process_group()


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 and one line that begins with `failed:` where the backend says why."""
    die_with_parent(signal.SIGKILL)
    backend, rank, world, device, host, port = arguments
    torch.set_num_threads(1)
    try:
        served = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=DEADLINE_S))
        sum_up(backend, int(rank), int(world), torch.device(device), PrefixStore(f"{TRY}/group", served))
    except Exception as error:
        sys.stdout.write(f"{FAILED}{' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
