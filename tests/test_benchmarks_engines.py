"""The arithmetic of the benchmarks of sampler and weights. Never how fast."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.child import Child
from benchmarks.sampler_turns import Measured, row
from benchmarks.weight_switches import parts
from benchmarks.weights_notes import percentile, stall
from trainer.shards import finite

STEP_S = 0.125


def test_a_stall_is_what_a_pause_is_longer_than_a_usual_step():
    before = [STEP_S * step for step in range(41)]  # until 5.0
    during = [5.125, 5.875, 6.0, 6.25]  # 0.75 s without a token, and a step of twice the usual time
    lost, usual = stall([*before, *during, 9.0], begun=5.0, ended=6.5)
    assert (lost, usual) == (0.625, STEP_S)
    assert stall([*before, 5.125, 9.0], begun=5.0, ended=6.5) == (0.0, STEP_S)  # idle later: not the switch's


def test_a_percentile_is_one_of_the_values():
    values = [float(value) for value in range(20, 0, -1)]
    assert percentile(values, 0.5) == 10.0
    assert percentile(values, 0.95) == 19.0
    assert percentile([3.0], 0.95) == 3.0


def test_the_parts_of_a_switch_add_up_to_it():
    times = {"announced": 11.5, "read": 12.0, "paused": 12.25, "loaded": 13.0, "first": 13.5, "checked": 14.0}
    sampled_at = [STEP_S * step for step in range(101)]
    found = parts(10.0, 11.0, {"canary": 0.25}, times | {"sampled_at": sampled_at})
    names = ("canary", "write", "announce", "read", "pause", "load", "first")
    assert [found[name] for name in names] == [0.25, 0.75, 0.5, 0.5, 0.25, 0.75, 0.5]
    assert sum(found[name] for name in names) == found["switch"] == 3.5
    assert found["checked"] == 4.0


def measured(rates: list[float], cpu: float) -> list[Measured]:
    return [Measured(tokens=1000, seconds=1000 / rate, python=0.5, cpu=cpu) for rate in rates]


def test_a_ratio_is_the_median_of_those_of_each_round():
    """A machine that is half as fast in one round changes no ratio."""
    bare, ours = measured([100.0, 50.0, 200.0], 4.0), measured([90.0, 45.0, 160.0], 5.0)
    found = row("log-probs", ours, bare, {"roof tokens/s": 450.0})
    assert (found["tokens/s"], found["of first"], found["least"]) == (90, 0.9, 0.8)
    assert (found["by CPU"], found["of roof"]) == (0.8, 0.2)
    assert (found["python ms/token"], found["cpu ms/token"]) == (0.5, 5.0)


def test_a_child_that_ends_is_said_with_its_log(tmp_path):
    with Child("measure", {}, tmp_path / "log", {}) as child, pytest.raises(SystemExit, match="gave no answer"):
        child.ask(timeout_s=30.0)
    assert "measure has no figures of its own" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    tensor = torch.ones(10_000, dtype=dtype)
    tensor[5] = value
    assert not finite(tensor)
    tensor[6] = -value
    assert not finite(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sum_that_is_too_large_for_its_type_proves_nothing(dtype):
    assert finite(torch.full((10_000,), torch.finfo(dtype).max, dtype=dtype))
    assert finite(torch.zeros(0, dtype=dtype)) and finite(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["sampler", "weights"])
def test_help_loads_no_engine(name):
    code = f"import sys; import benchmarks.{name} as it; sys.argv[1:] = ['--help']\n"
    code += "try: it.main()\nfinally: assert not {'torch', 'numpy', 'vllm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--recipe" in done.stdout, done.stderr


def test_parts_name_their_benchmark():
    for name in ("engine_run", "sampler_turns", "weight_switches", "weights_notes", "weights_sampler", "child"):
        text = Path(f"benchmarks/{name}.py").read_text()
        assert "part of" in text and "python -m benchmarks." in text
