"""NCCL is tried before it is relied on, gloo gets only calls that it has for CUDA tensors, and both are said."""

import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launch.plan.shape import shape_of
from protocol.resolve import load
from tests import warm
from tests.test_policy import run
from tests.tiny import make_model
from trainer.backend import Card, choose_backend, is_virtual, obstacle
from trainer.notes import Notes
from trainer.ranks import Ranks
from trainer.trial import sum_up, works
from trainer.zero import bucket, exchanged, zero_settings

NAMES = ["rank 0", "rank 1"]
CPU = torch.device("cpu")
FOR_CUDA = {"broadcast_", "allreduce_", "reduce_", "allgather_", "_allgather_base_", "gather_", "scatter_", "barrier"}
"""What gloo stages through host memory for CUDA tensors (ProcessGroupGloo.cpp); `_reduce_scatter_base_`, coalesced
ones, send and recv are not among them."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def trials_of(port: int) -> list[int]:
    """Processes of a trial through the store on this port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainer.trial" in words and str(port).encode() in words:
            found.append(int(path.parent.name))
    return found


def trial(backend: str, deadline_s: float = 90.0, signals: signal.Signals | None = None) -> list[str]:
    """What both of two ranks hear of it; one child gets the signal as soon as it is there."""
    port = free_port()
    stores = [
        dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False, multi_tenant=True)
        for rank in range(2)
    ]

    def hit() -> None:
        while not (found := trials_of(port)):
            time.sleep(0.01)
        os.kill(found[0], signals)

    if signals:
        threading.Thread(target=hit, daemon=True).start()
    with ThreadPoolExecutor(2) as ranks:
        running = [
            ranks.submit(works, backend, Notes(dist.PrefixStore("attempt", store), rank, NAMES), CPU, deadline_s)
            for rank, store in enumerate(stores)
        ]
        heard = [one.result(deadline_s + 60) for one in running]
    assert not trials_of(port)
    return heard


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_find_out_together_whether_a_backend_works():
    assert trial("gloo") == ["", ""]
    if not torch.cuda.is_available():
        one, other = trial("nccl")
        assert one == other and "NCCL" in one and "\n" not in one


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("signals", "said"), [(signal.SIGSTOP, "no answer within 6 s"), (signal.SIGKILL, "was killed by SIGKILL")]
)
def test_a_backend_that_hangs_or_crashes_costs_its_trial_alone(signals, said):
    """The stopped process and the one that waits for it are killed at the deadline; of a dead one all hear at once."""
    began = time.monotonic()
    one, other = trial("gloo", 6.0 if signals == signal.SIGSTOP else 600.0, signals)
    assert one == other and one.startswith(said)
    assert time.monotonic() - began < 300


def test_wrong_sums_are_a_failure(monkeypatch):
    """As on machines whose GPUs cannot reach each other's memory, and do not notice."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor[:1].add_(1.0))
    try:
        with pytest.raises(RuntimeError, match="of a sum over 1 ranks 1 of 1 numbers are wrong"):
            sum_up("gloo", 0, 1, CPU, store)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("cards", "wanted", "said"),
    [
        ([Card(id="a 1"), Card(id="a 2")], "auto", ""),
        ([Card(id="a 1"), Card(id="b 1")], "nccl", ""),
        ([Card(id="a 1"), Card(id="b 1"), Card(id="a 1")], "auto", "ranks 0 and 2 share a GPU"),
        ([Card(id="a 1"), Card(lacks="torch finds no NVIDIA GPU")], "nccl", "torch finds no NVIDIA GPU"),
        ([Card(id="a 1"), Card(id="a 2", virtual="A40-8Q")], "auto", "A40-8Q is a virtual GPU"),
        ([Card(id="a 1"), Card(id="a 2", virtual="A40-8Q")], "nccl", ""),
    ],
)
def test_nccl_is_not_even_tried_where_it_cannot_work(cards, wanted, said):
    assert obstacle(cards, wanted).startswith(said) and bool(obstacle(cards, wanted)) == bool(said)


def test_one_rank_takes_nccl_without_a_trial(monkeypatch):
    """Which would fail here, where there is no GPU."""
    monkeypatch.setattr(Card, "here", lambda device: Card(id="a 1"))
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    assert choose_backend("auto", Notes(store, 0, ["rank 0"]), torch.device("cuda", 0)) == "nccl"


def test_a_rank_takes_its_gpu_only_after_the_trial(monkeypatch, caplog):
    """Where a GPU admits one process, the trial's would be refused. Torch's own words for a virtual GPU are made up."""
    caplog.set_level(logging.INFO)
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="A40-8Q", uuid="1"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append(caplog.text))
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    with Ranks("auto", 1) as ranks:
        assert ranks.backend == "gloo"
    assert len(said) == 1 and "ranks exchange tensors over gloo" in said[0]


@pytest.mark.parametrize(
    ("name", "mode", "virtual"),
    [
        ("GRID A100D-20C", "", True),
        ("NVIDIA RTX6000-Ada-24Q", "", True),
        ("NVIDIA H100-80C", "", True),
        ("NVIDIA A100-SXM4-80GB", "None", False),
        ("Tesla V100-SXM2-32GB", "Pass-Through", False),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", "None", False),
        ("NVIDIA A40", "VGPU", True),
        ("NVIDIA A40", "", False),  # nvidia-smi fails
    ],
)
def test_a_virtual_gpu_is_known_by_its_name_or_by_the_driver(name, mode, virtual, tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    text = f"    GPU Virtualization Mode\n        Virtualization Mode               : {mode}\n"
    fake.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\n" if mode else "#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert is_virtual(name, "1c3d") == virtual


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs NCCL may work")
def test_nccl_that_cannot_work_is_one_line_before_any_model_loads(tiny, tmp_path):
    words = ["-m", "trainer", "--gpus", "2", "--backend", "nccl", "--run", str(tmp_path / "run")]
    words += ["--set", f"model.path={tiny}", "--set", "model.dtype=float32"]
    done = warm.run(words, os.environ)
    assert done.returncode == 2
    said = "error: trainer.backend = 'nccl', but torch finds no NVIDIA GPU; set it to 'gloo' or 'auto'"
    assert said in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_gloo_is_asked_only_for_what_it_has_for_cuda_tensors(tiny, tmp_path, stage, dtype):
    """And for as many bytes as `launch plan` says."""
    options = [f"trainer.zero_stage={stage}", f"model.dtype={dtype}", "trainer.tokens_per_micro_batch=45"]
    *records, trace = run(tiny, tmp_path, *options, world=2, module="tests.collectives")
    assert set(trace["calls"]) <= FOR_CUDA and "allreduce_" in trace["calls"]
    if stage >= 2:  # several buckets, and gradients that are larger than one
        assert trace["calls"]["allreduce_"] > 4 * sum(record["rows"] for record in records)
    if stage < 3:  # 3 keeps small parameters whole, which are all of this model's but one
        trained = shape_of(tiny).parameters
        expected = len(records) * exchanged(load(None, options), trained, trained, records[0]["rows"])
        moved = trace["bytes"]["allreduce_"] + trace["bytes"].get("_allgather_base_", 0) / 2
        assert moved == pytest.approx(expected, rel=0.01)


def test_buckets_follow_the_models_size():
    recipe = load(None, ["trainer.zero_stage=3"])
    assert bucket(recipe, "nccl", 1_500_000_000, 233_000_000) == 50_000_000
    assert bucket(recipe, "nccl", 18_000_000, 400_000) == 1_800_000
    assert bucket(recipe, "gloo", 1_500_000_000, 233_000_000) == 233_000_000
    assert bucket(load(None), "gloo", 1_500_000_000, 233_000_000) == 50_000_000
    assert zero_settings(recipe, "gloo", 1000, 10)["reduce_scatter"] is False
    assert zero_settings(recipe, "nccl", 1000, 10)["reduce_scatter"] is True


def test_adapters_and_low_stages_send_least():
    def sent(*overrides: str, trained: int = 1_500_000_000) -> float:
        return exchanged(load(None, list(overrides)), trained, 1_500_000_000, 4)

    assert sent() == 1_500_000_000 * (8 + 2) / 2
    assert sent("trainer.gpus=1") == 0
    assert sent(trained=18_000_000) < sent() / 50
    assert sent("trainer.zero_stage=1") < sent("trainer.zero_stage=2") < sent("trainer.zero_stage=3")
