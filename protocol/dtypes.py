"""Which dtype this machine computes models in faster, known without loading torch."""

import re
import shutil
from pathlib import Path
from typing import Literal

from protocol.process import visible_gpus
from protocol.recipe import Recipe

CPUINFO = Path("/proc/cpuinfo")
Dtype = Literal["bfloat16", "float32"]


def faster_dtype() -> Dtype:
    """What `model.dtype = "auto"` stands for."""
    # DeepSpeed's launcher names a GPU to its ranks on machines that have none.
    return "bfloat16" if shutil.which("nvidia-smi") and visible_gpus() else cpu_dtype()


def cpu_dtype() -> Dtype:
    """bfloat16 on CPUs with units for it: AMX (not measured), and AMD's AVX512-BF16.

    One core's matrix products in bfloat16 and in float32, in GFLOP/s, torch 2.13: 240 to 320, 72 to 85 (AMD EPYC), 80
    and 145 (Intel Xeon, AVX512-BF16 and no AMX), 12 and 70 (the same with AVX2 alone, where a training step takes more
    than twenty times as long).
    """
    try:
        text = CPUINFO.read_text()
    except OSError:
        return "float32"
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    units = {"amx_bf16", "avx512_bf16"} if "AuthenticAMD" in text else {"amx_bf16"}
    return "bfloat16" if found & units else "float32"


def dtype_advice(recipe: Recipe) -> str | None:
    """One line where this CPU computes the recipe's dtype slower than the other one."""
    if recipe.model.dtype == "bfloat16" and cpu_dtype() == "float32":
        return (
            "this CPU computes float32 faster than bfloat16, without AVX512 many times faster: "
            "model.dtype = 'auto' takes what is faster"
        )
    return None
