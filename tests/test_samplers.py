"""One sampler, several engines: which GPUs each gets, what happens when one ends, one engine over several workers."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from protocol.errors import CrashLoop, EngineDead, OutOfMemory, UserError
from protocol.failure import failure, write_failure
from protocol.process import end, members, start
from protocol.resolve import load
from protocol.restarts import MAX_RESTARTS
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id
from sampler import replica, shortage
from sampler.__main__ import supervise
from sampler.supervisor import REPLICA, cpu_environment, engine_name, environments, watch

UUIDS = ["GPU-8f1c6a1e-1a2b", "GPU-77aa0001-9c1d", "GPU-0b3d55aa-7e10", "GPU-c0ffee00-3333"]


def engines(gpus: int, width: int = 1, *overrides: str) -> list[dict[str, str]]:
    recipe = load(None, [f"sampler.gpus={gpus}", f"sampler.tensor_parallel={width}", *overrides])
    return environments(recipe, gpus // width)


@pytest.mark.parametrize(
    ("visible", "gpus", "width", "expected"),
    [
        ("0,1,2,3", 4, 1, ["0", "1", "2", "3"]),
        ("0,1,2,3", 4, 2, ["0,1", "2,3"]),
        ("4,6,7", 2, 2, ["4,6"]),
        (",".join(UUIDS), 4, 2, [",".join(UUIDS[:2]), ",".join(UUIDS[2:])]),
        ("MIG-1f2e,MIG-9d4c", 2, 1, ["MIG-1f2e", "MIG-9d4c"]),
        ("3,-1", 1, 1, ["3"]),
    ],
)
def test_each_engine_sees_its_own_gpus_under_the_names_that_the_user_gave(monkeypatch, visible, gpus, width, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in engines(gpus, width)] == expected


@pytest.mark.parametrize(
    ("visible", "gpus", "width", "message"),
    [
        ("0", 2, 1, "2 GPUs asked for, 1 visible; use --gpus 1"),
        ("0,1,2", 4, 2, "4 GPUs asked for, 3 visible; use --gpus 2"),
        ("0", 2, 2, "2 GPUs asked for, 1 visible; an engine needs 2"),
        ("MIG-1f2e,MIG-9d4c", 2, 2, "use --tensor-parallel 1"),
    ],
)
def test_gpus_that_are_not_there_are_refused_with_the_number_that_is(monkeypatch, visible, gpus, width, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=message):
        engines(gpus, width)


def test_without_gpus_the_cores_are_shared_and_vllm_binds_none(monkeypatch):
    """Left to itself it binds all engines to the same cores, and sets the number of threads anew."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [one["OMP_NUM_THREADS"] for one in engines(2)] == ["4", "4"]
    assert [one["OMP_NUM_THREADS"] for one in engines(2, 2)] == ["4"]  # two workers of one engine
    assert [one["OMP_NUM_THREADS"] for one in engines(4, 2, "sampler.threads=3")] == ["1", "1"]
    assert engines(1)[0]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7")
    assert engines(2, 2)[0]["VLLM_CPU_OMP_THREADS_BIND"] == "0-3|4-7"


def script(body: str) -> list[str]:
    """A process in the place of an engine; `me` is its index, `before` how often this engine was started."""
    head = f"import os, pathlib, sys, time; me = os.environ['{REPLICA}']; mark = pathlib.Path('starts' + me)\n"
    count = "before = len(mark.read_text()) if mark.exists() else 0; mark.write_text('x' * (before + 1))\n"
    return [sys.executable, "-c", head + count + body]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the processes leave their marks; the handlers that `watch` installs are taken back."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not alive_in(tmp_path), "an engine's process was left behind"


def alive_in(directory: Path) -> list[int]:
    """Not what other tests left to this process: it adopts orphans since a test has made it a supervisor."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if child.status() != psutil.STATUS_ZOMBIE and child.cwd() == str(directory):
                found.append(child.pid)
    return found


def named(part: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if part in child.name():
                found.append(child)
    return found


def starts(place: Path, index: int) -> int:
    return len((place / f"starts{index}").read_text())


@pytest.mark.fault("B4")
@pytest.mark.parametrize("death", ["sys.exit(71)", "os.kill(os.getpid(), 9)"])
def test_an_engine_that_dies_beside_others_is_started_again_and_they_go_on(place, death):
    body = f"if me == '1' and before < 2: {death}\n"
    body += (
        "third = pathlib.Path('starts1')\nwhile not (third.exists() and len(third.read_text()) == 3): time.sleep(0.01)"
    )
    assert watch(script(body), [{}] * 3, place) == 0
    assert [starts(place, index) for index in range(3)] == [1, 3, 1]
    assert not (place / "FAILED.md").exists()  # the run goes on; what was said is in logs/
    if "kill" in death:
        assert all("was killed by SIGKILL" in path.read_text() for path in (place / "logs").iterdir())


@pytest.mark.fault("B4")
def test_an_engine_that_dies_again_and_again_ends_all(place):
    with pytest.raises(CrashLoop, match=r"engine 1 on .* crashed 6 times"):
        watch(script("if me == '1': sys.exit(71)\ntime.sleep(99)"), [{}] * 2, place)
    assert starts(place, 1) == MAX_RESTARTS + 1 and starts(place, 0) == 1
    assert failure(place, "sampler")[0] == 70


@pytest.mark.parametrize("code", [2, 3, 66, 72, 77])
def test_what_every_engine_would_end_with_ends_all_at_once(place, code):
    assert watch(script(f"if me == '1': sys.exit({code})\ntime.sleep(99)"), [{}] * 2, place) == code
    assert starts(place, 1) == 1


def test_the_end_of_a_single_engine_is_the_samplers(place):
    """Whoever started the sampler (the launcher, Slurm) starts it again."""
    assert watch(script("sys.exit(71)"), [{}], place) == 71
    assert watch(script("os.kill(os.getpid(), 9)"), [{}], place) == 128 + 9
    assert (place / "FAILED.md").read_text().startswith(f"# sampler engine 0 on {socket.gethostname()} failed first")


def test_a_failure_of_the_trainer_stays_the_first(place):
    write_failure(place, "trainer rank 0", 73, "the disk is full")
    assert watch(script("if me == '1' and not before: sys.exit(71)"), [{}] * 2, place) == 0
    assert (place / "FAILED.md").read_text().startswith("# trainer rank 0 failed first")


def test_another_machines_sampler_keeps_its_reason(place, monkeypatch):
    """Its engines have the same numbers."""
    write_failure(place, "sampler engine 1 on another", 71, "vLLM died there")
    assert watch(script("if me == '1' and not before: sys.exit(71)"), [{}] * 2, place) == 0
    assert (place / "FAILED.md").read_text().startswith("# sampler engine 1 on another failed first")
    (place / "FAILED.md").unlink()
    write_failure(place, engine_name(0), 71, "vLLM died here")
    monkeypatch.setattr("sampler.__main__.watch", lambda *_: 0)
    assert supervise(RunDir(place), load(None, ["sampler.gpus=1"])) == 0
    [kept] = (place / "logs").iterdir()
    assert "vLLM died here" in kept.read_text() and not (place / "FAILED.md").exists()


def test_nothing_of_an_engine_is_left_when_the_next_one_starts(place):
    """A worker with much memory takes the kernel longer than the leader, which is all that a wait sees."""
    body = "\nif os.fork() == 0:\n    kept = b'x' * 2**29\n    pathlib.Path('up').touch()\n    time.sleep(99)\n"
    engine = start(script(body + "time.sleep(99)"), environment={REPLICA: "0"})
    while not (place / "up").exists():
        time.sleep(0.01)
    assert len(members(engine.pid)) == 2
    end(engine, 0.0)
    assert not members(engine.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_engine_and_none_is_started_again(place, number):
    body = "mark.with_suffix('.up').touch(); time.sleep(99)"
    stopper = threading.Thread(target=stop_when_up, args=(place, 2, number))
    stopper.start()
    assert watch(script(body), [{}] * 2, place) == 0
    stopper.join()
    assert [starts(place, index) for index in range(2)] == [1, 1]


def stop_when_up(place: Path, count: int, number: int) -> None:
    while len(list(place.glob("*.up"))) < count:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_asking_for_gpus_does_not_stop_the_event_loop(monkeypatch):
    """nvidia-smi may take its time; the trainer waits for a sign of life meanwhile."""
    asked = threading.Event()
    heard = []

    def slow() -> list[str]:
        heard.append(asked.wait(60))
        return []

    monkeypatch.setattr(replica, "visible_gpus", slow)

    async def both() -> None:
        reporting = asyncio.create_task(replica.report(None, None, None, None, None))
        await asyncio.sleep(0.1)
        asked.set()
        reporting.cancel()

    asyncio.run(both())
    assert heard == [True]  # a loop that stands still would not have set it


# -- out of memory ---------------------------------------------------------------------------------------------------

ROOM = "To serve at least one request with the model's max seq len (1024), (0.06 GiB KV cache is needed, which is \
larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum model \
length is 160. Try increasing `gpu_memory_utilization`"
FREE = "Free memory on device cuda:0 (10.10/79.10 GiB) on startup is less than desired GPU memory utilization (0.9, \
71.19 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
CUDA = "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 31.73 GiB of which 1.10 GiB is \
free. Process 4711 has 30.62 GiB memory in use."
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"vllm": {"class": "logging.NullHandler"}},
    "loggers": {"vllm": {"handlers": ["vllm"], "propagate": False}},
}
STARTED = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
try:
    raise ValueError(sys.argv[2])
except ValueError:
    logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
"""
"""What vLLM's engine process does; the other one then knows nothing but that it ended."""


@pytest.mark.parametrize(
    ("said", "gpu", "told"),
    [
        (
            ROOM,
            False,
            r"length is 160; raise sampler.cpu_kv_cache_gb \(now 2\), or lower data.max_prompt",
        ),
        (
            ROOM,
            True,
            r"raise sampler.gpu_memory .* sampler.tensor_parallel .*, or lower data.*sampling.max_tokens \(now \d+\)$",
        ),
        ("No available memory for the cache blocks. Try", True, "cache blocks; raise sampler.gpu_memory"),
        (FREE, True, r"71.19 GiB\); lower sampler.gpu_memory .*, end what else .* sampler.tensor_parallel \(now 1\)$"),
        (CUDA, True, r"1.10 GiB is free; lower sampler.gpu_memory"),
    ],
)
def test_a_lack_of_memory_while_vllm_starts_is_one_line_with_the_settings(said, gpu, told):
    with (
        pytest.raises(OutOfMemory, match=told) as caught,
        shortage.shortage_explained(load(None, []), gpu, LOGGING) as file,
    ):
        subprocess.run([sys.executable, "-c", STARTED, str(file), said], check=True)
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert "\n" not in str(caught.value)


def test_what_else_stops_vllm_stays_what_it_is():
    expected = pytest.raises(RuntimeError, match="initialization failed")
    with expected, shortage.shortage_explained(load(None, []), True, LOGGING) as file:
        subprocess.run([sys.executable, "-c", STARTED, str(file), "no such kernel"], check=True)
        raise RuntimeError("Engine core initialization failed.")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("L2")
def test_vllm_with_too_little_memory_says_which_setting(tmp_path, monkeypatch):
    from tests.running_engine import Running

    for name, value in cpu_environment(load(None, ["sampler.threads=2"]), 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutOfMemory, match=r"raise sampler.cpu_kv_cache_gb \(now 0.0001\)"):
        Running(tmp_path, "sampler.cpu_kv_cache_gb=0.0001")


# -- one engine, two workers -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("B4")
def test_one_engine_over_two_workers_has_the_trainers_weights_in_both_and_dies_whole(tmp_path, monkeypatch):
    """Tensor parallel: each worker reads and verifies the snapshot and keeps its slice; weights change in flight."""
    from tests.running_engine import PROMPT, Running, logprobs, publish
    from tests.test_engine import differently_trained

    for name, value in cpu_environment(load(None, ["sampler.threads=2", "sampler.gpus=2"]), 1).items():
        monkeypatch.setenv(name, value)
    running = Running(tmp_path, "sampler.gpus=2", "sampler.tensor_parallel=2")
    try:
        workers = named("Worker_TP")
        assert len(workers) == 2
        running.call(running.engine.weights.load(publish(running.model, running.snapshots, 0)))
        other = differently_trained(running, 1)
        newer = publish(other, running.snapshots, 1)

        async def both():
            counted = running.engine.tokens
            generating = asyncio.create_task(running.engine.generate(PROMPT, "train"))
            while running.engine.tokens < counted + 40:
                await asyncio.sleep(0.005)
            await running.engine.weights.load(newer)
            return await generating

        sampled = running.call(both())
        assert any([span.snapshot for span in one.spans] == [snapshot_id(0, 1), snapshot_id(1, 1)] for one in sampled)
        sampled = running.call(running.engine.generate(PROMPT, "train"))
        expected = logprobs(other, PROMPT, [one.tokens for one in sampled], temperature=0.7)
        assert max(abs(one.logprobs - found).max() for one, found in zip(sampled, expected, strict=True)) < 1e-3
        lost = psutil.Process().children(recursive=True)
        workers[1].kill()
        with pytest.raises(EngineDead):
            running.call(running.engine.generate(PROMPT, "train"), timeout_s=120)
        assert running.engine.dead
    finally:
        running.close()
    left = [process for process in psutil.wait_procs(lost, timeout=60)[1] if "VLLM" in process.name()]
    assert not left
