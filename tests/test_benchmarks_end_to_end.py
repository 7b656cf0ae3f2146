"""The arithmetic of benchmarks.end_to_end, and that all systems are given the same work."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import end_to_end
from benchmarks.comparison import table
from benchmarks.peers import PEERS, Peer, Workload, watched
from benchmarks.processes import kill, processor_s
from benchmarks.vowels import vowels
from benchmarks.window import bounds, idle, wasted, window
from protocol.errors import RunError, UserError
from protocol.memory import _tree
from protocol.metrics import MetricsWriter
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from trainer.ledger import Ledger


def step(number, time_s, **figures):
    return {"kind": "step", "step": number, "time_s": time_s, "completions/tokens": 100.0 * number, **figures}


RECORDS = [
    {"kind": "start", "step": 0, "time_s": 1.0},
    step(1, 50.0, **{"time/wait_s": 30.0, "groups/train/accepted": 8.0}),
    step(2, 60.0, **{"time/wait_s": 1.0, "time/publish_s": 0.5, "staleness/mean": 1.0, "groups/train/accepted": 16.0}),
    {"kind": "exam", "step": 2, "time_s": 65.0},
    step(3, 75.0, **{"time/wait_s": 4.0, "time/publish_s": 2.0, "staleness/mean": 0.5, "groups/train/accepted": 20.0}),
    step(4, 99.0),
]


def test_a_window_is_between_the_ends_of_two_steps():
    found = window(RECORDS, warm=1, steps=2, rollouts=64)
    assert found.seconds == 25.0 and found.rollouts == 128 and found.tokens == 500.0
    assert found.rate == 128 / 25 and found.step_s == 12.5
    assert found.waited == 0.2 and found.published == 0.1 and found.staleness == 0.75  # nothing of the warm-up
    assert found.dead is None and found.signal_rate is None  # not recorded is not zero


@pytest.mark.parametrize(("warm", "steps"), [(1, 4), (3, 2), (0, 2)])
def test_a_window_that_the_records_do_not_hold_is_refused(warm, steps):
    with pytest.raises(ValueError, match="4 steps are recorded"):
        window(RECORDS, warm=warm, steps=steps, rollouts=64)


def test_waste_is_what_was_answered_and_not_accepted():
    begin = {"groups/train/accepted": 10.0, "groups/eval/accepted": 50.0}
    end = {"groups/train/accepted": 16.0, "groups/train/stale": 1.0, "groups/train/no_signal": 1.0}
    assert wasted(begin, end | {"groups/eval/accepted": 90.0}) == 0.25
    assert wasted(begin, begin) == 0.0


def test_an_engine_is_idle_when_it_has_no_request():
    engine = [
        {"time_s": t, "busy_s": b} for t, b in ((0.0, 0.0), (10.0, 9.0), (20.0, 17.0), (30.0, 22.0), (40.0, 32.0))
    ]
    assert idle([{"kind": "start", "time_s": 10.0}, *engine], 10.0, 35.0) == pytest.approx(1 - 13 / 20)
    assert idle(engine, 11.0, 25.0) is None


def test_shared_cores_bound_by_the_sum_and_own_ones_by_the_slower():
    assert bounds(64, 6.0, 10.0) == {"shared": 4.0, "own": 6.4}


def lasting(*seconds):
    """The windows of one system by round."""
    steps = [[step(1, 0.0), step(2, one)] for one in seconds]
    return {number: window(records, warm=1, steps=1, rollouts=64) for number, records in enumerate(steps)}


def test_ratios_and_efficiency_are_of_windows_of_the_same_round():
    """The second round ran on a machine half as fast; the third lacks a bound."""
    alone = {"sampler-alone": lasting(6.0, 12.0), "trainer-alone": lasting(10.0, 20.0)}
    found = {"ours": lasting(20.0, 40.0, 10.0), **alone, "trl-generate": lasting(64.0, 128.0), "trl-colocate": {}}
    ours, _, _, peer = table("fixed", found)
    assert ours["N/(G+L)"] == 3.0 and ours["N/max(G,L)"] == 4.8 and ours["efficiency"] == 0.8
    assert ours["from"] == ours["to"] == 0.8 and ours["rollouts/s"] == 3.2 and ours["ours / it"] == 1.0
    assert peer["system"] == "trl-generate" and "efficiency" not in peer
    assert peer["ours / it"] == peer["least"] == peer["most"] == peer["by tokens"] == 3.2


def test_a_table_without_ours_or_the_bounds_has_no_ratios():
    [row] = table("natural", {"ours-staleness-0": lasting(20.0)})
    assert row["s a step"] == 20.0 and not {"ours / it", "efficiency"} & set(row)


WORKLOAD = Workload(name="fixed", tokens=24, fixed=True, warm=1, steps=2, dtype="bfloat16")


@pytest.mark.parametrize("name", PEERS)
def test_all_systems_are_given_the_same_work(name):
    ours, recipe = PEERS["ours"].recipe(WORKLOAD), PEERS[name].recipe(WORKLOAD)
    for part in ("data", "sampling", "objective", "optimizer", "model"):
        assert getattr(recipe, part) == getattr(ours, part) or (name, part) == ("ours-float32", "model")
    assert recipe.trainer.prompts_per_step == 8 and recipe.sampling.group_size == 8
    assert recipe.sampling.max_tokens == 24 and recipe.trainer.steps >= 3
    assert load(None, []) != recipe and not recipe.eval.before


@pytest.mark.parametrize("name", ["trl-generate", "trl-colocate-patched"])
@pytest.mark.parametrize("fixed", [True, False])
def test_trl_is_told_the_same_work_in_its_own_words(tmp_path, name, fixed):
    pytest.importorskip("trl")
    from benchmarks.trl_step import configuration

    vllm = "colocate" in name
    recipe = PEERS[name].recipe(replace(WORKLOAD, fixed=fixed))
    options = SimpleNamespace(vllm=vllm, fixed=fixed, rows=8, uncorrected=False, records=tmp_path / "records.jsonl")
    told = configuration(recipe, options)
    assert told.per_device_train_batch_size * told.gradient_accumulation_steps == 64 == told.generation_batch_size
    assert told.num_generations == 8 and told.max_completion_length == 24 and told.num_iterations == 1
    assert told.learning_rate == recipe.optimizer.learning_rate and told.beta == 0.0 and told.temperature == 1.0
    assert told.bf16 and told.model_init_kwargs["dtype"] == "bfloat16" and not told.gradient_checkpointing
    ends = {"ignore_eos": True} if vllm else {"min_new_tokens": 24}
    assert told.generation_kwargs == (ends if fixed else None) and told.use_vllm == vllm and told.top_p == 1.0


def test_windows_that_no_record_could_fill_are_refused_before_anything_runs(capsys):
    for wrong in (["--warm", "0"], ["--steps", "0"], ["--dtype", "float32", "--systems", "trl-colocate-patched"]):
        with pytest.raises(SystemExit, match="2"):
            end_to_end.main(wrong)
        assert "at least 1" in capsys.readouterr().err or "dtype" in wrong[0]


def test_records_of_an_earlier_run_are_not_measured_again(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "trainer.jsonl").write_text("")
    with pytest.raises(UserError, match="earlier run"):
        PEERS["ours"].measure(WORKLOAD, tmp_path)


def test_a_peer_that_starts_in_part_leaves_nothing(tmp_path):
    started = []

    def begin(peer, workload, rundir):
        started.append(subprocess.Popen(["sleep", "60"]))
        yield "trainer", started[0]
        raise UserError("no such GPU")

    with pytest.raises(UserError, match="no such GPU"):
        Peer(begin=begin).measure(WORKLOAD, tmp_path / "run")
    assert started[0].returncode == -signal.SIGKILL


def test_the_baseline_without_skipping_computes_groups_without_signal(monkeypatch):
    pytest.importorskip("torch")
    from benchmarks.unskipped import leave_nothing_out
    from tests.groups import make_group
    from trainer import batch
    from trainer.advantage import ADVANTAGES

    def tokens():
        dead, settings = make_group(1, rewards=[1.0] * 4), load(None, ["objective.kl_beta=0"])
        made = batch.make_batch([dead], settings, ADVANTAGES["group"], rank=0, world=1, step=0)
        return made.figures["train/tokens"]

    monkeypatch.setattr(batch, "_trained", batch._trained)  # put back afterwards
    assert tokens() == 0
    leave_nothing_out()
    assert tokens() > 0


def test_trl_sees_our_prompts_in_our_order(tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.trl_step import prompts
    from policy.model import load_tokenizer
    from sampler.prompts import load_prompts
    from tests.tiny import make_model

    recipe = PEERS["trl-generate"].with_settings(["data.max_prompt_tokens=400"]).recipe(WORKLOAD)
    tokenizer = load_tokenizer(make_model(tmp_path))
    given = prompts(recipe, tokenizer)
    rows = load_prompts(recipe.data.train, recipe.data.limit, recipe.data, tokenizer)
    ledger = Ledger(rows=len(rows), per_step=8, max_staleness=1, lease_s=1.0, seed=recipe.seed)
    ledger.publish("s00000000.i0001")
    leased = ledger.grant("x", "s00000000.i0001", 16, now=0.0)
    assert [one["prompt"] for one in given[:16]] == [rows[row].messages for _, row in leased]
    assert len(given) == 8 * recipe.trainer.steps


def test_the_reward_is_the_same_for_both_and_tells_texts_apart():
    texts = ["16 + 2 = 18", "She has a pen", "", "AEIOU"]
    assert vowels([[{"role": "assistant", "content": text}] for text in texts], answer=["1"]) == [0.0, 4 / 13, 0.0, 1.0]


def test_nothing_is_left_of_a_killed_system():
    grandchild = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    )
    grandchild += "start_new_session=True); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", grandchild], stdout=subprocess.PIPE)
    child.stdout.readline()
    pids = _tree(child.pid)
    assert len(pids) == 2
    kill(child)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.returncode == -signal.SIGKILL
    child.stdout.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone, perhaps just now
        return False


def test_a_system_that_fails_is_said_and_left_out(capsys):
    cores, handler = os.sched_getaffinity(0), signal.getsignal(signal.SIGTERM)
    try:
        end_to_end.main(["--systems", "ours", "--workloads", "fixed", "--rounds", "1", "--set", "trainer.gpus=0"])
    finally:
        os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGTERM, handler)
    told = capsys.readouterr().out
    assert "fixed, round 0, ours: recipe" in told and "trainer.gpus" in told
    assert json.loads(told.splitlines()[-1])["rows"] == []


def test_a_system_that_ends_too_early_is_no_measurement(tmp_path):
    rundir = RunDir(tmp_path / "ours")
    rundir.make()
    (rundir.logs / "trl.log").write_text("loading\n[rank0]: AttributeError: no weight_loader\n")
    with MetricsWriter(rundir.metrics / "trainer.jsonl") as writer:
        writer.write({"kind": "step", "step": 1})
        children = {"trl": subprocess.Popen(["false"])}
        children["trl"].wait()
        with pytest.raises(RunError, match=r"its trl ended after 1 of 2 steps: .*AttributeError: no weight_loader"):
            watched(children, rundir, 1, 1)
        writer.write({"kind": "step", "step": 2})
        assert watched(children, rundir, 1, 1) == (0.0, {"trl": 0.0})  # it may end once it has done what was asked


def test_help_loads_no_engine():
    code = "import sys; from benchmarks import end_to_end, trl_step, fixed_sampler, sampler_alone, trainer_alone\n"
    code += (
        "try: end_to_end.main(['--help'])\nfinally: assert not {'torch', 'vllm', 'trl', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--systems" in done.stdout, done.stderr


def test_recipes_survive_the_way_through_a_file(tmp_path):
    for name, peer in PEERS.items():
        (tmp_path / name).write_text(dump(peer.recipe(WORKLOAD)))
        assert load(tmp_path / name) == peer.recipe(WORKLOAD)


def test_processor_seconds_count_what_a_process_started():
    code = "import subprocess, sys; burn = 'import time; n = 0\\nwhile time.process_time() < 0.3: n += 1'; "
    code += "subprocess.run([sys.executable, '-c', burn]); print('up', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert 0.25 <= processor_s(child.pid) < 10
    child.communicate()
    assert processor_s(child.pid) == 0.0
