"""The local launcher: who gets which GPU, what is started again and what is not, and what a person reads."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.local import Worker, last_words, put_failures_aside, share_gpus, unused
from launch.progress import Progress, duration
from protocol.errors import CrashLoop, RunError, UserError
from protocol.failure import write_failure
from protocol.intervals import wilson
from protocol.metrics import MetricsWriter
from protocol.process import end, start
from protocol.resolve import load
from protocol.restarts import MAX_RESTARTS
from protocol.rundir import RunDir
from tests.diseases import unpack
from trainer.__main__ import placement


def worker(tmp_path: Path, script: str) -> Worker:
    result = Worker("sampler", [sys.executable, "-c", script], tmp_path, tmp_path / "log", {})
    result.start()
    return result


def until_it_ends(one: Worker) -> bool:
    one.process.wait()
    return one.ended(complete=True)


def test_sampler_and_trainer_get_gpus_of_their_own_or_share_what_is_there():
    assert share_gpus(1, 2, ["0", "1", "2"]) == {"sampler": ["0"], "trainer": ["1", "2"]}
    assert share_gpus(1, 2, ["3", "5", "6", "7"]) == {"sampler": ["3"], "trainer": ["5", "6"]}
    assert share_gpus(1, 2, ["0"]) == {"sampler": ["0"]}
    assert share_gpus(1, 2, []) == {}


def test_the_launcher_of_deepspeed_is_told_which_gpus():
    """With a number of GPUs it would forget CUDA_VISIBLE_DEVICES and take the sampler's."""
    assert placement(2, "1,2") == ["--include", "localhost:1,2"]
    assert placement(2, "") == ["--num_gpus", "2"]
    for wrong in ("3", "GPU-8f1c,GPU-77aa"):
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
            placement(2, wrong)


def test_a_worker_that_ends_well_has_ended_only_when_the_run_is_complete(tmp_path):
    one = worker(tmp_path, "pass")
    one.process.wait()
    assert one.ended(complete=False) is False  # started again: DeepSpeed's launcher returns 0 after some crashes
    assert until_it_ends(one) is True


@pytest.mark.fault("A15")
@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "1 / 0", "sys.exit(71)"])
def test_a_worker_that_crashes_is_started_again_so_many_times(tmp_path, death, capsys):
    one = worker(tmp_path, f"import os, sys; {death}")
    for _ in range(MAX_RESTARTS):
        assert until_it_ends(one) is False
    with pytest.raises(CrashLoop, match="crashed 6 times"):
        until_it_ends(one)
    assert capsys.readouterr().out.count("started again") == MAX_RESTARTS


def test_a_users_mistake_ends_the_run_with_its_own_line(tmp_path):
    with pytest.raises(RunError, match="no such model"):
        until_it_ends(worker(tmp_path, "import sys; print('error: no such model'); sys.exit(1)"))


@pytest.mark.parametrize(("code", "again"), [(1, True), (71, True), (73, True), (2, False), (74, False), (76, False)])
def test_what_the_process_wrote_decides_and_not_the_code_that_a_launcher_lost(tmp_path, code, again):
    (tmp_path / "logs").mkdir()
    one = worker(tmp_path, "import sys; sys.exit(1)")
    write_failure(tmp_path, "sampler engine 0", code, "it broke, and says why", ["a last line"])
    if again:
        assert until_it_ends(one) is False
    else:
        with pytest.raises(RunError, match="it broke, and says why") as caught:
            until_it_ends(one)
        assert caught.value.exit_code == code
    end(one.process, 0.0)


def test_what_another_machine_said_before_does_not_decide_about_a_new_start(tmp_path):
    rundir = RunDir(tmp_path)
    rundir.make()
    put_failures_aside(rundir)  # there are none
    write_failure(tmp_path, "sampler engine 0 on another", 77, "too little memory there")
    put_failures_aside(rundir)
    one = worker(tmp_path, "import sys; sys.exit(71)")
    assert until_it_ends(one) is False and len(one.restarts) == 1
    end(one.process, 0.0)
    [kept] = rundir.logs.glob("failed-*.md")
    assert "too little memory there" in kept.read_text()


def test_the_last_words_are_the_ones_that_say_most(tmp_path):
    log = tmp_path / "log"
    log.write_text("old\nerror: old one\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback\nRuntimeError: boom\n[INFO] exits\n")
    assert last_words(log, offset) == "RuntimeError: boom"
    assert last_words(log, 0) == "error: old one"


def test_ending_a_worker_ends_all_that_it_started(tmp_path):
    child = "import time; time.sleep(99)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = start([sys.executable, "-c", script])
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    end(process, grace_s=5)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_child_learns_that_a_launcher_above_its_parent_is_gone(tmp_path):
    """DeepSpeed's launcher dies on SIGTERM and leaves its ranks: they watch two generations."""
    ready, noticed = tmp_path / "ready", tmp_path / "noticed"
    rank = (
        "import pathlib, time; from protocol.process import watch_ancestors;"
        f"watch_ancestors(2, pathlib.Path({str(noticed)!r}).touch);"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    top = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {middle!r}])"
    process = subprocess.Popen([sys.executable, "-c", top])
    while process.poll() is None and not ready.exists():
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while not noticed.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in below:
        child.kill()
    assert noticed.exists()


def test_progress_says_what_a_person_wants_to_know(tmp_path, capsys):
    rundir = RunDir(tmp_path)
    rundir.make()
    progress = Progress(rundir, load(None, ["trainer.steps=20"]))
    progress.show()
    with MetricsWriter(rundir.metrics / "trainer.jsonl") as writer:
        writer.write({"kind": "exam", "step": 0, "accuracy": 0.1, "low": 0.05, "high": 0.2, "n": 40})
        progress.show()
        step = {"reward": 0.5, "accuracy": 0.25, "step_time": 6.0, "staleness/mean": 1.0, "train/tokens": 900.0}
        step |= {"time/wait_s": 0.0, "time/publish_s": 0.0, "sampler/tokens_per_s": 100.0, "train/tokens_per_s": 200.0}
        writer.write({"kind": "step", "step": 5, **step})
        progress.show()
    out = capsys.readouterr().out
    assert "starting" in out and "held-out accuracy after 0 steps: 0.100 [0.050, 0.200] (n=40)" in out
    for words in (
        "step 5/20",
        "reward 0.50",
        "accuracy 0.25",
        "sampler 100",
        "trainer 200",
        "staleness 1.0",
        "left 1m30s",
    ):
        assert words in out


def test_progress_says_once_what_is_wrong(tmp_path, capsys):
    run = unpack("truncation", tmp_path)
    progress = Progress(RunDir(run), load(run / "recipe.toml"))
    progress.show()
    progress.show()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "truncation trap" in line]
    assert "cut at 6 tokens" in line and "Change sampling.max_tokens = " in line
    assert progress.wrong() == ["truncation trap"]


def test_small_things():
    assert duration(552) == "9m12s" and duration(7500) == "2h05m" and duration(9) == "9s"
    low, high = wilson(49, 400)
    assert (round(low, 3), round(high, 3)) == (0.094, 0.158)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_fresh_run_takes_a_directory_of_its_own(tmp_path):
    assert unused(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert unused(tmp_path / "demo") == tmp_path / "demo-2"
