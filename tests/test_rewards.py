"""Answers are read exactly or not at all; the built-in rewards and the way that they are found."""

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
from protocol.recipe import Extractor
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
from sampler.rewards.builtin import format as format_reward
from sampler.rewards.builtin import gsm8k
from sampler.rewards.loader import find, load, required

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
            format_reward([], [text])
            best = min(best, time.process_time() - start)
        slowest = max(slowest, best)
    assert slowest < 0.25  # all extractors together; what backtracks takes minutes


def test_the_gsm8k_reward_pays_for_the_right_answer_and_nothing_else():
    completions = ["#### 1,080", r"\boxed{1080.0}", "<answer>$1080.</answer>", "#### 1081", "1080"]
    values = gsm8k([""] * 5, completions, ["3 * 360 = 1080\n#### 1,080"] * 5)
    assert values == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_gsm8k_reward_reads_conversations_and_plain_gold_columns():
    said = [[{"role": "assistant", "content": "<answer>5</answer>"}]] * 3
    assert gsm8k([""] * 3, said, ["5", 5, 5.0], correct=1, wrong=-1) == [1, 1, 1]


def test_an_unreadable_gold_answer_is_not_applicable_rather_than_wrong():
    assert gsm8k([""] * 2, ["#### 1", "no"], ["see above", None]) == [None, None]


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
    assert format_reward([""], [text], correct=1.25, wrong=-1) == [expected]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_every_gold_answer_of_gsm8k_scores_full_and_the_neighbours_does_not():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert gsm8k(answers, answers, answers) == [1.0] * len(answers)
    shifted = answers[1:] + answers[:1]
    equal = sum(gold(one) == gold(other) for one, other in zip(answers, shifted, strict=True))
    assert sum(gsm8k(answers, answers, shifted)) == equal < 0.02 * len(answers)


@pytest.mark.parametrize("reference", ["gsm8k", "format"])
def test_built_in_rewards_go_by_their_names(reference):
    assert find(reference) == reference
    assert load(reference, {"correct": 2.0}).__name__ == reference


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("gsm8", "expected one of gsm8k, format, .*file.py:function"),
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
    assert required(format_reward, {}) == []
