"""Checkpoints and snapshots go when nobody needs them any more, the oldest first, and never one that is needed."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import StorageError
from protocol.recipe import TrainerTable
from protocol.rundir import RunDir
from trainer.retention import Stored, check_room, size, size_of_newest, surplus, tidy


def stored(letter: str, *sizes: int) -> list[Stored]:
    return [Stored(f"{letter}{step}", size) for step, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("checkpoints", "snapshots", "needed", "limit", "gone"),
    [
        ((5, 5, 5, 5), (1, 1), set(), 0, ["c0"]),
        ((5, 5), (1,) * 5, set(), 0, ["s0", "s1"]),
        ((5, 5, 5, 5), (1,) * 5, {"c0", "s1"}, 0, ["s0"]),
        ((5, 5, 5), (1, 1), set(), 17, []),
        ((5, 5, 5), (1, 1), set(), 16, ["c0"]),
        ((5, 5, 5), (1, 1), set(), 8, ["c0", "c1"]),
        ((5, 5, 5), (1, 1), set(), 1, ["c0", "c1"]),  # the newest of all, and what samplers may ask for
        ((5, 5, 5), (1, 1), {"c0"}, 1, ["c1"]),  # it was loaded: newer ones may be damaged
        ((5, 5, 5), (1,) * 5, set(), 18, ["s0", "s1"]),  # enough
        ((5, 5, 5), (1,) * 5, set(), 17, ["s0", "s1", "c0"]),
        ((), (), set(), 1, []),
    ],
)
def test_what_goes_and_in_which_order(checkpoints, snapshots, needed, limit, gone):
    found = surplus(
        stored("c", *checkpoints),
        stored("s", *snapshots),
        keep_checkpoints=3,
        keep_snapshots=3,
        needed=needed,
        limit=limit,
    )
    assert found == gone


sizes = st.lists(st.integers(0, 9), max_size=6)


@given(
    sizes, sizes, st.integers(1, 4), st.integers(2, 4), st.sets(st.sampled_from(["c0", "c2", "s0", "s3"])), st.data()
)
def test_nothing_that_is_needed_ever_goes(c, s, keep_checkpoints, keep_snapshots, needed, data):
    checkpoints, snapshots, limit = stored("c", *c), stored("s", *s), data.draw(st.integers(0, 60))
    settings = {"keep_checkpoints": keep_checkpoints, "keep_snapshots": keep_snapshots, "needed": needed}
    gone = surplus(checkpoints, snapshots, limit=limit, **settings)
    safe = {one.name for one in checkpoints[-1:] + snapshots[-keep_snapshots:]} | needed
    assert not safe & {*gone} and len({*gone}) == len(gone)
    left = [one for one in checkpoints + snapshots if one.name not in gone]
    over = limit and sum(one.size for one in left) > limit
    assert not over or all(one.name in safe for one in left if one.name.startswith("c"))
    assert gone[: len(surplus(checkpoints, snapshots, limit=0, **settings))] == surplus(
        checkpoints, snapshots, limit=0, **settings
    )


@pytest.fixture
def rundir(tmp_path):
    """Four checkpoints of 3 MiB and five snapshots of 1 MiB."""
    result = RunDir(tmp_path / "run")
    result.make()
    for step in range(5):
        fill(result.snapshots / f"s{step:08d}.i0001", 1)
    for step in range(4):
        fill(result.checkpoints / f"c{step:08d}.i0001", 3)
    return result


def fill(path: Path, mebibytes: int) -> None:
    """A directory that counts as sealed."""
    (path / "ds").mkdir(parents=True)
    (path / "manifest.json").touch()
    (path / "ds" / "data").write_bytes(bytes(mebibytes << 20))


def names(rundir: RunDir) -> str:
    return " ".join(sorted(f"{path.name[0]}{path.name[8]}" for path in rundir.path.glob("[cs]*/[cs]0*")))


def test_the_numbers_of_the_recipe_and_what_somebody_uses(rundir):
    rundir.best.symlink_to("snapshots/s00000001.i0001")
    assert tidy(rundir, TrainerTable(max_staleness=0), {"s00000000.i0001"}) == 0
    assert names(rundir) == "c2 c3 s0 s1 s3 s4"


@pytest.mark.parametrize(("limit", "left", "excess"), [(12, "c1 c2 c3 s2 s3 s4", 0), (9, "c2 c3 s2 s3 s4", 0)])
def test_the_bytes_of_the_recipe(rundir, limit, left, excess):
    assert tidy(rundir, TrainerTable(keep_checkpoints=3, keep_gb=limit / 1024), set()) == excess
    assert names(rundir) == left


def test_a_limit_that_cannot_be_kept_is_said_once(rundir, caplog):
    from trainer.store import Store  # deepspeed: seconds

    settings = TrainerTable(keep_gb=4 / 1024, max_staleness=1)
    inbox = SimpleNamespace(loaded=lambda: {"s00000000.i0001"}, pinned=lambda: {"s00000001.i0001"})
    store = Store(rundir, None, SimpleNamespace(newest="c00000002.i0001"), None, settings, first=True)
    with caplog.at_level(logging.WARNING, "trainer.store"):
        for step in (1, 2):
            store.checkpoint(SimpleNamespace(steps_done=step), inbox)
    assert names(rundir) == "c2 c3 s0 s1 s2 s3 s4"
    assert caplog.text.count("more than trainer.keep_gb") == 1


def test_room_is_looked_at_before_anything_is_written(rundir):
    assert size_of_newest(rundir.checkpoints) == size(rundir.checkpoints / "c00000003.i0001") == 3 << 20
    assert size_of_newest(rundir.rollouts) == 0
    check_room(rundir.path, "c9", 1)
    with pytest.raises(StorageError, match=r"no room for c9: \d+\.\d MiB needed, \d+\.\d free in .*run; free space"):
        check_room(rundir.path, "c9", shutil.disk_usage(rundir.path).total + 1)
