"""A group that makes no sense never reaches the loss."""

import msgspec
import numpy as np
import pytest

from protocol.codec import pack
from protocol.messages import Span
from tests.groups import make_group
from trainer.accept import problem

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


def test_a_group_of_another_size_is_refused():
    assert "expected 2" in problem(make_group(0, rewards=[0.0, 1.0, 0.0]), **RULES)


def test_a_completion_longer_than_agreed_is_refused():
    assert "expected 1 to 20" in problem(make_group(0, lengths=[3, 21]), **RULES)


def test_missing_reference_logprobs_are_refused_where_the_loss_needs_them():
    assert "missing" in problem(make_group(0), **RULES | {"reference": True})
