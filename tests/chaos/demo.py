"""The demo with real vLLM and DeepSpeed, and every kind of process killed once in mid-run: it must end as if nothing
had happened.

    python -m tests.chaos --demo
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from protocol.metrics import read_metrics
from protocol.resolve import load
from protocol.snapshot import listed

KINDS: list[tuple[str, Callable[[str, str], bool]]] = [
    ("reward worker", lambda name, command: "sampler.rewards" in command),
    ("trainer rank 0", lambda name, command: "--local_rank=0" in command and "launcher" not in command),
    ("vLLM's engine", lambda name, command: "EngineCore" in name),
    ("DeepSpeed's launcher", lambda name, command: "deepspeed.launcher.launch" in command),
    ("sampler engine process", lambda name, command: "-m sampler" in command),
    ("trainer's parent", lambda name, command: "-m trainer --run" in command),
    ("sampler's supervisor", lambda name, command: "-m sampler" in command),
]
"""Kind and how to know it by its name and command line. Of several, the oldest is taken, but for `sampler engine
process`, which is the supervisor's child and looks the same: the youngest."""
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.toml"


def main() -> int:
    recipe = load(RECIPE)
    directory = Path(tempfile.mkdtemp(prefix="chaos-demo-"))
    run = directory / "run"
    command = [sys.executable, "-m", "launch", str(RECIPE), "--run", str(run), "--set", "trainer.checkpoint_every=2"]
    began = time.monotonic()
    log = directory / "launch.log"
    with log.open("wb") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    every = max(1, (recipe.trainer.steps - 2) // len(KINDS))
    for number, (kind, is_it) in enumerate(KINDS):
        wait_for_step(run, 1 + every * number, launcher, log)
        print(f"{time.monotonic() - began:5.0f} s  step {steps(run)}: {kill(launcher.pid, kind, is_it)}", flush=True)
    code = launcher.wait()
    print("\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-6:]))
    trained = [group for groups in history(run).values() for group in groups]
    expected = recipe.trainer.steps * recipe.trainer.prompts_per_step
    state = json.loads((listed(run / "checkpoints")[-1] / "state.json").read_text())["inbox"]["ledger"]
    lost = state["done_below"] + len(state["done_above"]) - len(set(trained)) - len(state["quarantined"])
    left = leftovers(run)
    print(
        f"exit code {code}  groups {len(trained)} of {expected}  lost {lost}  "
        f"doubled {len(trained) - len(set(trained))}  processes left {len(left)}  "
        f"{time.monotonic() - began:.0f} s; kept: {directory}"
    )
    return int(code != 0 or lost != 0 or len(set(trained)) != len(trained) or len(trained) != expected or bool(left))


def kill(launcher: int, kind: str, is_it: Callable[[str, str], bool]) -> str:
    found = []
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if is_it(child.name(), " ".join(child.cmdline())):
                found.append(child)
    found.sort(key=lambda child: child.create_time())
    victim = found[-1 if kind == "sampler engine process" else 0]
    os.kill(victim.pid, signal.SIGKILL)
    return f"killed {kind} (process {victim.pid})"


def steps(run: Path) -> int:
    return max(history(run), default=0)


def history(run: Path) -> dict[int, list[int]]:
    """Groups of each step; of a step that was done twice, the one that counts."""
    return {record["step"]: record["groups"] for record in records(run) if record["kind"] == "step"}


def records(run: Path) -> list[dict]:
    """Of the trainer, without those of its starts."""
    return [record for record in read_metrics(run / "metrics" / "trainer.jsonl") if record["kind"] != "start"]


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen, log: Path) -> None:
    while steps(run) < step:
        if launcher.poll() is not None:
            raise SystemExit(f"the launcher ended with {launcher.returncode}: {log.read_text()[-3000:]}")
        time.sleep(0.2)
    last = records(run)
    while len(records(run)) == len(last) and launcher.poll() is None:
        time.sleep(0.2)  # the run must be moving again since the last kill


def leftovers(run: Path) -> list[str]:
    time.sleep(5)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if str(run) in command or process.name().startswith("VLLM"):
                found.append(command[:100])
    return found
