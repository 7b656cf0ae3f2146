"""What a worker runs on is in its record, and from there in the history and the report."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from doctor.history import History
from launch.report.command import accounts, page
from protocol import process
from protocol import versions as software
from protocol.metrics import MetricsWriter, read_metrics
from protocol.process import visible_gpus
from protocol.versions import gpus, versions
from tests.test_report import make_run


def nvidia_smi(directory: Path, monkeypatch, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_versions_are_those_that_are_installed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = versions()
    assert found.keys() >= {"python", "torch", "transformers"} and "gpu" not in found
    assert all(found[name] == metadata.version(name) for name in found.keys() & set(software.LIBRARIES))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            'for i in 1 2; do echo "NVIDIA H100, 80GB, 580.65.06"; done; echo "NVIDIA L4, 580.65.06"',
            {"gpu": "2 x NVIDIA H100, 80GB, 1 x NVIDIA L4", "driver": "580.65.06"},
        ),
        ("echo No devices were found", {}),
        ("exit 9", {}),
    ],
)
def test_the_driver_names_the_gpus_or_nothing_is_said(tmp_path, monkeypatch, script, expected):
    nvidia_smi(tmp_path, monkeypatch, script)
    assert gpus(["0", "1", "2"]) == expected


def test_only_the_gpus_of_this_process_are_asked_for(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, 'echo "$*, 580"')
    assert "--id=2,GPU-7" in gpus(["2", "GPU-7"])["gpu"]
    assert gpus([]) == {}


def test_the_history_keeps_starts_apart_and_the_report_shows_them(tmp_path):
    run = make_run(tmp_path / "run")
    with MetricsWriter(run.metrics / "trainer.jsonl") as writer:
        for step in (0, 2):  # it was started twice on the same
            writer.write({"kind": "start", "step": step, "versions": {"torch": "2.14.1", "deepspeed": "0.19.8"}})
    with MetricsWriter(run.metrics / "sampler-a.jsonl") as writer:
        writer.write({"kind": "start", "versions": {"torch": "2.13.0+cpu", "vllm": "<0.32>"}})
        writer.write({"kind": "start", "versions": None})
        writer.write({"tokens": 7})
    history = History.open(run.path)
    assert [worker for worker, _ in history.starts] == ["trainer", "trainer", "sampler"]
    assert [record["tokens"] for record in history.samplers["a"]] == [7]
    assert len(history.steps) == 3
    text = page(accounts([run.path]))
    assert "trainer, 2 starts" in text and "<td>2.14.1</td><td>2.13.0+cpu</td>" in text and "&lt;0.32&gt;" in text


def test_a_driver_that_hangs_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(process, "NVIDIA_SMI_S", 0.3)
    nvidia_smi(tmp_path, monkeypatch, "exec /bin/sleep 600")
    assert visible_gpus() == []
    monkeypatch.setattr(process, "NVIDIA_SMI_S", 20.0)
    nvidia_smi(tmp_path, monkeypatch, 'echo "GPU 0: NVIDIA L4"; echo "GPU 1: NVIDIA L4"')
    assert visible_gpus() == ["0", "1"]


def test_only_the_first_rank_asks_for_versions_and_writes_them(tmp_path):
    from trainer.record import Record

    for first in (False, True):
        with MetricsWriter(tmp_path / f"{first}.jsonl") as writer:
            Record(writer, SimpleNamespace(first=first), SimpleNamespace(spent_s=0.0)).start(0)  # pyright: ignore
    assert list(read_metrics(tmp_path / "False.jsonl")) == []
    assert next(iter(read_metrics(tmp_path / "True.jsonl")))["kind"] == "start"
