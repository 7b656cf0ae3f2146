"""Figures of an evaluation against closed forms and against enumeration of every case."""

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocol.errors import StorageError, UserError
from protocol.estimates import majority_at, pass_at
from protocol.evaluation import Answered, Evaluation, Sampling, compare, read, summary
from protocol.intervals import bootstrap, clustered, sign_test, wilson
from protocol.resolve import load
from tests.groups import make_group


def answered(
    row: int, correct: list[bool], answers: list[str | None] | None = None, gold: str | None = "5"
) -> Answered:
    """answers: by the first extractor; `last` finds the right number in all completions that are right."""
    found = answers or ["5" if right else "0" for right in correct]
    return Answered(
        row=row,
        rewards=[2.0 * right - 1 for right in correct],
        correct=correct,
        answers={"marks": found, "last": ["5" if right else "0" for right in correct]},
        gold=gold,
        truncated=[not right for right in correct],
        tokens=[10 + row] * len(correct),
    )


def evaluation(prompts: list[Answered], fingerprint: str = "f") -> Evaluation:
    sampling = Sampling(temperature=1.0, top_p=1.0, samples=len(prompts[0].correct), max_tokens=32)
    return Evaluation(
        step=3, snapshot="s00000003.i0001", data="d", fingerprint=fingerprint, sampling=sampling, prompts=prompts
    )


# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "trials"), [(0, 7), (7, 7), (49, 400), (3, 5)])
def test_one_completion_a_prompt_gives_wilsons_interval(right, trials):
    assert clustered([1] * right + [0] * (trials - right), [1] * trials) == pytest.approx(wilson(right, trials))


def test_completions_that_are_all_alike_count_once_however_many_there_are():
    once = clustered([1, 1, 0, 0, 0], [1] * 5)
    assert clustered([8, 8, 0, 0, 0], [8] * 5) == pytest.approx(once)
    assert clustered([8] * 5, [8] * 5) == pytest.approx(wilson(5, 5))


def test_independent_completions_count_nearly_all_and_never_more():
    assert clustered([4] * 5, [8] * 5) == pytest.approx(wilson(20, 40))
    random = np.random.default_rng(0)
    wins = random.binomial(8, 0.3, 5000)
    low, high = clustered(wins.tolist(), [8] * 5000)
    expected = np.subtract(*wilson(int(wins.sum()), 40_000)[::-1])
    assert high - low == pytest.approx(expected, rel=0.05)


def test_the_robust_interval_covers_and_the_naive_one_does_not():
    """Prompts are hard or easy: 60 of them with 16 completions each; the truth is 0.5."""
    random = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(400):
        wins = random.binomial(16, random.choice([0.05, 0.95], 60))
        low, high = clustered(wins.tolist(), [16] * 60)
        covered += low <= 0.5 <= high
        low, high = wilson(int(wins.sum()), 960)
        naive += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.6


def test_no_trials_say_nothing():
    assert clustered([], []) == (0.0, 1.0)


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval_and_repeats_itself():
    values = np.random.default_rng(2).normal(0.1, 1.0, 500)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(500)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap(values) == (low, high)
    assert bootstrap(np.full(9, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 3), (5, 1), (1, 5), (0, 6), (9, 4)])
def test_the_sign_test_counts_every_outcome(wins, losses):
    n = wins + losses
    uneven = sum(abs(2 * sum(coins) - n) >= abs(wins - losses) for coins in itertools.product([0, 1], repeat=n))
    assert sign_test(wins, losses) == pytest.approx(uneven / 2**n)


# -- pass@k and maj@k ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    outcomes = [True] * right + [False] * (6 - right)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at(6, right, k) == pytest.approx(sum(any(one) for one in subsets) / len(subsets))


def test_pass_at_k_is_finite_where_binomials_are_not():
    assert pass_at(4096, 1, 2048) == pytest.approx(0.5)


VOTES = [
    ["5", "5", "3", "3", "7", None],
    ["3", "3", "3", "5", "5", "7"],
    [None, None, None, None, "5", "3"],
    [None] * 6,
    ["5"] * 6,
    ["1", "2", "3", "4", "5", "6"],
]


def vote(answers: tuple[str | None, ...]) -> float:
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return ("5" in winners) / max(1, len(winners))


@pytest.mark.parametrize("votes", VOTES)
@pytest.mark.parametrize("k", range(1, 7))
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_decided_by_lot(votes, k):
    subsets = list(itertools.combinations(votes, k))
    expected = sum(map(vote, subsets)) / len(subsets)
    error = 0.0 if k in (1, 5, 6) else 3 * 0.5 / math.sqrt(20_000 / 6)
    assert majority_at(votes, "5", k, np.random.default_rng(k), 20_000) == pytest.approx(expected, abs=error + 1e-9)


def test_a_gold_answer_that_nobody_gave_wins_nothing():
    assert majority_at(["1", "2", None], "5", 3, np.random.default_rng(0)) == 0.0


# -- the evaluation --------------------------------------------------------------------------------------------------


def test_the_summary_of_a_small_evaluation_by_hand():
    prompts = [
        answered(0, [True, True, True, True]),
        answered(1, [True, False, False, False], ["5", "0", "0", None]),
        answered(2, [False, False, False, False], [None, "1", "1", "1"]),
        answered(3, [True, True, False, False], [None, "5", "0", "0"]),  # `marks` missed one that is right
    ]
    figures = summary(evaluation(prompts))
    assert figures["accuracy"] == pytest.approx(7 / 16) and figures["n"] == 4
    assert (figures["low"], figures["high"]) == pytest.approx(clustered([4, 1, 0, 2], [4] * 4))
    assert figures["accuracy/marks"] == pytest.approx(6 / 16)
    assert figures["accuracy/marks/low"] == pytest.approx(clustered([4, 1, 0, 1], [4] * 4)[0])
    assert figures["accuracy/last"] == pytest.approx(7 / 16)
    assert figures["extraction_failures"] == pytest.approx(1 / 16)
    assert [figures[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([7 / 16, (1 + 1 / 2 + 0 + 5 / 6) / 4, 3 / 4])
    assert figures["maj@4"] == pytest.approx(1 / 4)  # in the second and the last one "0" wins
    assert figures["maj@1"] == pytest.approx(6 / 16)
    assert figures["reward"] == pytest.approx(2 * 7 / 16 - 1)
    assert figures["completions/clipped_ratio"] == pytest.approx(9 / 16)
    assert figures["completions/mean_length"] == pytest.approx(11.5)
    assert summary(evaluation(prompts)) == figures


def test_one_sample_has_no_choice_and_prompts_without_gold_vote_for_nothing():
    single = summary(evaluation([answered(0, [True]), answered(1, [False])]))
    assert not [name for name in single if "@" in name]
    without = summary(evaluation([answered(0, [True, False], gold=None)]))
    assert "pass@2" in without and "maj@2" not in without and "accuracy/marks" not in without
    mixed = summary(evaluation([answered(0, [True, True], gold=None), answered(1, [False, False])]))
    assert (mixed["accuracy"], mixed["accuracy/marks"], mixed["maj@2"]) == (0.5, 0.0, 0.0)


def test_groups_become_prompts_in_the_order_of_their_rows(tmp_path):
    recipe = load(None, ["eval.samples=2", "eval.temperature=0.5"])
    groups = [make_group(1, rewards=[0.0, 1.0], lengths=[3, 4]), make_group(0, rewards=[1.0, -1.0], lengths=[5, 6])]
    found = Evaluation.from_groups(groups, step=0, snapshot="s00000000.i0001", data="d", fingerprint="f", recipe=recipe)
    assert [one.row for one in found.prompts] == [0, 1]
    assert found.prompts[0].correct == [True, False] and found.prompts[0].tokens == [5, 6]
    assert found.prompts[1].answers == {"marks": [None, None], "last": [None, None]}
    assert found.sampling == Sampling(temperature=0.5, top_p=1.0, samples=2, max_tokens=512)
    found.write(tmp_path / "one.json")
    assert read(tmp_path / "one.json") == found


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"gold"', b'"golt"'),
        lambda data: data.replace(b'"correct":[true,false]', b'"correct":[true]'),
        lambda data: data.replace(b'"marks"', b'"other"', 1),
        lambda data: data.replace(b'"format":1', b'"format":2'),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "one.json"
    whole = msgspec.json.encode(evaluation([answered(0, [True, False]), answered(1, [True, True])]))
    path.write_bytes(whole)
    assert read(path).prompts[1].row == 1
    path.write_bytes(damage(whole))
    with pytest.raises(UserError, match=r"one\.json is no evaluation, or damaged") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the evaluation .*none.json"):
        read(tmp_path / "none.json")
    with pytest.raises(StorageError, match=r"cannot write .*none.json"):
        evaluation([answered(0, [True])]).write(Path(tmp_path / "no/none.json"))


# -- two evaluations -------------------------------------------------------------------------------------------------


def test_a_paired_comparison_by_hand():
    before = [answered(row, [row < 2]) for row in range(10)]
    after = [answered(row, [row > 0]) for row in range(10)]
    found = compare(evaluation(before), evaluation(after))
    assert (found["difference"], found["wins"], found["losses"], found["n"]) == (pytest.approx(0.7), 8, 1, 10)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert 0.2 <= found["low"] < 0.7 < found["high"] <= 1.0
    backwards = compare(evaluation(after), evaluation(before))
    assert (backwards["difference"], backwards["p"]) == (pytest.approx(-0.7), found["p"])


def test_the_paired_interval_is_that_of_the_distribution_of_resamples():
    """Three prompts: the 27 resamples can be listed."""
    differences = [-1.0, 0.0, 1.0]
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(differences, repeat=3))
    low, high = bootstrap(np.array(differences))
    assert (low, high) == (pytest.approx(means[0]), pytest.approx(means[-1]))  # each has 1/27 > 2.5 %
    before, after = [[True], [True], [False]], [[False], [True], [True]]
    sides = [evaluation([answered(row, right) for row, right in enumerate(side)]) for side in (before, after)]
    assert (compare(*sides)["low"], compare(*sides)["high"]) == (low, high)


def test_several_samples_a_prompt_are_compared_by_their_mean():
    before = evaluation([answered(0, [True, False]), answered(1, [False, False])])
    after = evaluation([answered(0, [True, True, True, False]), answered(1, [False] * 4)])
    found = compare(before, after)
    assert (found["difference"], found["wins"], found["losses"], found["p"]) == (0.125, 1, 0, 1.0)


def test_evaluations_of_other_prompts_are_not_compared():
    one = evaluation([answered(0, [True]), answered(1, [True])])
    with pytest.raises(UserError, match="answered 2 prompts of d, not these 2 of d"):
        compare(one, evaluation(one.prompts, fingerprint="g"))
    with pytest.raises(UserError, match="1 prompts have a result on one side only"):
        compare(one, evaluation(one.prompts[:1]))
