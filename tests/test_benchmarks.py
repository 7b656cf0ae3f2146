"""Benchmarks measure what they say: right groups through the real hub, the right share of weights. Never how fast."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import wire, wire_turn
from benchmarks.hub import carried
from benchmarks.hub_load import Size, make_group, make_recipe
from benchmarks.hub_parts import broadcast, parts
from benchmarks.scale_hub import memory
from benchmarks.scale_steps import beside_the_first, ranks
from benchmarks.snapshots import cost, delta
from protocol.codec import encode, encode_groups
from trainer.accept import has_reference, problem

SIZES = [Size(), Size(prompt=120, length=256, vocabulary=49_152), Size(completions=2, prompt=4, length=4)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("reference", [False, True])
def test_the_load_is_made_of_groups_that_a_trainer_accepts(size, reference):
    size = size._replace(reference=reference)
    group, recipe = make_group(size), make_recipe(size)
    assert has_reference(group, recipe) is reference
    checks = {"completions": size.completions, "max_tokens": size.length, "vocabulary": size.vocabulary}
    assert problem(group, **checks, reference=reference) is None
    assert len(encode(group)) > size.tokens * size.floor


def test_clients_are_served_by_the_real_hub_and_their_groups_taken():
    row = carried(Size(reference=True), 2, 0.5)
    assert row["groups/s"] > 0 and row["completions/s"] == pytest.approx(8 * row["groups/s"], rel=0.01)
    assert row["beat p50 ms"] > 0 and {"hub thread", "ZeroMQ", "consumer"} <= row.keys()


def test_the_parts_and_the_broadcast_carry_the_same_group():
    size = Size(reference=True)
    assert all(part > 0 for part in parts(size).values())
    groups = [make_group(size)] * 4
    assert broadcast(groups)["MB"] == round(len(encode_groups(groups)) / 1e6, 2)


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


@pytest.mark.parametrize("way", ["vesper", "vesper, link", "raw, CURVE", "raw, plain", "pickle", "msgpack lists"])
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


def test_a_row_says_the_ratio_to_raw_of_the_same_round():
    size = Size(completions=8, prompt=1, length=1000)
    one = {"cpu": 0.2, "trained": 100, "sent": 100, "received": 100, "dropped": 0, "busiest": 0.1}
    rounds = [one | {"rate": rate} for rate in (50.0, 80.0, 120.0)]
    row = wire.row(size, rounds, np.array([100.0, 100.0, 200.0]), raw_busiest=0.0008)
    assert (row["of raw"], row["min"], row["max"], row["rollouts/s"]) == (0.6, 0.5, 0.8, 640)
    assert row["of raw by CPU"] == 0.8 and row["CPU s/1e6 tokens"] == 0.25


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
    row = cost(tmp_path)
    assert row["directory"] == str(tmp_path) and not list(tmp_path.iterdir())
    assert all(value > 0 for name, value in row.items() if name != "directory")


BENCHMARKS = sorted(Path(__file__).parents[1].glob("benchmarks/[!_]*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_every_file_that_can_be_called_says_what_it_is(file):
    assert '\nif __name__ == "__main__":\n' in file.read_text()


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
def test_simulated_samplers_feed_a_whole_run():
    command = [sys.executable, "-m", "benchmarks.samplers", "--counts", "4", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["joined"] == row["samplers"] == 4 and row["groups/s"] > 0
