"""The screen of `launch watch`: what it says of a run, that it fits, and that it only reads."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from doctor.course import Course
from doctor.history import History
from doctor.window import Window
from launch.watch.command import Watcher
from launch.watch.curves import ASCII_BARS, BARS, short, spark
from launch.watch.figures import curves, machines
from launch.watch.screen import screen
from launch.watch.state import state_of
from protocol.failure import write_failure
from protocol.metrics import MetricsWriter
from protocol.recipe import Recipe, TrainerTable
from protocol.resolve import dump
from protocol.rundir import Endpoint, RunDir

STEPS = 10
HOSTILE = "2 + 2 = \x1b[31m4\x9b\x07 [bold]#### 4[/bold]\r\x00 "
STEP = {
    "reward_std": 0.5,
    "frac_reward_zero_std": 0.25,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 21.0,
    "entropy": 0.5,
    "staleness/mean": 1.0,
    "sampling/sampling_logp_difference/mean": 0.01,
    "clip_ratio/region_mean": 0.01,
    "loss": 0.01,
    "grad_norm": 1.5,
    "learning_rate": 1e-6,
    "train/tokens": 700.0,
    "step_time": 10.0,
    "time/wait_s": 2.0,
    "time/publish_s": 1.0,
    "train/tokens_per_s": 100.0,
    "sampler/tokens_per_s": 55.0,
    "samplers": 1.0,
    "memory/peak_gb": 3.25,
    "memory/device_peak_gb": 0.0,
    "records_lost": 0,
}


def rollout(group: int, index: int, version: int) -> dict:
    right = float((group + index + version) % 4 == 0)
    return {
        "split": "train",
        "group": group,
        "row": group,
        "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
        "completion": HOSTILE if right else "I do not know that, but I can say a few words.",
        "reward": right,
        "rewards": {"gsm8k": right},
        "finish": "stop",
        "tokens": 21,
        "snapshots": [f"s{version:08d}.i0001"],
        "seconds": 1.0,
    }


def write(rundir: RunDir, began: float, steps: int = STEPS) -> None:
    """Two groups of four a step, and one without signal that was sampled and replaced."""
    with (
        MetricsWriter(rundir.metrics / "trainer.jsonl") as trainer,
        MetricsWriter(rundir.metrics / "sampler-a.jsonl") as sampler,
        MetricsWriter(rundir.rollouts / "a.jsonl") as rollouts,
    ):
        for number in range(1, steps + 1):
            groups = [3 * number, 3 * number + 1, 3 * number + 2]
            for one in (rollout(group, index, number - 1) for group in groups for index in range(4)):
                rollouts.write(one if one["group"] != groups[2] else {**one, "reward": 1.0, "rewards": {"gsm8k": 1.0}})
            rewards = [rollout(group, index, number - 1)["reward"] for group in groups[:2] for index in range(4)]
            mean = {"reward": sum(rewards) / 8, "accuracy": sum(rewards) / 8}
            at = {"time_s": began + 10.0 * number}
            trainer.write({"kind": "step", "step": number, "groups": groups[:2], **STEP, **mean, **at})
            sampler.write({"tokens": 550 * number, "busy_s": 4.0 * number, "memory/tree_gb": 1.5, **at,
                           "snapshot": f"s{number - 1:08d}.i0001"})  # fmt: skip
        exam = {"accuracy": 0.625, "low": 0.5, "high": 0.75, "n": 40, "change/difference": 0.5}
        change = {"change/low": 0.4, "change/high": 0.6, "time_s": began + 10.0 * steps}
        trainer.write({"kind": "exam", "step": 0, **exam, "accuracy": 0.125, "time_s": began})
        trainer.write({"kind": "exam", "step": steps, **exam, **change})


@pytest.fixture
def rundir(tmp_path) -> RunDir:
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    rundir.recipe.write_text(dump(Recipe(name="small", trainer=TrainerTable(steps=40))))
    return rundir


@pytest.fixture
def run(rundir) -> RunDir:
    write(rundir, time.time() - 10.0 * STEPS)
    return rundir


def shown(rundir: RunDir, width: int, height: int, keys: bool = True) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, highlight=False, record=True)
    console.print(screen(Watcher(Course(History.open(rundir.path))).view(), console, height, keys=keys))
    return console.export_text()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (160, 50)])
def test_everything_fits_whatever_the_terminal(run, width, height):
    text = shown(run, width, height)
    lines = text.splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= width
    for words in (
        "small", "step 10/40, left 5m00s", "reward", "accuracy", "held out", "signal", "truncated", "length", "entropy",
        "staleness", "trainer   waits 20%   100 tokens/s   10.0 s a step   peak 3.2 GB",
        "sampler   idle 60%   55 tokens/s   1 there   1.5 GB", "newest: reward", "What is 2 + 2?", "q ends",
        "held-out accuracy +0.500 [+0.400, +0.600] since the beginning (n=40)",
    ):  # fmt: skip
        assert words in text, words
    assert ("worst: reward 0" in text) == (height == 50)


def test_what_a_model_wrote_does_not_command_the_terminal(run):
    text = shown(run, 160, 50)
    assert "2 + 2 = \\x1b[31m4\\x9b\\x07 [bold]#### 4[/bold]\\x0d\\x00" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_the_numbers_are_those_of_the_record_and_of_trained_groups_alone(run):
    history = History.open(run.path)
    window = Window.at(history, len(history.steps))
    found = {curve.name: curve for curve in curves(history, window)}
    mean = sum(step["reward"] for step in history.steps[-8:]) / 8
    assert found["reward"].now == found["accuracy"].now == pytest.approx(mean) == pytest.approx(0.25)
    low, high = found["accuracy"].interval
    assert low < mean < high < 0.6  # the replaced groups, all right, would raise it to 0.5
    assert sum(found["reward"].interval) / 2 == pytest.approx(mean)
    assert found["held out"].points == [(0, 0.125), (10, 0.625)] and found["held out"].interval == (0.5, 0.75)
    assert found["signal"].now == 0.75
    assert machines(window).idle == pytest.approx(0.6)


def test_a_step_without_signal_has_no_entropy(run):
    with MetricsWriter(run.metrics / "trainer.jsonl") as trainer:
        silent = {"train/tokens": 0.0, "entropy": 0.0, "loss": 0.0, "reward": 1.0, "accuracy": 1.0}
        trainer.write({"kind": "step", "step": 11, "groups": [], **STEP, **silent})
    history = History.open(run.path)
    found = {curve.name: curve for curve in curves(history, Window.at(history, 11))}
    assert found["entropy"].points[-1] == (10, 0.5) and found["entropy"].now == 0.5
    assert found["reward"].points[-1] == (11, 1.0)


def test_a_run_whose_completions_and_claims_were_not_copied_is_shown_too(run):
    for path in [*run.rollouts.iterdir(), *run.metrics.glob("sampler-*")]:
        path.unlink()
    (run.path / "incarnations").rmdir()
    text = shown(run, 80, 24)
    assert "reward      0.25" in text and "newest:" not in text and "waits 20%" in text


def test_the_state_of_a_run(rundir):
    def state(now: float = time.time()) -> str:
        one = state_of(History.open(rundir.path), now)
        return f"{one.kind}: {one.text}"

    now = time.time()
    assert state() == "waiting: has not begun: no trainer was here yet"
    rundir.claim_incarnation()
    assert state() == "waiting: the trainer loads its model"
    rundir.write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=1, host="here"))
    assert state() == "waiting: the trainer waits for samplers, which load their model"
    write(rundir, now - 100.0)
    assert state(now) == "running: step 10/40, left 5m00s"
    assert state(now + 3600).startswith("quiet: no record for 1h00m: stopped, killed or stuck")
    with MetricsWriter(rundir.metrics / "sampler-a.jsonl") as sampler:
        sampler.write({"tokens": 9, "time_s": now + 3590})
    assert state(now + 3600) == "quiet: the trainer has written nothing for 1h00m; samplers have"
    rundir.claim_incarnation()
    assert state(now + 3600) == "waiting: resuming: trainer start 2 loads the last checkpoint"
    write_failure(rundir.path, "trainer rank 0", 76, "3 steps in a row were \x1b[31m not finite")
    assert state().startswith(
        "failed: FAILED: trainer rank 0: 3 steps in a row were \\x1b[31m not finite; see FAILED.md"
    )
    (rundir.path / "FAILED.md").unlink()
    (rundir.path / "endpoint.json").unlink()  # a copy of a run that was complete
    rundir.recipe.write_text(dump(Recipe(trainer=TrainerTable(steps=STEPS))))
    assert state(now + 3600 * 3).startswith("complete: all 10 steps are done")
    rundir.recipe.write_text(dump(Recipe(trainer=TrainerTable(steps=40))))
    rundir.write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=2, host="here", steps=40))
    assert state() == "complete: complete after 10 steps of 40 (patience)"


def test_a_run_without_any_step_has_a_screen(rundir):
    with MetricsWriter(rundir.rollouts / "a.jsonl") as rollouts:
        rollouts.write({**rollout(0, 0, 0), "split": "eval"})
    text = shown(rundir, 80, 24)
    assert "has not begun" in text and "doctor    no step yet" in text and "What is 2 + 2?" in text


def test_what_the_doctor_says_is_on_the_screen(run):
    text = (run.metrics / "trainer.jsonl").read_text()
    slow = text.replace('"time/wait_s": 2.0', '"time/wait_s": 8.0')
    (run.metrics / "trainer.jsonl").write_text(slow)
    text = shown(run, 160, 50)
    assert "slow sampler (since step" in text and "sampler.gpus = " in text and "nothing wrong" not in text
    assert len(shown(run, 80, 24).splitlines()) <= 24


def test_curves_in_text():
    points = [(1, 0.0), (2, 1.0), (3, 3.0), (4, 6.0)]
    assert spark(points, 4, 4, BARS) == [BARS[0] + BARS[1] + BARS[3] + BARS[6]]
    assert spark(points, 4, 8, ASCII_BARS) == ["__..::**"]  # each step is as wide as the others
    assert spark([(3, 1.0), (4, 2.0)], 4, 4, BARS) == ["  " + BARS[0] + BARS[6]]  # nothing is known before
    assert spark([(0, 0.0), (4, 1.0)], 4, 4, "12", rows=2) == ["   1", "1112"]
    assert spark([(1, 5.0)], 1, 3, BARS) == [BARS[0] * 3]
    assert [short(value) for value in (0.0, 0.003, 0.62, 14.34, 512.0, 1.2e-6, -0.25)] == [
        "0", "0.003", "0.62", "14.3", "512", "1.2e-06", "-0.25",
    ]  # fmt: skip


def files(path: Path) -> dict[str, tuple[int, int]]:
    return {str(one): (one.stat().st_mtime_ns, one.stat().st_size) for one in path.rglob("*")}


def test_once_prints_one_screen_writes_nothing_and_loads_no_engine(run):
    before = files(run.path)
    code = (
        "import runpy, sys; sys.argv = ['launch', 'watch', sys.argv[1]]\n"
        "try: runpy.run_module('launch', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'zmq.auth'} & set(sys.modules)))"
    )
    environment = {**os.environ, "COLUMNS": "90"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("0 []\n") and done.stdout.count("held out") == 1 and "\x1b" not in done.stdout
    assert files(run.path) == before


def test_a_terminal_that_knows_ascii_alone_is_enough(run):
    command = [sys.executable, "-m", "launch", "watch", str(run.path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    rollouts = run.rollouts / "a.jsonl"
    rollouts.write_text(rollouts.read_text().replace("I do not know", "Je ne sais pas \\u00e7a"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Je ne sais pas ?a" in done.stdout and "\n----" in done.stdout and "____" in done.stdout


def test_no_run_is_one_line(tmp_path):
    command = [sys.executable, "-m", "launch", "watch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: no run in") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("ends", ["q", "\x03"])
def test_it_lives_in_a_terminal_and_keys_work(run, ends):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "launch", "watch", str(run.path)])
    text = until(terminal, "", "newest: reward")
    os.write(terminal, b"w")
    text = until(terminal, text, "worst: reward 0")
    with MetricsWriter(run.rollouts / "b.jsonl"), MetricsWriter(run.metrics / "trainer.jsonl") as trainer:
        trainer.write({"kind": "step", "step": 11, "groups": [], **STEP, "reward": 0.5, "accuracy": 0.5})
    text = until(terminal, text, "step 11/40")
    os.write(terminal, ends.encode())
    until(terminal, text, "\x1b[?1049l")  # the screen that was there before
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def until(terminal: int, text: str, words: str) -> str:
    deadline = time.monotonic() + 60
    while words not in text:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, text[-2000:]
        text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text
