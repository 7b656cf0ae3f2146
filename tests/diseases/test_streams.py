"""The recordings are what the table says, small, and free of the machine they were made on."""

import tarfile

import pytest

from doctor.history import History
from tests.diseases import STREAMS, recorded, unpack
from tests.diseases.compact import compact
from tests.diseases.table import DISEASES


def test_each_recording_is_in_the_table_and_all_are_small():
    assert set(recorded()) <= set(DISEASES)
    sizes = [path.stat().st_size for path in STREAMS.iterdir()]
    assert max(sizes) < 60_000 and sum(sizes) < 800_000


@pytest.mark.parametrize("name", recorded())
def test_a_recording_is_a_run_that_history_reads(name, tmp_path):
    run = unpack(name, tmp_path)
    history = History.open(run)
    assert history.unreadable == 0 and history.train and history.samplers
    assert history.steps or history.skipped
    text = "".join(path.read_text() for path in run.rglob("*.*"))
    assert not [place for place in ("/tmp", "/root", "/home", "/work") if place in text]


def test_compacting_twice_changes_nothing(tmp_path):
    run, again = unpack("healthy", tmp_path), tmp_path / "again.tar.xz"
    compact(run, again, {})
    with tarfile.open(STREAMS / "healthy.tar.xz") as kept, tarfile.open(again) as made:
        for member in kept:
            assert kept.extractfile(member).read() == made.extractfile(member.name).read(), member.name
