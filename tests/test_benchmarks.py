"""Benchmarks measure what they say: right groups through the real hub, the right share of weights. Never how fast."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gloo, real_samplers, simulated_samplers, wire, wire_turn
from benchmarks.hub import carried
from benchmarks.hub_load import Size, make_group, make_recipe
from benchmarks.hub_parts import broadcast, parts
from benchmarks.processes import Children, in_child
from benchmarks.scale_hub import memory
from benchmarks.scale_steps import beside_the_first, ranks
from benchmarks.snapshots import cost, delta
from protocol.codec import encode, encode_groups
from trainer.accept import has_reference, problem

SIZES = [Size(), Size(prompt=120, length=256, vocabulary=49_152), Size(completions=2, prompt=4, length=4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_the_load_is_made_of_groups_that_a_trainer_accepts(size, reference):
    size = size._replace(reference=reference)
    group, recipe = make_group(size), make_recipe(size)
    assert has_reference(group, recipe) is reference
    checks = {"completions": size.completions, "max_tokens": size.length, "vocabulary": size.vocabulary}
    assert problem(group, **checks, reference=reference) is None
    assert len(encode(group)) > size.tokens * size.floor


def test_clients_are_served_by_the_real_hub_and_their_groups_taken():
    row = carried(Size(reference=True), 2, 2.0)
    assert row["groups/s"] > 0 and row["completions/s"] == pytest.approx(8 * row["groups/s"], rel=0.01)
    assert row["beat p50 ms"] > 0 and {"hub thread", "ZeroMQ", "consumer"} <= row.keys()


def test_the_parts_and_the_broadcast_carry_the_same_group():
    size = Size(reference=True)
    rows = parts(size)
    assert len({row["part"] for row in rows}) == len(rows) == 6
    assert all(0 < row["min"] <= row["ms"] <= row["max"] for row in rows)
    groups = [make_group(size)] * 4
    row = broadcast(groups)
    assert row["MB"] == round(len(encode_groups(groups)) / 1e6, 2) and 0 < row["min"] <= row["ms"] <= row["max"]


# -- the wire ----------------------------------------------------------------------------------------------------


def test_the_wires_limits_are_kept():
    """At most 13 bytes a completion token, the reference's log-prob and the prompt included."""
    for size in wire.SIZES:
        ours, *others = wire.weight(size)
        assert size.floor < ours["bytes/token"] <= 13 and ours["bytes/token"] < 1.12 * size.floor
        assert all(other["bytes/token"] > 2 * ours["bytes/token"] for other in others)


def test_the_floor_is_ids_logprobs_and_the_prompt_once_a_group():
    assert Size(prompt=120, length=256, vocabulary=49_152, reference=True).floor == 2 + 4 + 4 + 2 * 120 / (8 * 256)
    assert Size(prompt=120, length=256).floor == 4 + 4 + 4 * 120 / (8 * 256)


@pytest.mark.parametrize("way", [*wire.SAME_BYTES, "vesper, link", *wire.OTHERS])
def test_every_group_on_the_wire_is_counted_once(way):
    clients = 2 if way == "vesper" else 1
    found = wire_turn.once(way, Size(prompt=20, length=16), clients, groups=20, window=8, per_step=4)
    assert found["sent"] == found["received"] == found["trained"] + found["dropped"] == len(found["late"]) == 20
    assert all(late > 0 for late in found["late"]) and 0 < found["busiest"] <= found["cpu"]


def test_a_count_that_does_not_add_up_ends_the_benchmark(tmp_path):
    hub = {"times": {"0": 2.0}, "frames": 2, "trained": 1, "dropped": {}, "cpu": 1.0, "busiest": 1.0}
    side = {"times": {"0": 1.0}, "frames": 2, "cpu": 1.0, "busiest": 1.0}
    with pytest.raises(SystemExit, match="2 frames sent, 2 received, 1 trained"):
        wire_turn.together(tmp_path, lambda: hub, lambda _: side, clients=1)


def test_a_client_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        wire_turn.together(tmp_path, lambda: time.sleep(60), lambda _: 1 / 0, clients=1)


def test_a_row_says_medians_and_the_ratio_to_raw_of_the_same_round():
    size = Size(completions=8, prompt=1, length=1000)
    one = {"trained": 100, "sent": 100, "received": 100, "dropped": 0}
    rounds = [
        one | {"rate": rate, "cpu": cpu, "busiest": busiest}
        for rate, cpu, busiest in ((50.0, 0.2, 0.1), (80.0, 0.3, 0.2), (120.0, 0.8, 0.4))
    ]
    row = wire.row(size, rounds, np.array([100.0, 100.0, 200.0]), np.array([0.0005, 0.002, 0.0032]))
    assert (row["of raw"], row["min"], row["max"], row["rollouts/s"]) == (0.6, 0.5, 0.8, 640)
    assert (row["CPU us/group"], row["CPU min"], row["CPU max"]) == (3000, 2000, 8000)
    assert (row["busiest us"], row["busiest min"], row["busiest max"]) == (2000, 1000, 4000)
    assert row["of raw by CPU"] == 0.8 and row["CPU s/1e6 tokens"] == 0.375


# -- growth ------------------------------------------------------------------------------------------------------


def test_groups_go_through_the_hub_in_order_and_once():
    rows = memory(1000)
    assert [row["groups"] for row in rows] == [row["trained once"] for row in rows]
    assert rows[-1]["groups"] == 1024 and all(row["RSS MB"] > 0 for row in rows)


def test_growth_is_said_beside_the_first():
    rows = [dict(length=1, tokens=4, flops=10, **{"CPU ms": 2}), dict(length=7, tokens=8, flops=30, **{"CPU ms": 5})]
    grown = beside_the_first(rows, "length")[1]
    assert [grown[f"{name} x"] for name in ("time", "flops", "tokens", "length")] == [2.5, 3.0, 2.0, 7.0]


def test_ranks_share_a_steps_tokens():
    one, four = ranks((1, 4), rounds=1)
    assert one["tokens a rank"] / 4 <= four["tokens a rank"] < 1.1 * one["tokens a rank"] / 4
    assert all(0 < row["min"] <= row["CPU ms"] <= row["max"] for row in (one, four))
    assert one["more than with one"] == 0 <= four["more than with one"] < 0.1


def test_a_delta_counts_the_weights_whose_bits_differ(tmp_path):
    old = {"a": torch.ones(100, 10, dtype=torch.bfloat16), "b": torch.zeros(1000, dtype=torch.bfloat16)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["b"][:40] = 0.5
    new["a"][0, 0] += 1e-4  # smaller than half of the distance to the next bfloat16
    for name, tensors in (("old", old), ("new", new)):
        save_file(tensors, tmp_path / name)
    found = delta(tmp_path / "old", tmp_path / "new")
    assert found["changed"] == 0.02 and found["weights"] == 2000
    assert 0 < found["zlib 1"] < 0.1


def test_a_snapshots_cost_is_measured_with_the_publishers_and_the_readers_code(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.snapshots.SHARD", 1 << 20)
    rows = cost(tmp_path)
    assert len({row["what"] for row in rows}) == 3 and not list(tmp_path.iterdir())
    for row in rows:
        assert row["directory"] == str(tmp_path)
        assert all(0 < row[f"{name} min"] <= row[name] <= row[f"{name} max"] for name in ("GB/s", "by CPU"))


# -- nothing is left behind --------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary directories are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_trainer_that_fails_ends_the_simulated_run(scratch, monkeypatch):
    monkeypatch.setattr(simulated_samplers.rank, "run", lambda *_: 1 / 0)
    monkeypatch.setattr(simulated_samplers.replica, "run", lambda *_: time.sleep(600))
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        simulated_samplers.simulated(2, scratch, 1)
    assert time.monotonic() - begun < 300 and not list(scratch.iterdir())


def test_a_rank_that_fails_ends_the_sums(scratch, monkeypatch):
    monkeypatch.setattr(gloo, "rank", lambda number, *_: time.sleep(60) if number == 0 else 1 / 0)
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        gloo.measured(1)
    assert not list(scratch.iterdir())


def test_two_ranks_sum_tensors(scratch, monkeypatch):
    monkeypatch.setattr(gloo, "SIZES", (1 << 10,))
    rows = gloo.measured(2)
    assert [row["what"] for row in rows] == list(gloo.KINDS) and not list(scratch.iterdir())
    assert all(0 < row["GB/s min"] <= row["GB/s median"] <= row["GB/s max"] for row in rows)


def test_what_a_child_makes_is_removed_by_its_parent(scratch):
    def work(own):
        (own / "left").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SystemExit):
        in_child(work)
    assert not list(scratch.iterdir())


def test_children_do_not_outlive_their_block(tmp_path):
    with pytest.raises(KeyboardInterrupt), Children(tmp_path / "log") as children:
        child = children.start(lambda: time.sleep(60))
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_stopped_leaves_no_directory(tmp_path, number):
    command = [sys.executable, "-m", "benchmarks.scale", "--only", "hub", "--groups", "100000000"]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("*/own/*")):
            time.sleep(0.05)
        process.send_signal(number)
        try:
            process.wait(20)
        finally:
            process.kill()
    assert process.returncode in (-signal.SIGINT, 143) and not list(tmp_path.iterdir())


def test_real_samplers_have_a_gpu_each_though_their_trainer_has_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = []

    @contextlib.contextmanager
    def without_gpus(*_):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield MagicMock()

    def samplers(_, places):
        found.extend(places)
        raise KeyboardInterrupt

    monkeypatch.setattr(real_samplers, "rank_zero", without_gpus)
    monkeypatch.setattr(real_samplers, "Untrained", MagicMock())
    monkeypatch.setattr(real_samplers, "samplers", samplers)
    with pytest.raises(KeyboardInterrupt):
        real_samplers.measured(MagicMock(), make_recipe(Size()))
    assert found == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]


# -- commands ----------------------------------------------------------------------------------------------------

BENCHMARKS = sorted(Path(__file__).parents[1].glob("benchmarks/[!_]*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_every_file_that_is_called_says_what_it_is(file):
    """Called in a child: some change what they measure before they read their arguments."""
    said = in_child(lambda _: said_by(file))
    assert "usage: " in said or "python -m benchmarks." in said


def said_by(file: Path) -> str:
    sys.argv = [str(file), "--help", "--help"]  # one argument alone is a parent's request
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    return f"{out.getvalue()} {ended.value}"


@pytest.mark.parametrize(("name", "flag"), [("samplers", "--real"), ("wire", "--only"), ("scale", "--groups")])
def test_a_help_loads_no_engine(name, flag):
    code = f"import sys; import benchmarks.{name}; sys.argv[1:] = ['--help']\n"
    code += f"try: benchmarks.{name}.main()\nfinally: assert not {{'torch', 'deepspeed', 'vllm'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and flag in done.stdout, done.stderr


def test_a_part_of_a_benchmark_says_of_which():
    command = [sys.executable, "-m", "benchmarks.processes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr == "a part of another benchmark: python -m benchmarks.hub\n"


@pytest.mark.slow
@pytest.mark.long
def test_simulated_samplers_feed_a_whole_run():
    command = [sys.executable, "-m", "benchmarks.samplers", "--counts", "4", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["joined"] == row["samplers"] == 4 and row["groups/s"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_both_ways_of_publishing_are_measured_on_each_rank(tmp_path):
    command = [sys.executable, "-m", "benchmarks.publish", "--hidden", "64", "--layers", "2", "--rounds", "1"]
    command += ["--vocabulary", "256", "--limit-mb", "0.2", "--stages", "1"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["rank"] for row in rows] == [0, 0, 1, 1] and not list(tmp_path.glob("publish-*"))
    assert all(0 < row["seconds min"] <= row["seconds"] <= row["seconds max"] for row in rows)
