"""Benchmarks measure what they say: right groups through the real hub, the right share of weights. Never how fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.hub import carried
from benchmarks.hub_load import SIZES, make_group, make_recipe
from benchmarks.hub_parts import broadcast, parts
from benchmarks.snapshots import cost, delta
from protocol.codec import encode, encode_groups
from trainer.accept import has_reference, problem


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reference", [False, True])
def test_the_hubs_load_is_made_of_groups_that_a_trainer_accepts(size, reference):
    group, recipe = make_group(size, reference), make_recipe(size, reference)
    count, length = SIZES[size]
    assert has_reference(group, recipe) is reference
    checks = {"completions": count, "max_tokens": length, "vocabulary": 151_936, "reference": reference}
    assert problem(group, **checks) is None
    assert len(encode(group)) > count * length * (12 if reference else 8)  # ids, log-probs, the reference's


def test_clients_are_served_by_the_real_hub_and_their_groups_taken():
    row = carried("8 x 512", True, 2, 0.5)
    assert row["groups/s"] > 0 and row["completions/s"] == pytest.approx(8 * row["groups/s"], rel=0.01)
    assert row["beat p50 ms"] > 0 and {"hub thread", "ZeroMQ", "consumer"} <= row.keys()


def test_the_parts_and_the_broadcast_carry_the_same_group():
    group = make_group("8 x 512", True)
    assert all(part > 0 for part in parts(group, make_recipe("8 x 512", True), 151_936).values())
    data = encode_groups([group] * 4)
    assert broadcast(data, "8 x 512")["MB"] == round(len(data) / 1e6, 2)


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


def test_the_help_of_samplers_loads_no_engine():
    code = "import sys; import benchmarks.samplers; sys.argv[1:] = ['--help']\n"
    code += "try: benchmarks.samplers.main()\nfinally: assert not {'torch', 'numpy', 'vllm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--real" in done.stdout, done.stderr


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
