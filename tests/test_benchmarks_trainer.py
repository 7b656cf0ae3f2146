"""`benchmarks.trainer` compares the same tokens in all three ways, and its arithmetic is right. Never how fast."""

import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks.trainer import measured, seconds_row
from benchmarks.ways import made_up, padded_rows, plain_loss, recorded, size
from policy.logprobs import pack
from protocol.codec import unpack
from tests.groups import make_group
from tests.tiny import make_model
from trainer.stream import StreamWriter

OPTIONS = Namespace(tokens=300, prompt=9, completion=10, group=4)


def test_made_up_groups_have_the_tokens_asked_for_and_lengths_that_differ():
    groups = made_up(OPTIONS, 320)
    assert 300 <= size(groups) < 300 + 9 + 4 * 40
    lengths = [len(unpack(one.tokens)) for group in groups for one in group.completions]
    assert len(set(lengths)) > 5 and 2 <= min(lengths) <= max(lengths) <= 40
    assert size(made_up(OPTIONS, 320)) == size(groups)  # the same ones again


def test_padded_rows_hold_the_tokens_of_the_packed_row():
    groups = [make_group(0, rewards=[0.0, 1.0, 0.0], lengths=[3, 1, 7]), make_group(1, rewards=[1.0], lengths=[2])]
    ids, seen, prompt, scored = padded_rows(groups)
    assert ids.shape == seen.shape == (4, 5 + 7) and prompt == 5
    assert seen.sum() == 4 * 5 + 13 and scored.sum() == 13
    rows = [(unpack(one.prompt), [unpack(two.tokens) for two in one.completions]) for one in groups]
    packed = pack(rows)
    assert packed.targets.tolist() == ids[:, prompt:][scored].tolist()
    assert packed.input_ids.shape[1] == size(groups) - 4  # the last token of a completion is only a target


def test_the_plain_loss_is_ppos():
    logprobs, old = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]]), torch.tensor([[-1.0, -3.0], [-2.0, 0.0]])
    scored, advantages = torch.tensor([[True, True], [True, False]]), torch.tensor([[1.0], [-1.0]])
    e = float(np.e)
    assert float(plain_loss(logprobs, scored, old, advantages)) == pytest.approx((-1 - 1.2 + e) / 3)


def test_a_recorded_streams_groups_without_signal_are_left_out(tmp_path):
    stream = StreamWriter(tmp_path / "stream", 1, on=True)
    (tmp_path / "stream").mkdir()
    stream.keep(1, [make_group(0), make_group(1, rewards=[1.0, 1.0])])
    stream.keep(2, [make_group(2), make_group(3)])
    assert [group.group_id for group in recorded(tmp_path, 10_000)] == [0, 2, 3]
    assert [group.group_id for group in recorded(tmp_path, size([make_group(0)]))] == [0]


def test_ways_take_turns_and_the_first_turn_is_left_out():
    turns = []

    def way(name):
        return lambda: turns.append(name), lambda: turns.append(f"{name} updates")

    found = measured({"a": way("a"), "b": way("b")}, rounds=2)
    assert turns == ["a", "a updates", "b", "b updates"] * 3
    assert [len(times) for times in found.values()] == [2, 2]


def test_rates_and_shares_follow_from_the_seconds():
    row = seconds_row("a", [(2.0, 1.0), (4.0, 1.0), (3.0, 2.0)], tokens=600, least=1.5)
    assert (row["pass s"], row["min"], row["max"], row["update s"]) == (3.0, 2.0, 4.0, 1.0)
    assert (row["tokens/s, pass"], row["tokens/s, step"]) == (200.0, 120.0)
    assert (row["pass of roof"], row["step of roof"]) == (0.5, 0.3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [["--rounds", "1"], ["--memory"]])
def test_all_ways_run_with_any_model(tmp_path, flags):
    command = [sys.executable, "-m", "benchmarks.trainer", "--model", str(make_model(tmp_path / "tiny")), *flags]
    command += ["--tokens", "100", "--prompt", "9", "--completion", "8", "--group", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["way"] for row in rows} == {"packed", "padded", "trl"}
    if "--memory" in flags:
        assert len(rows) == 6 and all(row["GiB above rest"] >= 0 for row in rows)
    else:
        assert all(row["tokens/s, step"] > 0 and row["pass of roof"] > 0 for row in rows)
