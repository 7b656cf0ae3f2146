"""Ranks meet, and those that are missing, or hold another run, recipe or software than rank 0, are told by name."""

import functools
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import pytest
import torch.distributed as dist

from protocol import versions
from protocol.errors import RunError, StorageError, UserError
from protocol.recipe import Recipe, TrainerTable
from protocol.rundir import RunDir
from tests.test_backend import free_port
from trainer import notes, roll_call
from trainer.notes import Absent, Notes
from trainer.place import Place
from trainer.rendezvous import Peer, gone, meet, nodes
from trainer.roll_call import Held, call_roll, difference, plain, refuse_other_kernels, software


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


def test_software_that_one_side_lacks_is_named(rundir, monkeypatch):
    said = difference(OWN, FIRST, rundir, held(**{"liger-kernel": "0.5"}), held())
    assert f"has liger-kernel {software().get('liger-kernel', 'none')}, rank 0 on n1 (10.0.0.1) has 0.5" in said
    monkeypatch.setattr(versions, "LIBRARIES", ("torch", "no-such-library"))
    assert software().keys() == {"python", "torch", "this code"}


def test_nodes_in_one_line():
    assert nodes([peer(0, "n1"), peer(1, "n1"), peer(2, "n2")]) == "3 ranks on 2 nodes: n1 (0, 1), n2 (2)"


def test_who_is_gone_is_told_by_its_process_here_and_by_its_address_elsewhere():
    alive = os.getpid()
    peers = [peer(0, "n1", alive), peer(1, "n1", alive), peer(2, "n2"), peer(3, "n3")]
    said = "[/x/pair.cc:537] Read error [10.0.0.3]:4711: Connection reset by peer"
    assert gone(peers, 0, said) == [peers[3]]
    assert gone(peers, 0, "Connection closed by peer [::ffff:10.0.0.2]:4711") == [peers[2]]
    assert gone(peers, 0, "Broken pipe", look_s=0.0) == peers[2:]  # nobody knows which of them
    peers[1] = peer(1, "n1")  # a process that is no more
    assert gone(peers, 0, said) == [peers[1]]


def test_who_is_gone_on_this_node_may_still_be_ending():
    peers = [peer(0, "n1", os.getpid()), peer(1, "n1", os.getpid()), peer(2, "n2"), peer(3, "n1", os.getpid())]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ending:
        peers[1] = peer(1, "n1", ending.pid)
        said = "Connection closed by peer [10.0.0.1]:4711"
        assert gone(peers, 0, said, look_s=0.2) == [peers[1], peers[3]]  # none of them is seen to be gone
        assert ending.stdin
        ending.stdin.close()
        assert gone(peers, 0, said, look_s=30.0) == [peers[1]]
    alone = [peer(0, "n1", os.getpid()), peer(1, "n1", os.getpid())]
    assert gone(alone, 0, "Broken pipe", look_s=0.0) == [alone[1]]


def stores(count: int) -> tuple[dist.Store, list[dist.Store]]:
    """One that serves, and clients."""
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return served, [dist.TCPStore("127.0.0.1", served.port, wait_for_workers=False) for _ in range(count)]


KEPT = functools.cache(stores)
"""To connect sometimes takes torch five seconds."""


class Ranks:
    """Some ranks of a world, each in a thread with a client of its own."""

    def __init__(self, world: int) -> None:
        peers = [peer(rank, f"n{rank}") for rank in range(world)]
        apart, names = secrets.token_hex(4), list(map(str, peers))
        self.each = [
            SimpleNamespace(rank=rank, world=world, first=rank == 0, peers=peers, notes=Notes(store, rank, names))
            for rank, store in enumerate(dist.PrefixStore(apart, one) for one in KEPT(4)[1][:world])
        ]

    def do(self, act: Callable, *present: int) -> list[object]:
        """What `act` gives or raises on the ranks that are there."""
        there = [self.each[rank] for rank in present or range(len(self.each))]
        with ThreadPoolExecutor(len(there)) as threads:
            running = [threads.submit(act, one) for one in there]
            return [one.exception(60) or one.result() for one in running]


def test_notes_of_all_ranks_come_in_their_order():
    assert Ranks(3).do(lambda one: one.notes.swap("x", f"of {one.rank}", str)) == [["of 0", "of 1", "of 2"]] * 3


def test_all_ranks_hear_the_same_of_those_that_are_missing():
    heard = Ranks(4).do(lambda one: one.notes.swap("x", "", str, 1.0), 0, 2)
    assert all(isinstance(one, Absent) for one in heard) and heard[0].args == heard[1].args
    assert "no answer of rank 1 on n1 (10.0.0.1), rank 3 on n3 (10.0.0.3) about x within 1 s" in str(heard[0])


def test_a_lost_store_is_one_line_with_the_rank_that_served_it():
    served, [client] = stores(1)
    del served
    with pytest.raises(RunError, match=r"^rank 0 on n1, where the ranks' store is, has ended or is cut off"):
        Notes(client, 1, ["rank 0 on n1", "rank 1 on n2"]).swap("x", "", str)


def test_a_stranger_in_the_store_is_one_line(monkeypatch):
    monkeypatch.setattr(notes, "FAREWELL_S", 0.2)
    ranks = Ranks(2)
    dist.PrefixStore("x", ranks.each[0].notes.store).set("1", b"\xc1 no note")
    [said] = ranks.do(lambda one: one.notes.swap("x", "", str), 0)
    assert isinstance(said, RunError) and "who else reaches MASTER_PORT?" in str(said)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [UserError("no such model"), StorageError("disk full"), ZeroDivisionError("a bug")])
def test_what_fails_on_one_rank_ends_all_with_its_name(rank, error):
    def act(one):
        if one.rank == rank:
            raise error
        return one.rank

    expected = type(error) if isinstance(error, RunError) else RunError
    heard = Ranks(3).do(lambda one: one.notes.together("x", lambda: act(one)))
    if expected is RunError:
        assert heard.pop(rank) is error  # a bug keeps its traceback
    assert {type(one) for one in heard} == {expected} and len({str(one) for one in heard}) == 1
    assert str(heard[0]).startswith(f"rank {rank} on n{rank} (10.0.0.{rank}): ") and str(error) in str(heard[0])


def roll_of(rundir: RunDir, other: RunDir, recipe: Recipe) -> list[object]:
    """Two ranks, of which the second has another directory and recipe."""
    held = [(rundir, Recipe()), (other, recipe)]
    return Ranks(2).do(lambda one: call_roll(one, *held[one.rank]))


def test_a_roll_call_leaves_nothing_and_ends_all_with_one_sentence(rundir):
    assert roll_of(rundir, rundir, Recipe()) == [None, None]
    one, other = roll_of(rundir, rundir, Recipe(trainer=TrainerTable(steps=7)))
    assert isinstance(one, UserError) and str(one) == str(other)
    assert str(one).startswith("rank 1 on n1 (10.0.0.1) has trainer.steps = 7, rank 0 on n0 (10.0.0.0) has 200")
    assert [path.name for path in rundir.logs.iterdir()] == ["token"]


def test_a_run_directory_that_one_rank_cannot_use_ends_all_for_a_later_start(rundir, tmp_path):
    gone = RunDir(tmp_path / "unmounted")
    for first, second, name in ((rundir, gone, "rank 1 on n1"), (gone, rundir, "rank 0 on n0")):
        one, other = roll_of(first, second, Recipe())
        assert type(one) is type(other) is StorageError and str(one) == str(other)
        assert str(one).startswith(f"{name} (10.0.0") and "unmounted" in str(one)


def test_ranks_that_chose_other_kernels_are_refused():
    def chosen(one) -> None:
        refuse_other_kernels(one, "attention sdpa" if one.rank == 2 else "attention varlen")

    heard = Ranks(3).do(chosen)
    assert all(isinstance(one, UserError) for one in heard)
    assert "rank 2 on n2 (10.0.0.2) would compute with attention sdpa, rank 0 on n0" in str(heard[0])
    assert Ranks(2).do(chosen) == [None, None]


def place(rank: int, world: int, port: int, address: str = "127.0.0.1") -> Place:
    return Place(rank=rank, world=world, local_rank=rank, local_world=world, address=address, port=port)


def meeting(world: int, *present: int, **limits: float) -> list[BaseException | None]:
    port = free_port()
    with ThreadPoolExecutor(world) as threads:
        running = [threads.submit(meet, place(rank, world, port), **limits) for rank in present]
        return [one.exception(60) for one in running]


def test_ranks_meet_and_one_that_never_comes_is_named_by_all_others():
    assert meeting(2, 0, 1) == [None, None]
    one, other = meeting(3, 0, 1, come_s=10.0)
    assert str(one) == str(other) and "not all of 3 ranks came" in str(one) and "rank 2 did not" in str(one)


def test_a_rank_that_ends_before_gloo_connects_is_no_mistake_of_the_users(monkeypatch):
    """Slurm starts such a job again; one that a setting can mend ends for good."""
    swap = Notes.swap

    def ends(notes: Notes, about: str, own: object, *rest: object) -> list:
        peers = swap(notes, about, own, *rest)
        if notes.rank == 1:
            raise KeyboardInterrupt
        return peers

    monkeypatch.setattr(Notes, "swap", ends)
    first, _ = meeting(2, 0, 1, connect_s=2.0)
    assert type(first) is RunError and "gloo does not connect the 2 ranks within 2 s" in str(first)


def test_an_address_that_cannot_be_is_refused_before_the_ranks_wait():
    with pytest.raises(UserError, match=r"MASTER_ADDR=n1\.invalid: "):
        meet(place(1, 2, 20_000, "n1.invalid"), come_s=1.0)


def test_a_first_rank_that_is_not_there_is_what_the_others_miss():
    [said] = meeting(2, 1, come_s=1.0)
    assert type(said) is RunError and "finds no rank 0 at 127.0.0.1:" in str(said)
