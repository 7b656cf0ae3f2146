"""Answers are read exactly or not at all; the built-in rewards and the way that they are found."""

import asyncio
import itertools
import json
import math
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest

from protocol.errors import UserError
from protocol.recipe import Extractor, Reward
from sampler.rewards.answers import (
    EXTRACTORS,
    canonical,
    extract,
    extracted,
    final_answer,
    gold,
    last_number,
    number,
)
from sampler.rewards.builtin import (
    ends_properly,
    format_think_answer,
    gsm8k,
    length_target,
    repetition,
    tag_count,
)
from sampler.rewards.countdown import countdown
from sampler.rewards.loader import BUILTIN, find, load, required
from sampler.rewards.pool import RewardFailed, RewardPool

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("1,080", 1080),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("10{,}000", 10000),
        ("$1,080.50.", Fraction(2161, 2)),
        (r"\$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("\u2212 5", -5),
        ("+5", 5),
        ("5.0", 5),
        ("5.", 5),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("6 / 8", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("50%", 50),
        (r"50\%", 50),
        ("5 apples", 5),
        ("5 apples.", 5),
        (r"5\text{ km}", 5),
        ("60 km/h", 60),
        ("25 cm^2", 25),
        ("$5$", 5),
        ("**5**", 5),
        ("  5\n", 5),
    ],
)
def test_a_number_is_read_through_its_dress(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "apples",
        "1,08",
        "1,2",
        "12,3456",
        "1e3",
        "1e999999999",
        "inf",
        "nan",
        "3/0",
        "1 1/2",
        "x = 5",
        "2+3",
        "5 - 3",
        "5 or 6",
        "--5",
        "3. Compute 4",
        "\u0663",
        "__import__('os')",
    ],
)
def test_what_is_not_one_number_is_no_number(text):
    assert number(text) is None


def test_a_number_as_long_as_a_book_is_none():
    assert number("9" * 10_000) is None


def test_numbers_are_compared_exactly_not_as_floats():
    assert number("0.1") == Fraction(1, 10)
    assert number("9007199254740993") != number("9007199254740992")
    assert number("0.333333333333333333") != number("1/3")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2 = 24\n#### 72", 72),
        ("#### $1,080 dollars\nDone.", 1080),
        ("#### 5\nno,\n#### 6", 6),
        (r"so \boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{1} then \boxed{2}", 2),
        (r"\boxed{2} and \boxed{never closed", 2),
        ("<think>3 + 4</think><answer>7</answer>", 7),
        ("<answer>1</answer><answer>2</answer>", 2),
        (r"<answer>\boxed{5}</answer>", 5),
        ("<answer>#### 5</answer>", 5),
        (r"#### $\boxed{5}$", 5),
        (r"each gets \boxed{4}, so #### 12 apples", 12),
        ("\\boxed{5}\n#### Note\nall good", 5),  # a heading, not a mark
        ("\\boxed{5}\n#### 3. Check the sum", 5),
    ],
)
def test_the_mark_that_begins_last_decides(text, value):
    assert final_answer(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "the answer is 42",
        "<answer>42",
        "</answer>42<answer>",
        "<answer>7</answer> no: <answer>seven</answer>",
        "<answer>3 + 4 = 7</answer>",
        r"\boxed{42",
        r"\boxed{}",
        "#### none",
    ],
)
def test_without_a_number_in_a_mark_there_is_no_answer(text):
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 - 3", 3),
        ("10-5", 5),
        ("f(x)-5", 5),
        ("= -5", -5),
        ("it is $-5.", -5),
        ("- 5 apples", 5),  # a bullet
        ("-$5.50 left.", Fraction(-11, 2)),
        ("so it is...5", 5),
        ("about .5", Fraction(1, 2)),
        ("version 3.14.15", Fraction(157, 50)),
        ("first 3, then 1,234,567.89 dollars", Fraction(123456789, 100)),
        ("x2 and H2O", None),
        ("the 2nd", 2),
        ("\u7b54\u6848\u662f5", 5),
        (r"$x=\frac{1}{2}$", Fraction(1, 2)),
        (r"\boxed{10{,}000}", 10000),
        ("3/4", Fraction(3, 4)),
        ("7, then 3/0", None),
        ("5\u201310", 10),
        ("\u22125", -5),
        ("**42**", 42),
        ("<answer>7</answer>", 7),
        ("no idea", None),
        ("1 " + "9" * 300, None),
    ],
)
def test_the_last_number_of_a_text_is_found_without_a_mark(text, value):
    assert last_number(text) == value


def test_each_extractor_looks_at_its_own_mark():
    text = "#### 1\n\\boxed{2} <answer>3</answer> or 4"
    assert extracted(text, EXTRACTORS) == {"marks": "3", "heading": "1", "boxed": "2", "tag": "3", "last": "4"}
    assert extracted("none", EXTRACTORS) == dict.fromkeys(EXTRACTORS)
    assert extracted(text, []) == {}
    assert set(EXTRACTORS) == set(get_args(Extractor))


def test_equal_numbers_have_one_canonical_text():
    assert {canonical(number(text)) for text in ("0.75", "3/4", r"\frac{6}{8}", "75/100", ".750")} == {"3/4"}
    assert canonical(number("-1,080.00")) == "-1080"
    assert canonical(number("." + "1" * 150)) is None  # its fraction would not fit into a message
    assert extracted("#### ." + "1" * 150, ["marks", "last"]) == {"marks": None, "last": None}


def test_extraction_takes_milliseconds_on_hostile_text():
    size = 32 * 1024
    pieces = ["####", "#### 1", "####a", "\\boxed{", "\\boxed ", "{", "}", "<answer>", "</answer>"]
    pieces += [
        "1",
        "1,",
        ",111",
        "1/",
        "1 ",
        "1,111,",
        "1/1/",
        ".1",
        "1.",
        "9",
        " ",
        "\n",
        "$",
        "-",
        "\\frac{1}{",
        "\\text{",
        "a ",
    ]
    pieces += ["#### " + "1,111" * 38 + "\n", "#### 1a" + " ." * 90 + "\n", "#### 1" + " " * 190]
    hostile = [one + other for one, other in itertools.product(pieces, ["", "}", "#### 1", "{"])]
    slowest = 0.0
    for piece in hostile:
        text = (piece * (size // len(piece) + 1))[:size]
        best = math.inf
        for _ in range(3):  # the best of three: other processes share the machine
            start = time.process_time()
            for how in EXTRACTORS:
                extract(text, how)
            format_think_answer([text])
            tag_count([text])
            repetition([text], [list(text)], size=40)
            repetition([text], [[]], unit="words")
            countdown([text], [[1, 2]], [3])
            countdown([f"<answer>{text}</answer>"], [[1, 2]], [3])
            best = min(best, time.process_time() - start)
        slowest = max(slowest, best)
    assert slowest < 2.0  # all extractors and rewards together; what backtracks takes minutes


def test_the_gsm8k_reward_pays_for_the_right_answer_and_nothing_else():
    completions = ["#### 1,080", r"\boxed{1080.0}", "<answer>$1080.</answer>", "#### 1081", "1080"]
    values = gsm8k(completions, ["3 * 360 = 1080\n#### 1,080"] * 5)
    assert values == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_gsm8k_reward_reads_conversations_and_plain_gold_columns():
    said = [[{"role": "assistant", "content": "<answer>5</answer>"}]] * 3
    assert gsm8k(said, ["5", 5, 5.0], correct=1, wrong=-1) == [1, 1, 1]


def test_a_wrong_answer_that_is_well_formed_can_be_worth_a_little():
    """The ladder 1 / 0.1 / 0 of verl and GRPO-Zero, with verl's two ways to look."""
    said = ["#### 1,080", "#### 1081", "it is 1080", "#### many", r"\boxed{1080}", "#### 5\nno, #### 1080.00"]
    strict = {"extractor": "heading", "tail": 300, "formatted": 0.1}
    assert gsm8k(said, ["1080"] * 6, **strict) == [1.0, 0.1, 0.0, 0.0, 0.0, 1.0]
    assert gsm8k(said, ["1080"] * 6, extractor="last") == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert gsm8k(said[:2], ["1080"] * 2, extractor="last", wrong=-1.0) == [1.0, -1.0]


def test_an_answer_before_the_tail_is_not_seen():
    text = "#### 7" + "." * 300
    assert gsm8k([text, text], ["7", "7"], extractor="heading", tail=300) == [0.0, 0.0]
    assert gsm8k([text], ["7"], extractor="heading", tail=306) == [1.0]


@pytest.mark.parametrize("options", [{"extractor": "lost"}, {"tail": -1}])
def test_gsm8k_refuses_options_without_a_meaning(options):
    with pytest.raises(ValueError, match="expected marks, heading, boxed, tag, last, and 0 or more"):
        gsm8k(["#### 1"], ["1"], **options)


def test_an_unreadable_gold_answer_is_not_applicable_rather_than_wrong():
    assert gsm8k(["#### 1", "no"], ["see above", None]) == [None, None]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>5</answer>", True),
        ("  <think>\na\n</think>\n<answer>\n5\n</answer>\n", True),
        ("<think>a</think><answer>5</answer> bye", False),
        ("Sure! <think>a</think><answer>5</answer>", False),
        ("<think>a</think> so <answer>5</answer>", False),
        ("<answer>5</answer><think>a</think>", False),
        ("<think>a<answer>5</answer></think>", False),
        ("<think>a</think><answer>5</answer><answer>5</answer>", False),
        ("<think>a</think><answer>5", False),
        ("</think>a<think><answer>5</answer>", False),
        ("<think>a</think></answer>5<answer>", False),
        ("", False),
    ],
)
def test_the_format_reward_wants_each_tag_once_and_nothing_around(text, right):
    expected = 1.25 if right else -1
    assert format_think_answer([text], correct=1.25, wrong=-1) == [expected]


def test_each_tag_that_occurs_once_counts_a_quarter():
    said = ["<think>a</think><answer>5</answer>", "<think><think>a</think>", "</answer><answer>", ""]
    assert tag_count(said) == [1.0, 0.25, 0.5, 0.0]


def test_a_completion_that_was_cut_did_not_end_properly():
    assert ends_properly(["stop", "length"]) == [1.0, 0.0]
    assert ends_properly(["stop", "length"], correct=0.0, wrong=-0.5) == [0.0, -0.5]


def test_repetition_is_the_share_of_ngrams_that_occurred_before():
    loop, sane = [1, 2, 3] * 4, list(range(12))
    assert repetition(["", ""], [loop, sane], size=3, penalty=2.0) == [-2 * (1 - 3 / 10), 0.0]
    assert repetition([""] * 3, [[], [7] * 4, [7] * 5]) == [0.0, 0.0, 0.0]  # one 5-gram at most
    assert repetition([""], [[7] * 14]) == [-0.9]


def test_repetition_in_steps_forgives_what_is_below_the_first():
    a_little, much = [*range(10), *range(6)], [7] * 14  # 2 of 12 and 9 of 10 5-grams occurred before
    assert repetition(["", ""], [a_little, much], steps=5) == [0.0, -0.8]


def test_repetition_of_tokens_is_that_of_trl():
    from trl.rewards import get_repetition_penalty_reward

    ids = [[1, 2, 3] * 5, [1, 2, 3, 4], [7], [], [1, 2, 1, 2, 1, 2, 3]]
    theirs = get_repetition_penalty_reward(ngram_size=3, max_penalty=-2.0)(completion_ids=ids)
    assert repetition([""] * 5, ids, size=3, penalty=2.0) == pytest.approx(theirs)


def test_repetition_of_words_needs_white_space():
    said = ["So it goes so it goes", "na" * 99]
    assert repetition(said, [[], []], size=3, unit="words") == [-0.25, 0.0]


def test_closeness_to_a_target_length_falls_on_both_sides_and_ends_at_minus_one():
    ids = [[0] * length for length in (10, 5, 20, 0, 30, 400)]
    assert length_target([""] * 6, ids, target=10) == [1.0, 0.5, 0.0, 0.0, -1.0, -1.0]
    assert length_target(["abcd", "abcdef"], [[], []], target=4, scale=1, unit="characters") == [1.0, -1.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: repetition([""], [[]], size=0),
        lambda: repetition([""], [[]], steps=-1),
        lambda: repetition([""], [[]], penalty=-1.0),
        lambda: repetition([""], [[]], unit="lines"),
        lambda: length_target([""], [[]], target=0),
        lambda: length_target([""], [[]], target=9, unit="words"),
    ],
)
def test_options_out_of_range_are_errors_not_rewards(call):
    with pytest.raises(ValueError, match="expected 1 or more"):
        call()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(2 + 4) * 3 / 1", True),
        (" 3*(4+2)/1 = 18 ", True),
        ("2 + 4 * 3 / 1", False),
        ("(2 + 4) * 3", False),
        ("(2 + 4) * 3 * 1 * 1", False),
        ("18", False),
        ("(2 + 4) * 3 / 1 apples", False),
        ("(2 + 4) * 3 / (1", False),
        ("2 + 4) * 3 / 1", False),
        ("3 / (4 - 2 - 2) * 1", False),
        ("2 ** 4 + 3 - 1", False),
        ("__import__('os')", False),
        ("(" * 90 + "1" + ")" * 90, False),
        ("", False),
    ],
)
def test_an_equation_uses_each_number_once_and_is_calculated_exactly(answer, right):
    assert countdown([f"<answer>9</answer> no: <answer>{answer}</answer>"], [[1, 2, 3, 4]], [18]) == [float(right)]


def test_an_equation_outside_of_an_answer_and_thirds_that_floats_would_lose():
    assert countdown(["1 + 2", "<answer>1 + 2"], [[1, 2]] * 2, [3] * 2, wrong=-1.0) == [-1.0, -1.0]
    assert countdown(["<answer>1 / 3 * 3 * 7</answer>"], [[1, 3, 3, 7]], [7]) == [1.0]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_every_gold_answer_of_gsm8k_scores_full_and_the_neighbours_does_not():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert gsm8k(answers, answers) == [1.0] * len(answers)
    shifted = answers[1:] + answers[:1]
    equal = sum(gold(one) == gold(other) for one, other in zip(answers, shifted, strict=True))
    assert sum(gsm8k(answers, shifted)) == equal < 0.02 * len(answers)


@pytest.mark.parametrize("reference", BUILTIN)
def test_built_in_rewards_go_by_their_names(reference):
    assert find(reference) == reference
    assert load(reference, {}).__name__ == reference


@pytest.mark.parametrize(
    ("reference", "options", "complaint"),
    [
        ("gsm8k", {"extractor": "strict"}, "extractor = 'strict', tail = 0: expected marks, heading"),
        ("repetition", {"unit": "lines"}, "unit = 'lines': expected 1 or more"),
        ("length_target", {"target": 0}, "target = 0, scale = 0"),
    ],
)
def test_a_value_that_a_built_in_has_no_meaning_for_is_refused_at_the_start(reference, options, complaint):
    with pytest.raises(UserError, match=f"reward {reference}: .*{complaint}"):
        load(reference, options)


def test_a_built_in_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="needs the library math-verify: pip install"):
        find("math_verify")


def score(reward: Reward, said: list[str], gold: str) -> list[float]:
    async def main():
        async with RewardPool([reward], 1) as pool:
            return (await pool.score("?", said, {"answer": gold})).rewards

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("gold", "said", "values"),
    [
        ("72", [r"so \boxed{72}", r"\boxed{73}", "72", r"The answer is $\frac{144}{2}$."], [1, 0, 0, 1]),
        (r"x\n#### 1,080", [r"\boxed{1{,}080}"], [1]),
        (r"\frac{1}{2}", [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}"], [1, 1]),
        ("(1, 2)", [r"\boxed{(1,2)}", r"\boxed{2}"], [1, 0]),
        (r"the sum is $x^2+2x+1$", [r"\boxed{(x+1)^2}", r"\boxed{1/0}"], [1, 0]),
    ],
)
def test_equal_expressions_are_right_in_a_real_reward_worker(gold, said, values):
    patient = Reward(function="math_verify", options={"limit_s": 60}, timeout_s=60)  # the machine may be busy
    assert score(patient, said, gold) == values


def test_an_expression_without_end_is_no_wrong_answer_unless_one_says_so():
    """The library's alarm rings in a reward worker; without it (60 s) the pool's deadline ends the call."""
    endless = r"\boxed{9^{9^{9^{9}}}}"
    with pytest.raises(RewardFailed, match=r"error: TimeoutError: .* took more than 1 s"):
        score(Reward(function="math_verify", options={"limit_s": 1}), [endless], "7")
    decided = Reward(function="math_verify", options={"limit_s": 5, "undecided": -1.0}, timeout_s=60)
    assert score(decided, [endless, "none"], "7") == [-1.0, 0.0]
    with pytest.raises(RewardFailed, match="timeout: no values within 2 s"):
        score(Reward(function="math_verify", options={"limit_s": 60}, timeout_s=2.0), [endless], "7")


def test_without_an_expression_to_compare_with_nothing_applies():
    with pytest.raises(RewardFailed, match="not_applicable"):
        score(Reward(function="math_verify", options={"limit_s": 60}, timeout_s=60), [r"\boxed{7}"], "  ")


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("gsm8", "expected one of gsm8k, format_think_answer, .*file.py:function"),
        ("nowhere.py:f", "cannot read .*nowhere.py: No such file"),
        ("broken.py:f", "no valid Python.*line 1"),
        ("no_such_package_xyz.rewards:f", "no package 'no_such_package_xyz'"),
        ("some/dir:f", "neither a .py file nor a module's name"),
        ("fine.py:not-a-name", "expected one of"),
    ],
)
def test_a_reward_that_cannot_be_there_is_refused_in_one_line(tmp_path, monkeypatch, reference, complaint):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=complaint) as refused:
        find(reference)
    assert "\n" not in str(refused.value)


def test_looking_for_a_reward_runs_none_of_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(completions): pass\n"
    Path("mine.py").write_text(code)
    Path("package_with_code").mkdir()
    Path("package_with_code/__init__.py").write_text(code)
    assert find("mine.py:f") == f"{tmp_path / 'mine.py'}:f"
    find("package_with_code.sub:f")
    assert not (tmp_path / "ran").exists()
    assert "package_with_code" not in sys.modules


def test_an_option_that_the_function_would_ignore_is_refused():
    """Ancestor defect 6: settings that nothing reads. `**columns` would swallow the misspelling."""
    with pytest.raises(UserError, match="no parameter for the option 'corect'; it has: correct"):
        load("gsm8k", {"corect": 2.0})
    with pytest.raises(UserError, match="'completions'"):
        load("gsm8k", {"completions": 2.0})


def test_a_function_says_which_columns_it_needs():
    assert required(gsm8k, {}) == ["answer"]
    assert required(format_think_answer, {}) == []
