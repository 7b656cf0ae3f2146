"""The arithmetic of the benchmarks of sampler and weights. Never how fast."""

import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import sampler_turns, weight_switches
from benchmarks.child import Child
from benchmarks.sampler import VARIANTS
from benchmarks.sampler_turns import Measured, environment_of, kind_of, parameters, roofs, row
from benchmarks.weights_notes import COLUMNS, parts, percentile, stall, summary
from protocol.resolve import load
from protocol.rundir import RunDir
from tests import warm
from tests.tiny import make_model
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


@pytest.mark.parametrize(("count", "rows"), [(12, {"p50": 6, "max": 12}), (20, {"p50": 10, "p95": 19, "max": 20})])
def test_p95_is_left_out_where_it_is_the_largest(count, rows):
    switches = [dict.fromkeys(COLUMNS, float(value)) for value in range(count, 0, -1)]
    found = summary(switches, {"variant": "full"})
    assert {one["of"]: one["switch"] for one in found} == rows


def test_no_old_weights_are_announced_after_new_ones():
    begun, go_on, committed = threading.Event(), threading.Event(), []

    def commit(pulse, step):
        if threading.current_thread() is taking:
            begun.set()
            go_on.wait(10)
        committed.append(pulse)

    takes = iter(["group", None])
    steps = weight_switches.Steps(SimpleNamespace(commit=lambda *_: None, take=lambda _: next(takes)), None, "old")
    steps._inbox.commit = commit
    taking = steps._thread
    taking.start()
    assert begun.wait(10)
    threading.Timer(0.2, go_on.set).start()
    steps.announce("new", 2)
    taking.join(10)
    assert committed == ["old", "new"]


def test_a_sampler_has_the_environment_from_outside_of_the_rank_without_gpus(monkeypatch, tmp_path):
    """And what comes after finds the GPUs again."""
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setattr(weight_switches, "start", lambda command, *, log, environment: seen.append(environment))
    monkeypatch.setattr(weight_switches, "end", lambda process, grace_s: None)
    monkeypatch.setattr(weight_switches, "wait", lambda *_: None)
    monkeypatch.setattr(weight_switches, "counted", lambda *_: [os.environ["CUDA_VISIBLE_DEVICES"]])
    recipe = load(None, [f"model.path={make_model(tmp_path / 'tiny')}", *weight_switches.SETTINGS])
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    assert weight_switches.run(rundir, recipe, 1) == [""]
    assert seen == [{"CUDA_VISIBLE_DEVICES": "3"}] and os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"


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


def test_parameters_are_counted_whatever_type_the_files_have(tmp_path):
    save_file({"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(2, dtype=torch.float64)}, tmp_path / "two.safetensors")
    assert parameters(tmp_path) == 24


def test_a_roof_of_wider_numbers_is_lower(tmp_path, monkeypatch):
    """Same files, same speed of the machine: float32 has twice the bytes to read."""
    directory, products = make_model(tmp_path / "tiny"), []

    def calls_per_s(work):
        memory = getattr(work, "__self__", None)
        if memory is not None:
            return 1e9 / memory.nbytes
        products.append(work())
        return 1e12  # reading is the limit

    monkeypatch.setattr(sampler_turns, "roof", calls_per_s)
    threads = torch.get_num_threads()
    recipes = [load(None, [f"model.path={directory}", f"model.dtype={dtype}"]) for dtype in ("bfloat16", "float32")]
    narrow, wide = (roofs(recipe)["roof tokens/s"] for recipe in recipes)
    torch.set_num_threads(threads)
    assert wide == pytest.approx(narrow / 2, rel=1e-3)
    assert [one.dtype for one in products] == [torch.bfloat16, torch.float32]
    assert products[0].shape == (recipes[0].sampler.max_running, 128)  # the model's intermediate size


def test_each_variant_has_its_engine_and_bare_vllm_none_of_our_tuning(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [kind_of(variant) for variant in VARIANTS] == ["bare", "in-process", *["ours"] * 5]
    recipe = load(None, [])
    bare, inside, ours = (environment_of(kind, recipe) for kind in ("bare", "in-process", "ours"))
    assert inside == ours == bare | {"GOMP_SPINCOUNT": ours["GOMP_SPINCOUNT"]}
    assert "GOMP_SPINCOUNT" not in bare and bare["OMP_NUM_THREADS"] == ours["OMP_NUM_THREADS"]


@pytest.mark.slow
def test_bare_vllm_is_given_what_the_recipe_sets_and_no_more(tmp_path):
    from benchmarks.engine_run import bare_arguments, plain, sampling

    directory = make_model(tmp_path / "tiny")
    recipe = load(None, [f"model.path={directory}", 'sampling.stop=["x"]', 'sampling.stop_after=["y"]'])
    bare, inside = (bare_arguments(kind, recipe, directory) for kind in ("bare", "in-process"))
    assert not {"disable_log_stats", "logprobs_mode", "worker_extension_cls"} & inside.keys()
    assert "distributed_executor_backend" not in bare and bare == {
        name: value for name, value in inside.items() if name != "distributed_executor_backend"
    }
    fixed, ends = sampling(recipe, directory, fixed=True)
    assert (fixed["stop"], ends, fixed["ignore_eos"]) == ([], [], True)
    assert plain(recipe, directory, fixed=True).stop == [] and plain(recipe, directory, fixed=False).stop == ["x", "y"]


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


PARTS = ("sampler_turns", "weight_switches", "weights_notes", "rank_zero", "child", "engine_run", "weights_sampler")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_started_alone_names_its_benchmark(name):
    done = warm.run(["-m", f"benchmarks.{name}"], os.environ)
    *_, said = done.stderr.splitlines()
    named = re.findall(r"python -m (benchmarks\.\w+)", said)
    assert done.returncode == 1 and "part of" in said and named, done.stderr
    assert all(find_spec(one) for one in named)
