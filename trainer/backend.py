"""Over which backend the ranks exchange tensors: NCCL where it works, else gloo.

Gloo takes CUDA tensors through host memory and TCP, so it needs nothing of the GPUs and is slower (docs/vgpu.md).
"""

import logging
import re
import socket
import subprocess
import time
from typing import Self

import msgspec
import torch
import torch.distributed as dist

from protocol.errors import UserError
from protocol.process import NVIDIA_SMI_S
from trainer.notes import Notes
from trainer.trial import works

log = logging.getLogger(__name__)

KEY = "trainer.backend"
PROFILE = re.compile(r"GRID|vGPU|-\d+[ABCQ]$")
"""Names of virtual GPUs end with memory and kind of their profile: `A100D-20C`, `RTX6000-Ada-24Q`."""


class Card(msgspec.Struct, frozen=True):
    """What one rank tells the others of its GPU."""

    id: str = ""
    """Host and UUID; "" without a GPU."""
    lacks: str = ""
    """What NCCL cannot do without and is not here."""
    virtual: str = ""
    """The name of a virtual GPU."""

    @classmethod
    def here(cls, device: torch.device) -> Self:
        if device.type != "cuda":
            return cls(lacks="torch finds no NVIDIA GPU")
        properties = torch.cuda.get_device_properties(device)
        uuid = str(getattr(properties, "uuid", device.index))
        return cls(
            id=f"{socket.gethostname()} {uuid}",
            lacks="" if dist.is_nccl_available() else "torch is built without NCCL",
            virtual=properties.name if is_virtual(properties.name, uuid) else "",
        )


def choose_backend(wanted: str, notes: Notes, device: torch.device) -> str:
    """`nccl` or `gloo`, the same on all ranks, which call this together before they have a group; rank 0 says why.

    device: this rank's, with its number where it is a GPU. Raises UserError where `nccl` is asked for and cannot work.
    """
    if wanted == "gloo":
        found, why, level = "gloo", "the recipe asks for it", logging.INFO
    else:
        cards = notes.swap("the GPUs", Card.here(device), Card)
        found, why = _tried(wanted, cards, notes, device)
        fallen_back = found == "gloo" and any(card.id for card in cards)
        level = logging.WARNING if fallen_back else logging.INFO
    if notes.rank == 0:
        log.log(level, "ranks exchange tensors over %s: %s", found, why)
    return found


def _tried(wanted: str, cards: list[Card], notes: Notes, device: torch.device) -> tuple[str, str]:
    """The backend and why."""
    why, began = obstacle(cards, wanted), time.monotonic()
    if not why and len(cards) == 1:
        return "nccl", "one rank exchanges nothing, so it was not tried"
    if not why:
        failed = works("nccl", notes, device)
        took = f"a trial of {time.monotonic() - began:.0f} s"
        if not failed:
            return "nccl", f"it worked in {took}"
        why = f"NCCL failed in {took}: {failed}"
    if wanted == "nccl":
        raise UserError(f"{KEY} = 'nccl', but {why}; set it to 'gloo' or 'auto'")
    return "gloo", why


def obstacle(cards: list[Card], wanted: str) -> str:
    """Why NCCL need not even be tried, by rank; "" where it may work. A virtual GPU is one with `auto` only."""
    for rank, card in enumerate(cards):
        if card.lacks:
            return card.lacks
        if card.virtual and wanted == "auto":
            return f"{card.virtual} is a virtual GPU, where NCCL mostly fails ({KEY} = 'nccl' tries it)"
        other = [each.id for each in cards].index(card.id)
        if other < rank:
            return f"ranks {other} and {rank} share a GPU, which NCCL refuses"
    return ""


def is_virtual(name: str, uuid: str) -> bool:
    """Whether a GPU is a slice that a hypervisor gives out, by its name, else by what the driver says."""
    if PROFILE.search(name):
        return True
    command = ["nvidia-smi", "-q", f"--id=GPU-{uuid.removeprefix('GPU-')}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi does not tell whether %s is virtual (%s): taken for a real one", name, error)
        return False
    return bool(re.search(r"Virtualization Mode\s*:\s*VGPU", said, re.IGNORECASE))
