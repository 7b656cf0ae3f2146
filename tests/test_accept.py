"""A group that makes no sense never reaches the loss."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import Malformed, pack, unpack
from protocol.messages import Span
from tests.groups import make_group
from trainer.accept import MAX_POSITIVE, problem

RULES = {"completions": 2, "max_tokens": 20, "vocabulary": 320, "reference": False}


def changed(**fields):
    """A sound group whose first completion has other fields."""
    group = make_group(0, lengths=[3, 4])
    first = msgspec.structs.replace(group.completions[0], **fields)
    return msgspec.structs.replace(group, completions=[first, group.completions[1]])


def floats(*values):
    return pack(np.array(values, np.float32))


def test_a_sound_group_has_no_problem():
    assert problem(make_group(0, lengths=[3, 4]), **RULES) is None
    assert problem(make_group(0, reference=True), **RULES | {"reference": True}) is None


@pytest.mark.fault("I1", "I2", "I3")
@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": floats(-1, float("nan"), -1)},
        {"logprobs": floats(-1, float("-inf"), -1)},
        {"logprobs": floats(-1, 0.5, -1)},
        {"logprobs": floats(-1, -1)},
        {"logprobs": pack(np.array([1, 2, 3], np.int32))},
        {"tokens": pack(np.array([1, 2, 320], np.int32))},
        {"tokens": pack(np.array([1, 2, -1], np.int32))},
        {"tokens": pack(np.array([], np.int32)), "logprobs": floats()},
        {"tokens": b"odd"},
        {"reward": float("nan")},
        {"reward": float("inf")},
        {"ref_logprobs": floats(-1, -1, -1)},
        {"spans": [Span("s", 0, 2)]},
        {"spans": [Span("s", 1, 3)]},
        {"spans": [Span("s", 0, 2), Span("t", 1, 3)]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_poison_is_named(fields):
    assert problem(changed(**fields), **RULES)


@pytest.mark.fault("I4")
def test_a_group_of_another_size_is_refused():
    assert "expected 2" in problem(make_group(0, rewards=[0.0, 1.0, 0.0]), **RULES)


@pytest.mark.fault("I2")
def test_a_completion_longer_than_agreed_is_refused():
    assert "expected 1 to 20" in problem(make_group(0, lengths=[3, 21]), **RULES)


@pytest.mark.fault("I2")
def test_missing_reference_logprobs_are_refused_where_the_loss_needs_them():
    assert "missing" in problem(make_group(0), **RULES | {"reference": True})


# -- any value, anywhere -----------------------------------------------------------------------------------------


def poisoned(which: int, **fields):
    """A sound group of two completions with reference log-probs, one of which has other fields."""
    group = make_group(0, lengths=[3, 4], reference=True)
    completions = list(group.completions)
    completions[which] = msgspec.structs.replace(completions[which], **fields)
    return msgspec.structs.replace(group, completions=completions)


REFERENCED = RULES | {"reference": True}
WRONG_LOGPROB = st.sampled_from([float("nan"), float("inf"), float("-inf")]) | st.floats(2 * MAX_POSITIVE, 1e30)
WHICH = st.integers(0, 1)


@pytest.mark.fault("I1")
@given(WHICH, st.sampled_from(["logprobs", "ref_logprobs"]), st.integers(0, 2), WRONG_LOGPROB)
def test_one_logprob_that_cannot_be_spoils_the_group(which, field, place, wrong):
    values = unpack(getattr(poisoned(which).completions[which], field)).copy()
    values[place] = wrong
    assert "log-probs are not finite" in problem(poisoned(which, **{field: pack(values)}), **REFERENCED)


@pytest.mark.fault("I1")
@given(WHICH, st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_one_reward_that_is_not_finite_spoils_the_group(which, wrong):
    assert problem(poisoned(which, reward=wrong), **REFERENCED) == "reward is not finite"


@pytest.mark.fault("I3")
@given(WHICH, st.integers(0, 2), st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-1, 0, 319, 320]))
def test_a_token_is_one_of_the_vocabulary_or_spoils_the_group(which, place, token):
    tokens = unpack(poisoned(which).completions[which].tokens).astype(np.int32)
    tokens[place] = token
    group = poisoned(which, tokens=pack(tokens))
    prompt = msgspec.structs.replace(poisoned(which), prompt=pack(tokens))
    for changed_group, says in ((group, "outside the vocabulary"), (prompt, "prompt tokens")):
        found = problem(changed_group, **REFERENCED)
        assert found is None if 0 <= token < 320 else says in found


def is_sound(tokens: bytes, logprobs: bytes) -> bool:
    """The rules once more, word for word."""
    try:
        ids, values = unpack(tokens), unpack(logprobs)
    except Malformed:
        return False
    right_types = ids.dtype.kind != "f" and values.dtype.kind == "f"
    return (
        right_types
        and 1 <= len(ids) == len(values) <= 20
        and all(0 <= token < 320 for token in ids.tolist())
        and all(-float("inf") < value <= MAX_POSITIVE for value in values.tolist())
    )


ARRAYS = st.one_of(
    st.builds(
        lambda n, kind: pack(np.zeros(n, kind)), st.integers(0, 3), st.sampled_from([np.uint16, np.int32, np.float32])
    ),
    st.binary(max_size=90),
    st.builds(lambda data, code: data + code, st.binary(max_size=90), st.sampled_from([b"H", b"i", b"f"])),
    st.builds(lambda ids: pack(np.array(ids, np.int32)), st.lists(st.integers(0, 330), max_size=22)),
    st.builds(lambda values: pack(-np.array(values, np.float32)), st.lists(st.floats(0, 9), max_size=22)),
)


@pytest.mark.fault("I2")
@given(WHICH, ARRAYS, ARRAYS)
def test_any_bytes_are_a_sound_completion_or_spoil_the_group(which, tokens, logprobs):
    try:
        length = len(unpack(tokens))
    except Malformed:
        length = 1
    fields = {"tokens": tokens, "logprobs": logprobs, "ref_logprobs": logprobs, "spans": [Span("s", 0, length)]}
    assert (problem(poisoned(which, **fields), **REFERENCED) is None) == is_sound(tokens, logprobs)


@pytest.mark.fault("I2")
@given(st.lists(st.integers(1, 5), min_size=2, max_size=2), st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_logprobs_must_be_as_many_as_tokens(tokens, logprobs):
    group = make_group(0, lengths=tokens)
    completions = [
        msgspec.structs.replace(one, logprobs=floats(*[-1.0] * count))
        for one, count in zip(group.completions, logprobs, strict=True)
    ]
    found = problem(msgspec.structs.replace(group, completions=completions), **RULES)
    assert (found is None) == (tokens == logprobs)


@pytest.mark.fault("I4")
@given(st.integers(1, 9), st.integers(1, 9))
def test_a_group_has_as_many_completions_as_agreed(sent, expected):
    """Prompts cannot be mixed: a group carries one, and its completions follow it."""
    found = problem(make_group(0, rewards=[0.0] * sent), **RULES | {"completions": expected})
    assert (found is None) == (sent == expected)
