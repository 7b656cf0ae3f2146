"""A checkpoint of some ranks, converted so that any number of ranks can load it.

DeepSpeed keeps the optimizer's state cut up by rank. Its own converter joins the pieces of every parameter again
("universal checkpoint", arXiv 2406.18820). It unpickles: only a verified checkpoint may be converted.
"""

import subprocess
import sys
from pathlib import Path

from protocol.errors import StorageError
from protocol.process import end, start

PATIENCE_S = 1500.0
"""Less than the other ranks wait in a collective (`ranks.TIMEOUT`)."""
GROWTH = 3
"""Room that a conversion takes, in sizes of the checkpoint: pieces, joined pieces, and frozen weights in float32."""


def convert(source: Path, target: Path) -> None:
    """Writes the universal form of DeepSpeed's directory `source` to `target`, and a log beside it.

    Runs in a process of its own: its memory and its workers end with it. Raises StorageError with its last line.
    """
    folders = ["--input_folder", str(source), "--output_folder", str(target)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", *folders]
    path = target.with_name("convert.log")
    with path.open("wb") as log:
        process = start(command, log=log, environment={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
        try:
            why = f"exit code {process.wait(PATIENCE_S)}"
        except subprocess.TimeoutExpired:
            why = f"not done after {PATIENCE_S:.0f} s"
        finally:
            end(process, grace_s=0.0)
    if why != "exit code 0":
        lines = path.read_text(errors="replace").splitlines()
        raise StorageError(f"DeepSpeed could not convert {source.parent}: {why}: {(lines or ['no output'])[-1]}")
