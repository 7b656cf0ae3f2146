"""The record on disk: written line by line, followed while it grows, read back whatever a killed writer left."""

import subprocess
import sys

import msgspec
import pytest

from protocol.memory import tree_gb
from protocol.metrics import MetricsWriter, Tail, read_metrics
from protocol.rollout import Rollout


def test_a_tail_gives_each_line_once_and_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert list(tail.lines()) == []  # not there yet
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert list(tail.lines()) == [(0, b'{"a": 1}\n'), (9, b'{"a": 2}\n')]
    assert list(tail.lines()) == []
    with path.open("ab") as file:
        file.write(b": 3}\n")
    assert list(tail.lines()) == [(18, b'{"a": 3}\n')]


def test_a_tail_begins_again_when_its_file_was_replaced_by_a_shorter_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(path)
    assert len(list(tail.lines())) == 2
    path.write_bytes(b"new\n")
    assert list(tail.lines()) == [(0, b"new\n")]


def test_what_is_not_finite_is_null_in_the_record(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"loss": float("nan"), "kl": float("inf"), "step": 3})
    [record] = read_metrics(tmp_path / "m.jsonl")
    assert (record["loss"], record["kl"], record["step"]) == (None, None, 3)


def test_a_line_that_a_killed_writer_left_costs_no_other(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "rew')
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
        writer.write({"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert len([line for _, line in Tail(path).lines() if line.startswith(b'{"time_s"')]) == 2


def test_a_rollout_of_an_older_run_is_read_with_defaults():
    old = (
        b'{"time_s": 1.0, "split": "train", "group": 4, "row": 2, "prompt": "2+2?", "completion": "4", "reward": 1.0, '
        b'"rewards": {"gsm8k": 1.0}, "finish": "stop", "tokens": 2, "snapshots": ["s00000000.i0001"], "seconds": 0.5}'
    )
    rollout = msgspec.json.decode(old, type=Rollout)
    assert (rollout.gold, rollout.answers, rollout.specials) == (None, {}, 0)
    assert msgspec.json.decode(msgspec.json.encode(rollout), type=Rollout) == rollout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_counts_what_was_started_too():
    before = tree_gb()
    code = "import sys; from protocol.memory import peak_gb, tree_gb; held = b'x' * (300 << 20)\n"
    code += "print(tree_gb(), peak_gb(), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        alone, peak = map(float, child.stdout.readline().split())
        assert 0.28 < alone <= peak + 0.1  # it has started nothing
        assert tree_gb() - before > 0.28
        assert tree_gb(child.pid) == pytest.approx(0.3, abs=0.1)
        child.communicate()
    assert tree_gb(2**22 + 1) == 0  # no such process
