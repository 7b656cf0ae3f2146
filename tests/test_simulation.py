"""Thousands of bad histories in virtual time, and the proof that they are bad enough: without one of its safety pieces
the protocol fails in them. `tests/simulation` has the simulator; every test fails with the seed to replay."""

import contextlib
import io

import pytest

from tests.seeds import first_seed
from tests.simulation.batch import Batch, run
from tests.simulation.history import simulate
from tests.simulation.mutants import MUTANTS, SEEDS, caught

FEW = 200
"""Always the same ones, so that the faults in them can be counted."""
NEW = 600
"""Other ones in each run of the suite."""
ENOUGH = 10
"""Times that a fault must have been met in the few histories, or they prove nothing about it."""
LOAD_BEARING = [mutant for mutant in MUTANTS if mutant.kinds]


def told(batch: Batch) -> str:
    return "\n".join(
        f"seed {seed}: {violation}; python -m tests.simulation --seed {seed} --verbose"
        for seed, violation in batch.violations.items()
    )


@pytest.fixture(scope="module")
def few() -> Batch:
    """The first histories, none of them with a violation."""
    batch = run(0, FEW)
    assert not batch.violations, told(batch)
    return batch


def met(batch: Batch, *counters: str) -> bool:
    return all(batch.counts[counter] >= ENOUGH for counter in counters)


@pytest.mark.fault("A3", "E7")
def test_a_trainer_killed_at_any_moment_costs_no_group_and_trains_none_twice(few):
    moments = ("take", "step", "store", "save", "exam", "boot")
    assert met(few, *(f"trainer kills in {moment}" for moment in moments), "trainer stops")
    assert met(few, "groups accepted without a lease", "groups stale", "groups from a stranger")


@pytest.mark.fault("B1", "B6")
def test_samplers_killed_leaving_and_joining_cost_no_group(few):
    assert met(few, "sampler kills", "goodbyes") and few.counts["samplers"] > 3 * FEW


@pytest.mark.fault("C1", "M2")
def test_processes_stopped_for_a_while_hanging_engines_and_jumping_clocks_cost_no_group(few):
    assert met(few, "pauses", "hangs", "clock jumps")


@pytest.mark.fault("D3")
def test_partitions_longer_than_a_peer_may_be_silent_cost_no_group(few):
    assert met(few, "partitions", "groups duplicate")


@pytest.mark.fault("E1", "E2", "E3", "E4")
def test_messages_lost_repeated_and_reordered_cost_no_group(few):
    assert met(few, "messages repeated", "messages reordered", "groups duplicate")
    assert met(few, *(f"messages dropped: {kind}" for kind in ("Lease", "Ack", "Group", "Pulse", "Welcome", "Who")))


@pytest.mark.fault("F1", "F3")
def test_no_more_is_held_than_staleness_allows_however_slow_a_trainer_or_a_sampler_is(few):
    """The audit looks at leases and ready groups after every event."""
    assert met(few, "stragglers", "events at the cap", "groups full")


@pytest.mark.fault("G10")
def test_snapshots_unreadable_spoiled_or_removed_before_a_slow_reader_came_stop_nobody(few):
    assert met(few, "snapshots unreadable", "snapshots rotten", "snapshots gone before they were read")


@pytest.mark.fault("I1", "I7", "I8")
def test_unsound_groups_are_not_trained_and_only_those_that_nobody_can_answer_are_set_aside(few):
    assert met(few, "groups invalid", "poisoned groups set aside", "failures")
    assert few.counts["hostile samplers rejected"] >= 5


@pytest.mark.fault("I9")
def test_groups_of_rolled_back_or_too_old_weights_are_not_trained(few):
    """The audit knows which snapshots led to the weights that each step began with."""
    assert met(few, "groups stale", "trainer kills in take")


def test_every_exam_has_one_answer_to_each_held_out_prompt(few):
    assert met(few, "exams", "trainer kills in exam")


@pytest.mark.long
def test_new_histories_have_no_violation():
    first = first_seed() * NEW
    batch = run(first, NEW, stop_at=3)
    assert not batch.violations, told(batch)


@pytest.mark.parametrize("mutant", LOAD_BEARING, ids=lambda mutant: mutant.piece)
def test_without_a_safety_piece_there_is_a_violation_of_its_kind(mutant):
    found = caught(mutant, SEEDS, patience=3, **mutant.where)
    assert found, f"no violation in {SEEDS} histories"
    assert {violation.kind for violation in found} <= set(mutant.kinds), found


@pytest.mark.parametrize("mutant", LOAD_BEARING, ids=lambda mutant: mutant.piece)
def test_with_all_its_pieces_the_same_histories_have_none(mutant):
    for seed in range(SEEDS // 6):
        simulate(seed, **mutant.where)


def test_a_seed_always_tells_the_same_story():
    stories = []
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as story:
            simulate(3, verbose=True)
        stories.append(story.getvalue())
    assert stories[0] == stories[1] and "trainer" in stories[0]


@pytest.mark.parametrize("seed", [1023495])
def test_histories_that_once_went_wrong_go_right(seed):
    """1023495: a healthy sampler was sent away, because a poisoned prompt's answer was sent again and again."""
    simulate(seed)
