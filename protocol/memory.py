"""How much memory processes really take. Linux only, else 0."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

GIB = 2**30


def peak_gb() -> float:
    """The most that this process has had in memory, in GiB."""
    return _field(Path("/proc/self/status"), "VmHWM")


def tree_gb(root: int | None = None) -> float:
    """What a process (None: this one) and all that it started take together, shared pages counted once, in GiB."""
    return sum(_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in _tree(root or os.getpid()))


def device_gb(gpus: Sequence[str]) -> float:
    """What all processes together have on the fullest of these GPUs now, in GiB; 0 without any, or without a driver
    that tells. Takes a tenth of a second."""
    if not gpus:
        return 0.0
    command = ["nvidia-smi", f"--id={','.join(gpus)}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return 0.0
    return max(map(int, re.findall(r"^(\d+)$", told, re.MULTILINE)), default=0) * 2**20 / GIB


def _tree(root: int) -> list[int]:
    """The process and its descendants; one that ends meanwhile is left out."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def _field(path: Path, name: str) -> float:
    """`Name:  123 kB` in GiB; 0 where the process is gone or another user's."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) * 2**10 / GIB if found else 0.0
