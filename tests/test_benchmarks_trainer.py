"""`benchmarks.trainer` compares the same tokens in all three ways, and its arithmetic is right. Never how fast."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks.measure import emit, machine
from benchmarks.steps import alone
from benchmarks.trainer import facts, measured, refuse, seconds_row
from benchmarks.ways import (
    Padded,
    made_up,
    padded,
    padded_rows,
    plain_loss,
    recipe_of,
    recorded,
    size,
    tokens_of,
    trl,
    trl_trainer,
)
from policy.logprobs import pack
from protocol.codec import unpack
from protocol.errors import UserError
from protocol.process import members
from tests import warm
from tests.groups import make_group
from tests.tiny import make_model
from trainer.engine import Policy
from trainer.ranks import Ranks
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
    [micro] = padded_rows(groups, 8)
    assert micro.ids.shape == micro.seen.shape == (4, 5 + 7) and micro.prompt == 5
    assert micro.seen.sum() == 4 * 5 + 13 and micro.scored.sum() == 13
    rows = [(unpack(one.prompt), [unpack(two.tokens) for two in one.completions]) for one in groups]
    packed = pack(rows)
    assert packed.targets.tolist() == micro.ids[:, micro.prompt :][micro.scored].tolist()
    assert packed.input_ids.shape[1] == size(groups) - 4  # the last token of a completion is only a target


def test_each_micro_batch_is_padded_to_its_own_longest():
    groups = [make_group(0, rewards=[0.0, 1.0, 0.0], lengths=[3, 1, 7]), make_group(1, rewards=[1.0], lengths=[2])]
    first, second = padded_rows(groups, 2)
    assert (first.ids.shape, second.ids.shape) == ((2, 5 + 3), (2, 5 + 7))
    assert tokens_of([first, second]) == 13
    assert second.advantages.tolist() == [[-1.0], [1.0]] and second.old.shape == (2, 7)


def test_the_plain_loss_is_ppos():
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]])
    micro = Padded(
        ids=torch.zeros(2, 3), seen=torch.ones(2, 3), prompt=1, scored=torch.tensor([[True, True], [True, False]]),
        old=torch.tensor([[-1.0, -3.0], [-2.0, 0.0]]), advantages=torch.tensor([[1.0], [-1.0]]),
    )  # fmt: skip
    e = float(np.e)
    assert float(plain_loss(logprobs, micro, 3)) == pytest.approx((-1 - 1.2 + e) / 3)
    assert float(plain_loss(logprobs, micro, 6)) == pytest.approx((-1 - 1.2 + e) / 6)  # of two such micro-batches


def options_of(directory, **changed) -> Namespace:
    usual = {"model": directory, "dtype": "float32", "checkpointing": "off", "rows": 8, "threads": 1}
    return Namespace(**usual | changed)


def test_what_was_asked_for_stands_beside_the_rows(capsys):
    options = options_of("tiny", tokens=100, prompt=9, completion=8, group=4, run=None)
    emit("trainer", [], **facts(options))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["completions_a_pass"] == 8 and said["group"] == 4 and said["rows"] == []


def gradient(model) -> torch.Tensor:
    return torch.cat([one.grad.flatten().float() for one in model.parameters()])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


GROUPS = [make_group(0, rewards=[0.0, 1.0, 1.0], lengths=[3, 9, 7]), make_group(1, rewards=[1.0, 0.0], lengths=[2, 30])]


trls_warnings = pytest.mark.filterwarnings("ignore")
"""Of the vLLM that it was not tried with, for example."""


@trls_warnings
@pytest.mark.parametrize("rows", [1, 2])
def test_trls_gradient_is_that_of_one_batch(tiny, rows, monkeypatch):
    found = []
    for number in (8, rows):
        made = keep_trainer(monkeypatch)
        work, update = trl(tiny, padded_rows(GROUPS, number), options_of(tiny, rows=number))
        work()
        found.append(gradient(made[0].model))
        update()
        assert all(one.grad is None for one in made[0].model.parameters())
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def keep_trainer(monkeypatch) -> list:
    made = []

    def kept(*arguments):
        made.append(trl_trainer(*arguments))
        return made[0]

    monkeypatch.setattr("benchmarks.ways.trl_trainer", kept)
    return made


@trls_warnings
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_trls_layers_compute_twice_with_checkpointing(tiny, checkpointing, monkeypatch):
    made, calls = keep_trainer(monkeypatch), []
    work, _ = trl(tiny, padded_rows(GROUPS, 8), options_of(tiny, checkpointing=checkpointing))
    for layer in made[0].model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    work()
    assert len(calls) == (4 if checkpointing == "on" else 2)


@trls_warnings
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trl_has_its_own_optimizer_and_precision(tiny, dtype):
    trainer = trl_trainer(tiny, 2, options_of(tiny, dtype=dtype))
    assert trainer.accelerator.mixed_precision == ("bf16" if dtype == "bfloat16" else "no")
    assert trainer.model.dtype == getattr(torch, dtype)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]


def test_paddeds_gradient_is_that_of_one_batch(tiny, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    alone()
    options, found = options_of(tiny), []
    with Ranks("auto", 1) as ranks:
        policy = Policy(recipe_of(options), tiny, ranks)
        monkeypatch.setattr(policy, "backward", lambda loss: loss.backward())
        for rows in (8, 2):
            work, _ = padded(policy, padded_rows(GROUPS, rows))
            work()
            found.append(gradient(policy.model))
            policy.model.zero_grad()
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


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


def test_the_machines_facts_name_what_is_installed():
    versions = machine()["versions"]
    assert versions["torch"] == torch.__version__ and {"python", "transformers", "deepspeed", "trl"} <= versions.keys()


def test_a_value_that_is_missing_is_an_empty_cell_and_null(capsys):
    emit("a", [{"way": "x", "GiB": None, "ended": "killed"}, {"way": "y", "GiB": 1.5}])
    *_, first, second, line = capsys.readouterr().out.splitlines()
    assert first.split() == ["x", "killed"] and second.split() == ["y", "1.5"]
    assert json.loads(line)["rows"][0]["GiB"] is None


def test_what_has_no_gradient_is_refused(tmp_path):
    stream = StreamWriter(tmp_path / "stream", 1, on=True)
    (tmp_path / "stream").mkdir()
    stream.keep(1, [make_group(0, rewards=[1.0, 1.0])])
    fine = {"group": 2, "run": None, "rows": 1}
    refuse(Namespace(**fine))
    for wrong in ({"group": 1}, {"run": tmp_path}, {"rows": 0}):
        with pytest.raises(UserError, match=f"^--{next(iter(wrong))} "):
            refuse(Namespace(**fine | wrong))


def test_a_refusal_is_one_line_and_exit_code_2():
    done = warm.run(["-m", "benchmarks.trainer", "--memory", "--group", "1"], os.environ)
    *_, said = done.stderr.splitlines()  # engines say something when they are imported
    assert done.returncode == 2 and said.startswith("error: --group 1: ") and "Traceback" not in done.stderr


def test_a_measurement_of_memory_that_is_ended_leaves_no_child(tiny):
    command = [sys.executable, "-m", "benchmarks.trainer", "--memory", "--model", str(tiny), "--tokens", "100"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(members(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the child is one of its own by now
    process.terminate()
    assert process.wait(30) == 143 and not members(process.pid)


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
