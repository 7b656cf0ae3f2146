"""Mirrors of the record: what TensorBoard, W&B and trackio hold afterwards, by their own readers; and that nothing that
they do touches the run."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from doctor.history import History
from launch.watch.command import warnings
from protocol import mirror
from protocol.errors import UserError
from protocol.mirror import State, follow, mirrored
from protocol.recipe import Recipe, Tracking
from protocol.resolve import dump
from protocol.rundir import RunDir
from protocol.trackers import refuse_missing, scalars


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed")


def step(number: int, reward: float) -> dict:
    record = {"kind": "step", "step": number, "time_s": 1000.0 + number, "groups": [1, 2]}
    return record | {"reward": reward, "accuracy": 0.5, "kl": None, "rewards/gsm8k/mean": reward}


EXAM = {"kind": "exam", "step": 0, "time_s": 999.0, "snapshot": "s00000000.i0001", "accuracy": 0.25, "n": 40}
RECORDS = [step(1, 0.1), EXAM, {"kind": "skipped", "step": 1, "time_s": 1001.5, "groups": [3]}, step(2, 0.2)]


def append(rundir: RunDir, *records: dict) -> None:
    with (rundir.metrics / "trainer.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path) -> RunDir:
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    rundir.recipe.write_text(dump(Recipe(name="small")))
    append(rundir, *RECORDS)
    return rundir


def mirror_all(rundir: RunDir, name: str, **environment: str) -> State:
    """In a process of its own, as a user does it after a run."""
    keyless = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    command = [sys.executable, "-m", "protocol.mirror", str(rundir.path), name]
    done = subprocess.run(
        command, env={**keyless, "HOME": str(rundir.path), **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return state(rundir, name)


def state(rundir: RunDir, name: str) -> State:
    return msgspec.json.decode((rundir.path / "trackers" / f"{name}.json").read_bytes(), type=State)


def test_the_finite_numbers_of_steps_and_exams_are_curves():
    assert scalars(step(1, 0.1)) == {"reward": 0.1, "accuracy": 0.5, "rewards/gsm8k/mean": 0.1}
    assert scalars(EXAM) == {"eval/accuracy": 0.25, "eval/n": 40.0}
    assert scalars(RECORDS[2]) == {}
    assert scalars({"kind": "step", "step": 1, "loss": float("nan"), "kl": float("inf"), "on": True}) == {}


def test_a_tracker_that_is_not_there_is_refused_before_anything_loads(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # W&B's own leavings in the working directory are not W&B
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(UserError, match=rf"pip install '\.\[{name}\]'"):
            refuse_missing(Tracking(mirrors=[name]))
    refuse_missing(Tracking())


def test_the_trainer_says_so_in_one_line(tmp_path):
    missing = [name for name in ("trackio", "wandb", "tensorboard") if not importlib.util.find_spec(name)]
    if not missing:
        pytest.skip("all three are installed")
    settings = ["--run", str(tmp_path / "run"), "--set", f'tracking.mirrors=["{missing[0]}"]']
    done = subprocess.run([sys.executable, "-m", "trainer", *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: tracking.mirrors") and done.stderr.count("\n") == 1


@needs("tensorboard")
def test_tensorboard_holds_the_record_and_goes_on_where_it_was(run):
    ended = threading.Event()
    ended.set()
    follow(run, Recipe(), "tensorboard", ended)
    append(run, step(3, 0.3), step(2, 0.7), step(3, 0.8))  # a restarted trainer does steps 2 and 3 again
    assert follow(run, Recipe(), "tensorboard", ended) == State(
        tracked_as=state(run, "tensorboard").tracked_as,
        offset=(run.metrics / "trainer.jsonl").stat().st_size,
        mirrored=6,
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.path / "trackers" / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"reward", "accuracy", "rewards/gsm8k/mean", "eval/accuracy", "eval/n"}
    shown = [(event.step, event.wall_time, round(event.value, 6)) for event in board.Scalars("reward")]
    assert shown == [(1, 1001.0, 0.1), (2, 1002.0, 0.7), (3, 1003.0, 0.8)]
    assert [(event.step, event.value) for event in board.Scalars("eval/accuracy")] == [(0, 0.25)]


def wandb_records(path: Path) -> Iterator:
    """Of an offline file: a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@needs("wandb")
def test_wandb_keeps_the_record_offline_and_goes_on_as_the_same_run(run):
    first = mirror_all(run, "wandb")
    append(run, step(3, 0.3))
    second = mirror_all(run, "wandb")
    assert (first.mirrored, second.mirrored, second.lost, second.error) == (3, 4, 0, "")
    files = sorted((run.path / "trackers" / "wandb").rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2 and all(first.tracked_as in path.name for path in files)
    rows = []
    for path in files:
        for record in wandb_records(path):
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project) == (first.tracked_as, "vesper")
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    assert rows == [{"step": r["step"], **scalars(r)} for r in (RECORDS[0], EXAM, RECORDS[3], step(3, 0.3))]


@needs("trackio")
def test_trackio_keeps_the_record_and_goes_on_as_the_same_run(run):
    mirror_all(run, "trackio")
    append(run, step(3, 0.3))
    assert mirror_all(run, "trackio").mirrored == 4
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; runs = S.get_runs('vesper');"
        "print(json.dumps([runs, S.get_logs('vesper', runs[0])]), file=sys.stderr)"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(run.path / "trackers" / "trackio"), "HOME": str(run.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    runs, logs = json.loads(done.stderr.splitlines()[-1])
    assert runs == [f"small-{state(run, 'trackio').tracked_as}"]
    assert [(log["step"], log.get("reward"), log.get("eval/accuracy")) for log in logs] == [
        (1, 0.1, None),
        (0, None, 0.25),
        (2, 0.2, None),
        (3, 0.3, None),
    ]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a tracker's library that misbehaves; the processes of mirrors find it before any real one."""

    def write(name: str, code: str) -> None:
        (tmp_path / "lib" / name).mkdir(parents=True)
        (tmp_path / "lib" / name / "__init__.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    return write


def children() -> set[psutil.Process]:
    """Other tests may have left some: what multiprocessing keeps until the end."""
    return set(psutil.Process().children())


def test_a_tracker_that_hangs_is_left_behind_and_said(run, library, monkeypatch, caplog):
    library("wandb", "import time; time.sleep(600)")
    monkeypatch.setattr(mirror, "END_S", 0.5)
    before, began = children(), time.monotonic()
    with mirrored(run, Tracking(mirrors=["wandb"]), first=True):
        entered = time.monotonic() - began
        [child] = children() - before
    assert entered < 120 and time.monotonic() - began < 300  # the tracker would sleep for 600
    assert not child.is_running()
    assert "wandb had not taken all records" in caplog.text and "protocol.mirror RUN wandb" in caplog.text


def test_a_tracker_that_cannot_start_is_said_once_and_nothing_else_happens(run, library, capfd):
    library("wandb", "raise OSError('no route to host')")
    with mirrored(run, Tracking(mirrors=["wandb"]), first=True):
        pass
    out, error = capfd.readouterr()
    assert (
        not out and error.count("\n") == 1 and "wandb cannot start: OSError: no route to host; the run goes on" in error
    )
    assert not error.startswith("error:")  # the launcher would take that for the trainer's last word
    assert state(run, "wandb").offset == 0  # all of it comes with the next start


def test_records_that_a_tracker_refuses_are_said_once_and_counted(run, library, capfd):
    library(
        "trackio",
        """
        class Run:
            def log(self, values, step): raise ValueError("the server is full")
            def finish(self): pass
        def init(**settings): return Run()
        """,
    )
    with mirrored(run, Tracking(mirrors=["trackio"]), first=True):
        pass
    assert capfd.readouterr().err.count("the server is full") == 1
    kept = state(run, "trackio")
    assert (kept.mirrored, kept.lost, kept.error) == (0, 3, "ValueError: the server is full")
    assert "trackio: ValueError: the server is full" in warnings(History.open(run.path))  # on the screen of `watch`


@needs("tensorboard")
def test_what_a_killed_trainer_wrote_is_mirrored_and_nothing_is_left_behind(run):
    code = (
        "import sys, time; from pathlib import Path; from protocol.mirror import mirrored; from protocol.rundir import "
        "RunDir; from protocol.recipe import Tracking\n"
        "with mirrored(RunDir(Path(sys.argv[1])), Tracking(mirrors=['tensorboard']), first=True): time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(run.path)])
    while not (run.path / "trackers" / "tensorboard.json").exists():
        time.sleep(0.05)
    [child] = psutil.Process(trainer.pid).children()
    append(run, step(3, 0.3))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    child.wait(40)
    assert state(run, "tensorboard").offset == (run.metrics / "trainer.jsonl").stat().st_size


def test_only_the_first_rank_mirrors(run):
    before = children()
    with mirrored(run, Tracking(mirrors=["tensorboard"]), first=False):
        assert not children() - before


CLUSTER = """
import json, signal, sys
from pathlib import Path
import sampler.replica, trainer.rank
from tests.chaos.cluster import Cluster
with Cluster(Path(sys.argv[1]), steps=20, **{"tracking.mirrors": '["tensorboard", "wandb"]'}) as cluster:
    cluster.run(until=lambda: cluster.steps() >= 8)
    cluster.signal(cluster.trainer.alive[0], signal.SIGKILL)
    cluster.run()
    print(json.dumps([cluster.audit(), cluster.leftovers()]))
"""


@pytest.mark.slow
@pytest.mark.long
@needs("tensorboard")
def test_a_run_with_a_tracker_that_hangs_is_killed_resumed_and_whole(tmp_path, library):
    """A real trainer with a toy model. It waits for the one that hangs only once, at its very end."""
    library("wandb", "import time; time.sleep(600)")
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path / "cluster")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    audit, leftovers = json.loads(done.stdout.splitlines()[-1])
    assert (audit["trained"], audit["lost"], audit["doubled"], leftovers) == (80, 0, 0, [])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "cluster" / "run" / "trackers" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("reward")] == list(range(1, 21))
    assert [event.step for event in board.Scalars("eval/accuracy")] == [0, 5, 10, 15, 20]
