"""Ranks that hold another run, recipe or software than rank 0 are told so by name, before a model is loaded."""

import msgspec
import pytest

from protocol.recipe import Recipe, TrainerTable
from protocol.rundir import RunDir
from trainer import roll_call
from trainer.rendezvous import Peer, gone, nodes
from trainer.roll_call import Held, difference, plain, software


def peer(rank: int, host: str, pid: int = 2**22 + 1, address: str = "") -> Peer:
    return Peer(rank=rank, host=host, pid=pid, address=address or f"10.0.0.{host[-1]}", gloo="eth0")


FIRST, OWN = peer(0, "n1"), peer(2, "n2")


@pytest.fixture
def rundir(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(roll_call, "SEEN_S", 0.0)
    found = RunDir(tmp_path)
    found.make()
    (found.logs / "token").touch()
    return found


def held(token: str = "token", recipe: Recipe | None = None, run: str = "/runs/x", **versions: str) -> Held:
    found = Held(token=token, run=run, recipe=plain(recipe or Recipe()), software=software() | versions)
    return msgspec.json.decode(msgspec.json.encode(found), type=Held)


def test_ranks_that_hold_the_same_go_on(rundir):
    assert difference(OWN, FIRST, rundir, held(), held()) == ""


def test_another_directory_of_the_same_name_is_told_from_the_shared_one(rundir):
    said = difference(OWN, FIRST, rundir, held("other"), held())
    assert said.startswith("rank 2 on n2 (10.0.0.2) does not see what rank 0 on n1") and "all nodes share" in said


def test_another_path_to_the_same_directory_is_named(rundir):
    said = difference(OWN, FIRST, rundir, held(run="/mnt/runs/x"), held())
    assert "has the run directory at /runs/x, rank 0 on n1 (10.0.0.1) at /mnt/runs/x" in said


def test_another_setting_is_named_with_both_values(rundir):
    said = difference(OWN, FIRST, rundir, held(recipe=Recipe(trainer=TrainerTable(steps=7))), held())
    assert "has trainer.steps = 200, rank 0 on n1 (10.0.0.1) has 7" in said


@pytest.mark.parametrize("name", ["torch", "this code"])
def test_other_software_is_named_with_both_versions(rundir, name):
    said = difference(OWN, FIRST, rundir, held(**{name: "9.9"}), held())
    assert f"has {name} {software()[name]}, rank 0 on n1 (10.0.0.1) has 9.9" in said


def test_nodes_in_one_line():
    assert nodes([peer(0, "n1"), peer(1, "n1"), peer(2, "n2")]) == "3 ranks on 2 nodes: n1 (0, 1), n2 (2)"


def test_who_is_gone_is_told_by_its_process_here_and_by_its_address_elsewhere():
    import os

    alive = os.getpid()
    peers = [peer(0, "n1", alive), peer(1, "n1", alive), peer(2, "n2"), peer(3, "n3")]
    said = "[/x/pair.cc:537] Read error [10.0.0.3]:4711: Connection reset by peer"
    assert gone(peers, 0, said) == [peers[3]]
    assert gone(peers, 0, "Connection closed by peer [::ffff:10.0.0.2]:4711") == [peers[2]]
    assert gone(peers, 0, "Broken pipe") == peers[2:]  # nobody knows which of them
    peers[1] = peer(1, "n1")  # a process that is no more
    assert gone(peers, 0, said) == [peers[1]]
