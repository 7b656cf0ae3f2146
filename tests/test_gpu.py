"""The trainer on a real NVIDIA GPU: the same update as on the CPU, over NCCL and over gloo, whichever works."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.test_backend import free_port
from tests.test_policy import run
from tests.tiny import make_model
from trainer.notes import Notes
from trainer.trial import works

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def on_cpu(tiny, tmp_path_factory):
    return run(tiny, tmp_path_factory.mktemp("cpu"))


def same_update(one: list[dict], other: list[dict], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        gap = np.linalg.norm(np.subtract(a["gradient"], b["gradient"])) / np.linalg.norm(a["gradient"])
        assert gap < tolerance, gap
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_with_nccl_makes_the_update_of_the_cpu(tiny, on_cpu, tmp_path, stage):
    found = run(tiny, tmp_path, "trainer.backend=nccl", f"trainer.zero_stage={stage}", gpu=True)
    if stage:
        same_update(on_cpu, found, 1e-4)
    assert found[-1]["weights"] == pytest.approx(on_cpu[-1]["weights"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gloo_exchanges_gradients_of_gpu_ranks(tiny, on_cpu, tmp_path, stage):
    """What virtual GPUs need: two ranks, CUDA tensors, no NCCL."""
    options = ["trainer.backend=gloo", f"trainer.zero_stage={stage}", "trainer.tokens_per_micro_batch=45"]
    found = run(tiny, tmp_path, *options, world=2, gpu=True)
    if stage:
        same_update(on_cpu, found, 1e-4)
    assert found[-1]["weights"] == pytest.approx(on_cpu[-1]["weights"], rel=1e-4)


def test_one_gpu_is_tried_with_nccl_in_a_process_of_its_own():
    """Skips where NCCL does not work here: then the reason is what `auto` would say of several."""
    notes = Notes(dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True), 0, ["rank 0"])
    if said := works("nccl", notes, torch.device("cuda", 0)):
        pytest.skip(f"NCCL failed: {said}")


def test_a_gpu_is_looked_at_without_taking_it():
    """In compute mode EXCLUSIVE_PROCESS the process of the trial would be refused."""
    code = (
        "import torch; from trainer.backend import Card; Card.here(torch.device('cuda', torch.cuda.device_count() - 1))"
        "; print([torch._C._cuda_hasPrimaryContext(one) for one in range(torch.cuda.device_count())])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "True" not in said and "False" in said


def test_two_ranks_on_one_gpu_take_gloo_and_cannot_have_nccl(tiny, on_cpu, tmp_path):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several GPUs")
    found = run(tiny, tmp_path / "auto", "trainer.backend=auto", "trainer.tokens_per_micro_batch=45", world=2, gpu=True)
    same_update(on_cpu, found, 1e-4)
    with pytest.raises(AssertionError, match="ranks 0 and 1 share a GPU, which NCCL refuses"):
        run(tiny, tmp_path / "nccl", "trainer.backend=nccl", world=2, gpu=True)


def test_bfloat16_resumes_exactly_on_a_gpu(tiny, tmp_path):
    whole = run(tiny, tmp_path / "whole", "model.dtype=bfloat16", steps=4, gpu=True)
    run(tiny, tmp_path / "cut", "model.dtype=bfloat16", steps=2, gpu=True)
    resumed = run(tiny, tmp_path / "cut", "model.dtype=bfloat16", steps=4, incarnation=2, gpu=True)
    assert resumed == whole[2:]


def test_adapters_have_their_base_model_as_reference_on_a_gpu(tiny, tmp_path):
    records = run(tiny, tmp_path, "model.dtype=bfloat16", "lora.rank=4", steps=3, gpu=True)
    assert records[0]["kl"] == 0.0 and records[2]["kl"] > 0.0
