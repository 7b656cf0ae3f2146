"""Which rank a process is, by what each launcher really sets; and what is no rank."""

import sys

import pytest

from protocol.errors import RunError, UserError
from protocol.failure import failure, write_failure
from protocol.rundir import Endpoint, resolve_recipe
from trainer import place
from trainer.__main__ import main, of_rank
from trainer.place import Place, find

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
TASK = JOB | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_GTIDS": "4,5,6,7",
}  # fmt: skip


@pytest.mark.parametrize(("environment", "ancestors"), [(TORCHRUN, 1), (DEEPSPEED, 2)])
def test_a_rank_of_a_launcher(environment, ancestors):
    """DeepSpeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE: threads and devices are shared out by it."""
    wanted = Place(rank=5, world=8, local_rank=1, local_world=4, address="n1", port=29500, ancestors=ancestors)
    assert find(environment) == wanted


def test_torchrun_says_that_it_serves_the_store():
    assert find(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).agent
    assert not find(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).agent and not find(DEEPSPEED).agent


def test_a_task_of_a_slurm_step_is_a_rank_and_torch_reads_the_same():
    found = find(TASK)
    assert found == Place(rank=5, world=8, local_rank=1, local_world=4, address="n1", port=20_000 + 41 + 2 * 1009)
    assert find(TASK | found.variables()) == found


def test_the_user_chooses_where_the_ranks_of_a_step_meet():
    found = find(TASK | {"MASTER_ADDR": "n1-ib0", "MASTER_PORT": "4711"})
    assert (found.address, found.port) == ("n1-ib0", 4711)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        JOB,  # a shell of salloc on the login node
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"},  # on a node
    ],
)
def test_what_is_no_rank(environment):
    assert find(environment) is None


def test_a_launcher_inside_a_step_counts_more_than_the_step():
    """srun starts one torchrun a node."""
    assert find(TASK | TORCHRUN) == find(TORCHRUN)


def without(environment: dict, name: str) -> dict:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (without(TORCHRUN, "MASTER_ADDR"), "RANK is set, MASTER_ADDR not"),
        (without(DEEPSPEED, "LOCAL_RANK"), "RANK is set, LOCAL_RANK not"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a port"),
        (TASK | {"MASTER_PORT": "0"}, "MASTER_PORT=0: expected a port"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (DEEPSPEED | {"RANK": "first"}, "RANK=first: expected a number"),
        (TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts"),
        (without(TASK, "SLURM_GTIDS"), "SLURM_GTIDS is not set"),
    ],
)
def test_contradictions_are_one_line(environment, said):
    with pytest.raises(UserError, match=said) as caught:
        find(environment)
    assert "\n" not in str(caught.value)


def test_slurm_expands_its_own_list_of_nodes(tmp_path, monkeypatch):
    """The command is made here: what Slurm itself answers is tested with a real one."""
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-09],login" ] && printf "gpu07\\ngpu08\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    environment = TASK | {"SLURM_STEP_NODELIST": "gpu[07-09],login"}
    assert find(environment).address == "gpu07"
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"export MASTER_ADDR=NODE"):
        find(environment)


def test_a_process_that_no_launcher_started_is_told_how(monkeypatch):
    for name in [*TASK, *TORCHRUN]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="deepspeed, torchrun or srun"):
        place.here()


@pytest.fixture
def run(tmp_path):
    """A directory whose run is complete, so that a rank has nothing to do."""
    found, _ = resolve_recipe(tmp_path / "run", None, ["trainer.steps=5"])
    found.write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=1, host="n1", steps=9))
    return found


def as_rank(number: int, monkeypatch) -> None:
    for name, value in (TORCHRUN | {"RANK": str(number), "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)


def test_only_the_first_rank_writes_the_shared_recipe(run, monkeypatch):
    """Another one with other settings is refused when the ranks compare them, and must have changed nothing."""
    monkeypatch.setattr(sys, "argv", ["trainer", "--run", str(run.path), "--set", "trainer.steps=7"])
    before = run.recipe.read_text()
    as_rank(1, monkeypatch)
    assert main() == 0 and run.recipe.read_text() == before
    as_rank(0, monkeypatch)
    assert main() == 0 and run.recipe.read_text() != before


def test_what_an_earlier_start_said_does_not_speak_for_ranks_that_fail_before_they_have_met(run, monkeypatch):
    as_rank(0, monkeypatch)
    write_failure(run.path, "trainer rank 3", 76, "weights are not finite")
    with pytest.raises(RunError), of_rank(place.here(), run):
        raise RunError("not all of 8 ranks came")
    assert failure(run.path, "trainer") == (1, "not all of 8 ranks came")


def test_another_rank_leaves_the_reason_of_this_start_alone(run, monkeypatch):
    as_rank(1, monkeypatch)
    write_failure(run.path, "trainer rank 0", 73, "No space left on device")
    with pytest.raises(RunError), of_rank(place.here(), run):
        raise RunError("rank 0 has ended")
    assert failure(run.path, "trainer") == (73, "No space left on device")
