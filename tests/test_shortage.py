"""A lack of memory is one line with numbers and settings, exit code 77, and no restart."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.processes import free_port
from launch.local import Ended, Worker
from protocol.errors import OutOfMemory
from protocol.failure import failure
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from tests.tiny import make_model
from trainer.shortage import shortage_explained

CUDA = (
    "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 31.73 GiB of which 1.10 GiB is "
    "free. Process 4711 has 30.62 GiB memory in use. Of the allocated memory 29.1 GiB is allocated by PyTorch"
)
HUNGRY = """
import functools, torch
from protocol.cli import exit_with
from tests.chaos.toy import ToyPolicy
from trainer import rank
from trainer.__main__ import main
class Hungry(ToyPolicy):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        torch.zeros(2**50, dtype=torch.uint8)
rank.run = functools.partial(rank.run, make_policy=Hungry)
exit_with(main)
"""
"""A trainer whose policy wants more than any machine has."""


def told(error: BaseException, *overrides: str) -> str:
    with pytest.raises(OutOfMemory) as caught, shortage_explained(load(None, list(overrides))):
        raise error
    return str(caught.value)


def test_a_full_gpu_is_told_with_torchs_numbers_and_the_settings_that_help():
    said = told(torch.OutOfMemoryError(CUDA), "trainer.gradient_checkpointing=false")
    assert "Tried to allocate 2.32 GiB" in said and "1.10 GiB is free" in said and "Process 4711" not in said
    for setting in ("tokens_per_micro_batch (now 8192)", "logits_chunk (now 128)", "zero_stage = 3"):
        assert setting in said
    assert "gradient_checkpointing = true" in said and "\n" not in said
    less = told(torch.OutOfMemoryError(CUDA), "trainer.zero_stage=3", "lora.rank=8")
    assert "gradient_checkpointing" not in less and "zero_stage" not in less and "lora.rank" not in less


def test_what_torch_says_on_a_cpu_and_what_libraries_say_counts_too():
    expected = pytest.raises(OutOfMemory, match="you tried to allocate 1125899906842624 bytes; this process had")
    with expected, shortage_explained(load(None, [])):
        torch.zeros(2**50, dtype=torch.uint8)
    assert "CUBLAS_STATUS_ALLOC_FAILED" in told(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))
    assert "MemoryError" in told(MemoryError())


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), shortage_explained(load(None, [])):
        raise RuntimeError("shape '[2]' is invalid")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("L2")
def test_a_rank_that_is_out_of_memory_says_so_and_is_not_started_again(tmp_path):
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    settings = [f"model.path={make_model(tmp_path / 'model')}", "trainer.gpus=1", "trainer.backend=gloo"]
    rundir.recipe.write_text(dump(load(None, settings)))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-c", HUNGRY, "--run", str(rundir.path)]
    log = tmp_path / "trainer.log"
    worker = Worker("trainer", command, rundir.path, log, place | {"PYTHONPATH": str(Path.cwd())})
    worker.start()
    with pytest.raises(Ended, match="out of memory: you tried to allocate") as ended:
        while not worker.ended(complete=False):
            time.sleep(0.1)
    assert ended.value.exit_code == OutOfMemory.exit_code and not worker.restarts
    code, message = failure(rundir.path, "trainer")
    assert code == 77 and "trainer.tokens_per_micro_batch (now 8192)" in message
    assert "Traceback" not in log.read_text()
    assert "Change a setting that the message names" in (rundir.path / "FAILED.md").read_text()
