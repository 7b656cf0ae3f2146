"""Every crasher that was ever found, again; and half a minute of new inputs. `python -m tests.fuzz all` does more."""

import pytest

from protocol import codec, messages
from tests.fuzz import engines, wire
from tests.fuzz.targets import SEEDS, TARGETS
from tests.seeds import first_seed

SECONDS = 5.0
"""For each target, half a minute for all; with other inputs in each run of the suite."""
REGRESSIONS = [(path.parent.name, path) for path in sorted(engines.CORPUS.glob("*/*"))]


@pytest.mark.parametrize(("target", "path"), REGRESSIONS, ids=lambda value: getattr(value, "name", value))
def test_no_crasher_comes_back(target, path):
    TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_valid_inputs_and_nothing_at_all_pass(target):
    for data in [*SEEDS[target], b"", b"\0", b"\1", b"\2", b"\3"]:
        TARGETS[target](data)


def test_mutations_start_from_a_message_of_every_kind():
    assert {type(codec.decode_up(frame)) for frame in wire.UP} == set(messages.Up.__args__)
    assert {type(codec.decode_down(frame)) for frame in wire.DOWN} == set(messages.Down.__args__)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("F6", "G4", "G5", "O4")
@pytest.mark.parametrize("target", TARGETS)
def test_some_seconds_of_hostile_bytes_violate_nothing(target):
    report = engines.by_random(target, inputs=None, seconds=SECONDS, seed=first_seed())
    assert not report.crashes, f"{report}  seed {first_seed()}"
    assert report.inputs > 10, "it did not run"


def test_the_same_seed_gives_the_same_inputs(monkeypatch):
    seen: list[list[bytes]] = []
    for seed in (1, 1, 2):
        seen.append([])
        monkeypatch.setitem(TARGETS, "decoder", seen[-1].append)
        engines.by_random("decoder", inputs=200, seconds=None, seed=seed)
    assert seen[0] == seen[1] != seen[2]


def test_a_crasher_is_kept_and_named_once(tmp_path, monkeypatch):
    def broken(data: bytes) -> None:
        if len(data) > 3:
            raise ZeroDivisionError

    monkeypatch.setitem(TARGETS, "decoder", broken)
    report = engines.by_random("decoder", inputs=100, seconds=None, seed=0, corpus=tmp_path)
    [(place, path)] = report.crashes.items()
    assert "ZeroDivisionError in test_fuzz.py" in place
    with pytest.raises(ZeroDivisionError):
        broken(path.read_bytes())


class Anything:
    """A pattern that every name fulfils."""

    def fullmatch(self, text: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("target", "place", "defect"),
    [
        ("decoder", "protocol.codec._decode", lambda decoder, frame: decoder.decode(frame)),
        ("decoder", "trainer.desk.problem", lambda group, **rules: None),
        ("ledger", "trainer.ledger.Ledger.is_done", lambda self, group_id: group_id < self.done_below),
        ("ledger", "trainer.ledger.Ledger._requeue", lambda self, group_id: None),
        ("ledger", "trainer.ledger.Ledger._staleness", lambda self, group: 0),
        ("snapshot", "protocol.snapshot._is", lambda data, expected: True),
        ("snapshot", "protocol.snapshot.NAME", Anything()),
        ("recipe", "protocol.checks._not_finite", lambda value: None),
        ("recipe", "protocol.checks._is_everywhere", lambda address: False),
        ("answers", "tests.fuzz.targets.final_answer", lambda text: 1 / len(text)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_fuzzer_notices_a_defect(target, place, defect, tmp_path, monkeypatch):
    monkeypatch.setattr(place, defect)
    assert engines.by_random(target, inputs=4000, seconds=None, seed=0, corpus=tmp_path).crashes
