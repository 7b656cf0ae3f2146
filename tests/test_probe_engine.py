"""`python -m launch probe` as a user starts it: real vLLM, real rewards, no trainer."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch.probe.command import completions
from launch.probe.figures import figures, grouped
from sampler.probe_feed import order
from tests import warm
from tests.tiny import make_model

pytestmark = [pytest.mark.slow, pytest.mark.long]

ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


def command(*options: object) -> list[str]:
    return ["-m", "launch", "probe", "recipes/demo.toml", *map(str, options)]


def test_the_demo_is_probed(tmp_path):
    """Every figure follows from the completions beside the result."""
    out = tmp_path / "demo.json"
    options = command("--seconds", 40, "--out", out)
    done = warm.run(options, ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found, groups = json.loads(out.read_text()), grouped(completions(out))
    probed = found["probed"]
    assert len(groups) == probed["answered"] == probed["begun"] > 0 and not probed["stopped"]
    assert [group[0].row for group in groups] == order(0, 4000)[: len(groups)]
    assert all(len(group) == 8 and one.gold and one.split == "train" for group in groups for one in group)
    assert found["figures"] == pytest.approx(figures(groups))
    assert found["figures"]["length/max"] <= 32 and 0 < found["figures"]["truncated"] < 0.9
    assert found["rewards"]["gsm8k"]["mean"] == pytest.approx(found["figures"]["pass_rate"])
    calls = probed["rewards"]["gsm8k"]
    assert calls["values"] == 8 * len(groups) and len(calls["seconds"]) == len(groups)
    assert 40 * probed["tokens_per_s"] > sum(one.tokens for group in groups for one in group) / 3
    assert probed["ends"] == {"2": "<|im_end|>"} and probed["closing"] is None
    for words in ("first prompt  '<|im_start|>system\\nSolve.", "dead groups", "s a step", "max_tokens", "[8]"):
        assert words in done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Settings for a model that is loaded at once and never ends an answer."""
    model = make_model(tmp_path_factory.mktemp("probe") / "model")
    settings = [f"model.path={model}", "model.dtype=float32", "data.max_prompt_tokens=800"]
    return [part for setting in settings for part in ("--set", setting)]


def test_a_recipe_that_cuts_every_answer_is_stopped(tiny, tmp_path):
    options = command("--seconds", 5, "--out", tmp_path / "cut.json", *tiny, "--set", "sampling.max_tokens=4")
    done = warm.run(options, ENVIRONMENT)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("stop: ") and "cut before they end" in last and "sampling.max_tokens = " in last


def test_a_stop_gives_what_is_known_and_leaves_no_process(tiny, tmp_path):
    out, log = tmp_path / "x.json", tmp_path / "log"
    with log.open("wb") as file:
        slow = ["--set", "sampling.max_tokens=40", "--set", "sampler.max_running=4"]
        arguments = [sys.executable, *command("--seconds", 300, "--out", out, *tiny, *slow)]
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=ENVIRONMENT)
    lines, deadline = out.with_suffix(".jsonl"), time.monotonic() + 600
    try:
        while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert lines.exists(), log.read_text()[-3000:]
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3, "the check for leftovers would see nothing"
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130, log.read_text()[-3000:]
    finally:
        process.kill()  # the others go with it
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    assert "(stopped)" in log.read_text() and json.loads(out.read_text())["probed"]["stopped"]
    assert "Traceback" not in log.read_text()
