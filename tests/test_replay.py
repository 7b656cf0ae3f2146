"""What a run was fed with is kept, and a replay of it comes to the same weights, bit for bit."""

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from policy.agreement import agree
from policy.model import load_tokenizer
from protocol.errors import UserError
from protocol.keys import open_keys
from protocol.messages import DataSet, Lease
from protocol.metrics import read_metrics
from protocol.rundir import RunDir, resolve_recipe
from protocol.snapshot import listed
from sampler.link import Link
from sampler.session import Load, Session
from tests.golden import tiny
from tests.groups import make_group
from tests.tiny import make_model
from tests.warm import Warm
from trainer.stream import StreamWriter, read_stream, resolve_replay


def groups_of(step: int) -> list:
    return [make_group(2 * step), make_group(2 * step + 1)]


@pytest.fixture
def run(tmp_path):
    rundir, _ = resolve_recipe(tmp_path / "run", None, ["trainer.steps=9"])
    return rundir


def keep(run: RunDir, steps: range, incarnation: int = 1) -> StreamWriter:
    writer = StreamWriter(run.stream, incarnation, on=True)
    for step in steps:
        writer.keep(step, groups_of(step))
    return writer


def steps_of(path: Path) -> list[int]:
    return [step for step, _ in read_stream(path)]


# -- the stream ------------------------------------------------------------------------------------------------------


def test_what_was_kept_is_read_in_the_order_of_the_steps(run):
    keep(run, range(1, 13))
    assert list(read_stream(run.path)) == [(step, groups_of(step)) for step in range(1, 13)]
    assert steps_of(run.stream) == steps_of(run.path)
    assert sorted(os.listdir(run.stream))[0] == "s00000001.i0001.msgpack" and len(os.listdir(run.stream)) == 12


def test_nothing_is_kept_where_the_recipe_says_so(run):
    StreamWriter(run.stream, 1, on=False).keep(1, groups_of(1))
    assert os.listdir(run.stream) == []


def test_a_step_that_cannot_be_written_is_counted_and_stops_nothing(run, caplog):
    writer = keep(run, range(1, 2))
    run.stream.rename(run.path / "elsewhere")
    writer.keep(2, groups_of(2))
    writer.keep(3, groups_of(3))
    (run.path / "elsewhere").rename(run.stream)
    writer.keep(4, groups_of(4))
    assert writer.lost == 2
    assert len(caplog.records) == 1 and "step 2 is missing in the recorded stream" in caplog.text
    stream = read_stream(run.path)
    assert next(stream)[0] == 1
    with pytest.raises(UserError, match=r"step 2 is missing.*--set trainer.steps=1"):
        next(stream)


def test_a_history_that_was_left_is_moved_away(run):
    keep(run, range(1, 6))
    StreamWriter(run.stream, 2, on=True).abandon(3)
    assert steps_of(run.path) == [1, 2, 3]
    assert sorted(os.listdir(run.stream / "abandoned")) == ["s00000004.i0001.msgpack", "s00000005.i0001.msgpack"]
    keep(run, range(4, 5), incarnation=2)
    StreamWriter(run.stream, 3, on=True).abandon(0)
    assert os.listdir(run.stream) == ["abandoned"] and len(os.listdir(run.stream / "abandoned")) == 6


def test_what_could_not_be_moved_away_is_not_taken_for_the_history(run):
    """Incarnation 1 came to step 5; the second one went on from 2, and lost its disk after step 4."""
    keep(run, range(1, 6))
    keep(run, range(3, 5), incarnation=2)
    assert steps_of(run.path) == [1, 2, 3, 4]
    assert [path.name[:15] for path in sorted(run.stream.iterdir())][2:4] == ["s00000003.i0001", "s00000003.i0002"]


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-5],
            "a flipped bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "without its hash": data[32:],
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "cut", "a flipped bit", "without its hash"])
def test_a_damaged_file_is_named(run, how):
    keep(run, range(1, 4))
    spoil(run.stream / "s00000002.i0001.msgpack", how)
    with pytest.raises(UserError, match=r"s00000002\.i0001\.msgpack is damaged"):
        steps_of(run.path)


def test_a_stream_without_steps_or_groups_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"no recorded steps in .*stream"):
        steps_of(run.path)
    with pytest.raises(UserError, match="is no directory"):
        steps_of(tmp_path / "nowhere")
    StreamWriter(run.stream, 1, on=True).keep(1, [])
    with pytest.raises(UserError, match=r"s00000001\.i0001\.msgpack holds no groups"):
        steps_of(run.path)


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_replay_takes_the_recorded_runs_recipe_and_leaves_that_run_alone(run, tmp_path):
    keep(run, range(1, 3))
    rundir, recipe = resolve_replay(run.path, tmp_path / "new", None, ["objective.name=dr_grpo"])
    assert (rundir.path, recipe.objective.name, recipe.trainer.steps) == (tmp_path / "new", "dr_grpo", 9)
    assert resolve_replay(run.stream, tmp_path / "new", None, [])[1] == recipe  # a rank: its launcher resolved it
    with pytest.raises(UserError, match="name one by --run"):
        resolve_replay(run.path, None, None, [])
    (run.metrics / "trainer.jsonl").touch()
    with pytest.raises(UserError, match="needs a new directory"):
        resolve_replay(run.path, run.path, None, [])
    run.stream.rename(tmp_path / "copied")
    with pytest.raises(UserError, match=r"there is no .*recipe.toml.*--recipe"):
        resolve_replay(tmp_path / "copied", tmp_path / "other", None, [])
    assert resolve_replay(tmp_path / "copied", tmp_path / "other", run.recipe, [])[1].trainer.steps == 9


def test_a_stream_from_the_middle_of_a_run_needs_its_weights(run, tmp_path):
    keep(run, range(5, 7))
    with pytest.raises(UserError, match=r"begins with step 5.*weights of step 4 by --set model.path="):
        resolve_replay(run.path, tmp_path / "new", None, [])
    with pytest.raises(UserError, match="begins with step 5"):
        resolve_replay(run.path, tmp_path / "float32", None, ["model.dtype=float32"])
    assert resolve_replay(run.path, tmp_path / "other", None, ["model.path=elsewhere"])[1].model.path == "elsewhere"


# -- replays ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replays(tmp_path_factory):
    """Lines of replays of the tiny recorded run, by name; each in a process of its own, two at a time."""
    directory = tmp_path_factory.mktemp("replays")
    run = tiny.record(directory)
    words = {name: ["--replay", str(run), "--set", f"objective.name={name}"] for name in tiny.OBJECTIVES}
    words["again"] = ["--replay", str(run / "stream"), "--recipe", str(run / "recipe.toml"), "--set", "trainer.steps=2"]
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(tiny.replay, directory / name, *words[name]) for name in words}
    return {name: job.result() for name, job in jobs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("objective", tiny.OBJECTIVES)
def test_loss_and_gradient_of_every_step_are_the_golden_ones(replays, objective):
    """Another processor is off by up to 1e-5 and 2e-7; a learning rate 1 % higher, in the norm, by at least 2e-5."""
    for now, then in zip(replays[objective][1:-1], tiny.golden()[objective], strict=True):
        assert (now["step"], now["groups"]) == (then["step"], then["groups"])
        assert now["loss"] == pytest.approx(then["loss"], rel=5e-4)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=5e-6)


@pytest.mark.slow
def test_a_replay_is_the_same_every_time_and_ends_after_the_steps_that_are_asked_for(replays):
    assert replays["again"][:-1] == replays["dapo"][:3]
    assert (replays["again"][-1]["kind"], replays["again"][-1]["steps"]) == ("end", 2)


@pytest.mark.slow
def test_with_other_settings_it_comes_to_other_weights_from_the_same_start(replays):
    assert replays["dapo"][0] == replays["gspo"][0]
    hashes = {line["weights"] for objective in tiny.OBJECTIVES for line in replays[objective][:-1]}
    assert len(hashes) == 1 + 2 * tiny.STEPS


# -- a run and its replay --------------------------------------------------------------------------------------------


async def sample(rundir: RunDir, recipe, model: Path) -> None:
    """A sampler without an engine: the real session and link, and made-up groups, of the weights announced last."""
    keys = open_keys(rundir.keys)
    agreement = agree(keys.run_id, model, load_tokenizer(model), recipe)
    sets = {"train": DataSet(rows=100, fingerprint="t"), "eval": DataSet(rows=0, fingerprint="e")}
    newest = [None]
    session = Session("one", recipe.network, agreement, sets, lambda held: Load(newest[0], 64 - 4 * len(held), 0), {})
    link = Link(rundir, keys, recipe, session)
    async for news in link.messages():
        if isinstance(news, Lease):
            for group_id, row in news.items:
                made = make_group(
                    group_id, row=row, rewards=[0.0, 1.0, 0.5, 2.0], snapshot=newest[0], session=session.name
                )
                link.answer(made)
        else:
            newest[0] = news.snapshot
            link.loaded()


def trainer(*words: str, log: Path, until: Callable[[], bool] = lambda: False) -> int:
    """Runs two ranks to their end, or kills them and all their processes when `until` holds. Returns the exit code."""
    log.write_text("")
    process = Warm(["-m", "trainer", "--gpus", "2", *words], os.environ, log)
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline and not until():
        time.sleep(0.05)
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    return process.wait()


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A run of two ranks and six steps, killed after the third and gone on with from the second."""
    directory = tmp_path_factory.mktemp("real")
    model = make_model(directory / "model")
    settings = [*SETTINGS, f"model.path={model}"]
    rundir, recipe = resolve_recipe(directory / "run", None, settings)
    threading.Thread(target=lambda: asyncio.run(sample(rundir, recipe, model)), daemon=True).start()
    third = rundir.stream / "s00000003.i0001.msgpack"
    killed = trainer("--run", str(rundir.path), log=directory / "first.log", until=third.exists)
    assert killed == -signal.SIGKILL, (directory / "first.log").read_text()[-3000:]
    code = trainer("--run", str(rundir.path), log=directory / "second.log")
    assert code == 0, (directory / "second.log").read_text()[-3000:]
    return rundir


SETTINGS = [
    "model.dtype=float32",
    "sampling.group_size=4",
    "eval.before=false",
    "eval.after=false",
    "objective.kl_beta=0.0",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=cosine",
    "trainer.steps=6",
    "trainer.prompts_per_step=3",
    "trainer.tokens_per_micro_batch=64",
    "trainer.checkpoint_every=2",
    "trainer.threads=1",
    "trainer.gradient_checkpointing=false",
    "network.beat_s=0.5",
    "network.dead_s=5.0",
]


@pytest.mark.long
@pytest.mark.slow
def test_the_replay_of_a_run_that_was_killed_comes_to_its_weights_bit_for_bit(killed_and_resumed, tmp_path):
    run, again = killed_and_resumed, tmp_path / "again"
    trained = [group.group_id for _, groups in read_stream(run.path) for group in groups]
    assert len(trained) == len(set(trained)) == 18
    assert {path.name[10:15] for path in run.stream.glob("*.msgpack")} == {"i0001", "i0002"}
    records = [record for record in read_metrics(run.metrics / "trainer.jsonl") if record["kind"] == "step"]
    assert max(record["staleness/max"] for record in records) == 1.0

    code = trainer("--replay", str(run.path), "--run", str(again), log=tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    theirs, mine = (load_file(listed(path)[-1] / "model.safetensors") for path in (run.snapshots, again / "snapshots"))
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
    end = read_metrics(again / "replay.jsonl")[-1]
    assert (end["steps"], end["run"]) == (6, "s00000006.i0002 of the recorded run has the same weights")
    then = {record["step"]: (record["loss"], record["grad_norm"]) for record in records}
    now = {
        record["step"]: (record["loss"], record["grad_norm"]) for record in read_metrics(again / "replay.jsonl")[1:-1]
    }
    assert now == then  # where a step was done twice, its second time


@pytest.mark.long
@pytest.mark.slow
def test_all_ranks_of_a_replay_end_when_a_file_is_damaged(killed_and_resumed, tmp_path):
    cut = RunDir(tmp_path / "cut")
    shutil.copytree(killed_and_resumed.stream, cut.stream)
    shutil.copy(killed_and_resumed.recipe, cut.recipe)
    [second] = cut.stream.glob("s00000002.*")
    spoil(second, "a flipped bit")
    assert trainer("--replay", str(cut.path), "--run", str(tmp_path / "new"), log=tmp_path / "log") == 2
    assert f"{second.name} is damaged" in (tmp_path / "new" / "FAILED.md").read_text()
    assert [line["step"] for line in read_metrics(tmp_path / "new" / "replay.jsonl")] == [0, 1]
    with pytest.raises(UserError, match="needs a new directory"):
        resolve_replay(cut.path, tmp_path / "new", None, [])
