"""Where this process stands among the trainer's ranks, as its launcher says: DeepSpeed's, torchrun, or srun.

    deepspeed ... --module trainer     RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT
    torchrun ... -m -- trainer         the same with LOCAL_WORLD_SIZE
    srun ... python -m trainer         SLURM_*: each task of a step is a rank

A step of one task is no rank, and so is no batch script and no shell inside an allocation: there `python -m trainer`
starts ranks, as anywhere else.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.errors import UserError

FIRST_PORT, PORTS = 20_000, 10_000
"""Below those that Linux gives to clients, so that none of them has taken it."""
LAST_PORT = 65_535
STEP = 1009
"""Apart are two steps of one job."""


@dataclass(frozen=True, slots=True)
class Place:
    rank: int
    world: int
    local_rank: int
    """Among the ranks of this node."""
    local_world: int
    address: str
    """Of rank 0's node, where the ranks meet."""
    port: int
    ancestors: int = 1
    """Processes above this one whose end ends it: its launcher, for DeepSpeed's also the one that started that."""
    agent: bool = False
    """Whether the launcher serves torch's store (torchrun), else rank 0 does."""

    def variables(self) -> dict[str, str]:
        """For torch and DeepSpeed, which know nothing of Slurm."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank}
        numbers |= {"LOCAL_WORLD_SIZE": self.local_world, "MASTER_PORT": self.port}
        return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": self.address}


def find(environment: Mapping[str, str]) -> Place | None:
    """None for a process that is no rank. Raises UserError where the environment contradicts itself."""
    if "RANK" in environment:
        place = _of_launcher(environment)
    elif _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        place = _of_slurm(environment)
    else:
        return None
    for name, one, of in (("rank", place.rank, place.world), ("local rank", place.local_rank, place.local_world)):
        if not 0 <= one < of:
            raise UserError(f"{name} {one} of {of}: the launcher's environment contradicts itself; start it anew")
    if not 0 < place.port <= LAST_PORT:
        raise UserError(f"MASTER_PORT={place.port}: expected a port, 1 to {LAST_PORT}")
    return place


def here() -> Place:
    """Of this process. Raises UserError where it is no rank."""
    place = find(os.environ)
    if place is None:
        raise UserError("no launcher has said which rank this is: start ranks by deepspeed, torchrun or srun")
    return place


def _of_launcher(environment: Mapping[str, str]) -> Place:
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"RANK is set, {', '.join(missing)} not: start ranks by deepspeed, torchrun or srun, or `unset RANK`"
        )
    if _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0):
        raise UserError(
            "torchrun --max-restarts: ranks that are started again by themselves hide why they ended; "
            "leave it out, and start the same command again: the run goes on from its last checkpoint"
        )
    world = _number(environment, "WORLD_SIZE")
    local = "LOCAL_SIZE" if "LOCAL_SIZE" in environment else "LOCAL_WORLD_SIZE"
    return Place(
        rank=_number(environment, "RANK"),
        world=world,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_world=_number(environment, local, world),
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        ancestors=2 if local == "LOCAL_SIZE" else 1,
        agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(environment: Mapping[str, str]) -> Place:
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        world=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world=len(_text(environment, "SLURM_GTIDS").split(",")),  # the ranks of this node
        address=environment.get("MASTER_ADDR") or _first_node(_text(environment, "SLURM_STEP_NODELIST")),
        port=_number(environment, "MASTER_PORT", FIRST_PORT + (job + STEP * step) % PORTS),
    )


def _first_node(nodes: str) -> str:
    """nodes: Slurm's list, `gpu[07-09],gpu12`, which Slurm expands."""
    if not set(nodes) & set("[,"):
        return nodes
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(
            f"`{' '.join(command)}` fails here: in the batch script, export MASTER_ADDR=NODE, the first of these nodes"
        ) from None


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    text = _text(environment, name)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name}={text}: expected a number; start ranks by deepspeed, torchrun or srun")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name, "")
    if not text:
        raise UserError(f"{name} is not set: start ranks by deepspeed, torchrun or srun")
    return text
