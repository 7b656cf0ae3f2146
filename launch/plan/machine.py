"""The memory of this machine, or of one that is described: what processes may take, in bytes."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UserError
from protocol.memory import GIB
from protocol.process import visible_gpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """gpus: bytes of each GPU, [] where engines run on the CPU; free: of each, what others leave."""

    gpus: list[float]
    free: list[float]
    host: float
    host_free: float
    elsewhere: bool = False
    """Only described: its host memory, disk and addresses are not known."""

    @property
    def kind(self) -> str:
        return "gpu" if self.gpus else "cpu"

    def words(self) -> str:
        if self.gpus:
            count = len(self.gpus)
            place = " elsewhere" if self.elsewhere else ""
            return f"{count} GPU{'s' if count > 1 else ''} of {min(self.gpus) / GIB:.0f} GiB{place}"
        return f"no GPU, {self.host / GIB:.1f} GiB of memory, {self.host_free / GIB:.1f} free"


def described(gpus: int, gpu_gb: float) -> Machine:
    """A machine that is elsewhere."""
    if gpus < 1 or gpu_gb <= 0:
        raise UserError(f"--gpus {gpus} --gpu-gb {gpu_gb:g}: expected at least one GPU and its memory in GiB")
    sizes = [gpu_gb * GIB] * gpus
    return Machine(gpus=sizes, free=sizes, host=float("inf"), host_free=float("inf"), elsewhere=True)


def here() -> Machine:
    """This machine. Raises UserError where NVIDIA's driver names GPUs and does not tell their memory."""
    listed = visible_gpus()
    found = _nvidia_smi(listed) if listed else []
    if len(found) != len(listed):
        raise UserError("nvidia-smi does not tell the memory of all visible GPUs; name it with --gpu-gb and --gpus")
    host, free = host_memory()
    return Machine(gpus=[total for total, _ in found], free=[left for _, left in found], host=host, host_free=free)


def _nvidia_smi(ids: list[str]) -> list[tuple[float, float]]:
    """Total and free bytes of each."""
    command = ["nvidia-smi", f"--id={','.join(ids)}", "--query-gpu=memory.total,memory.free"]
    try:
        found = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [(int(total) * 2**20, int(free) * 2**20) for total, free in re.findall(r"^(\d+), (\d+)$", found, re.M)]


def host_memory() -> tuple[float, float]:
    """Bytes of memory and those that are free; in a container no more than it may use. Linux only, else infinite."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return float("inf"), float("inf")
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    if limit is None:
        return total, free
    return min(total, limit), min(free, max(0, limit - (_number(Path("/sys/fs/cgroup/memory.current")) or 0)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None
