"""`launch reward`: each bad function is found by the check made for it, sound ones pass, a diff counts what changes."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from launch.reward.command import main, option
from protocol.errors import UserError
from protocol.metrics import MetricsWriter
from protocol.recipe import Data, Recipe, Reward, Sampling
from protocol.resolve import dump
from protocol.rollout import Rollout
from sampler.rewards.answers import EXTRACTORS, extract, number
from sampler.rewards.bench import prompts_of, stand_ins
from sampler.rewards.bench_checks import Verdict, judged
from sampler.rewards.bench_conduct import latency
from sampler.rewards.bench_texts import corrupted, final, frames, golds, without_answer
from sampler.rewards.bench_trials import Trials, tried

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train.jsonl"
RECIPE = Recipe(
    data=Data(
        train="word-problems:train",
        system="End with the number, like this: <answer>42</answer>",
        prefix=[{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "3 + 4 = 7\n#### 7"}],
    ),
    sampling=Sampling(group_size=4, max_tokens=64),
    reward=[Reward(function="gsm8k", weight=2.0, options={"correct": 1})],
)
FUNCTIONS = r"""
import random, re, time

def said(completion):
    return completion[0]["content"]

def gold(answer):
    return answer.rpartition("####")[2].strip()

def marked(text):
    return re.findall(r"####[ ]?(-?[0-9]{1,9})(?![0-9.])", text)

def right(completion, answer):
    return marked(said(completion))[-1:] == [gold(answer)]

def each(rule):
    def function(prompts, completions, answer, **columns):
        return [rule(*one) for one in zip(prompts, completions, answer)]
    return function

sound = each(lambda p, c, a: float(right(c, a)))
reads_the_prompt = each(lambda p, c, a: right(c, a) + 0.5 * ("<answer>" in p[0]["content"] + said(c)))
pays_for_nothing = each(lambda p, c, a: float(right(c, a) or not said(c)))
pays_anything = each(lambda p, c, a: 1.0 if right(c, a) else 0.1)
pays_for_echo = each(lambda p, c, a: right(c, a) + 0.5 * (p[-1]["content"] in said(c)))
knows_the_example = each(lambda p, c, a: 1.0 if right(c, a) or marked(said(c)) == ["7"] else 0.0)
first_number = each(lambda p, c, a: float(re.findall(r"[0-9]+", said(c))[:1] == [gold(a)]))
gold_anywhere = each(lambda p, c, a: float(gold(a) in re.findall(r"[0-9]+", said(c))))
begins_alike = each(lambda p, c, a: float(any(one.startswith(gold(a)) for one in marked(said(c))[-1:])))
any_answer = each(lambda p, c, a: float(bool(marked(said(c)))))
at_random = each(lambda p, c, a: random.random())
ascii_only = each(lambda p, c, a: float(bool(said(c).encode("ascii")) and right(c, a)))
exploding = each(lambda p, c, a: float(right(c, a) or bool(re.match(r"(a+)+$", said(c)))))
long_integers = each(lambda p, c, a: float(bool(marks(c)) and int(marks(c)[-1]) == int(gold(a))))
not_far_from = each(lambda p, c, a: float(not abs(as_float(c) - float(gold(a))) > 0.1))
asleep = each(lambda p, c, a: time.sleep(60))
endless = each(lambda p, c, a: float("inf") if right(c, a) else 0.0)
nowhere = each(lambda p, c, a: None)
bare_number = each(lambda p, c, a: float(said(c) == gold(a)))
a_penalty = each(lambda p, c, a: 0.0 if right(c, a) else -1.0)

def marks(completion):
    return re.findall(r"#### ?([0-9]+)$", said(completion))

def as_float(completion):
    try:
        return float(said(completion).rpartition("####")[2])
    except ValueError:
        return 1e9

calls = 0

def remembers(prompts, completions, answer, **columns):
    global calls
    calls += 1
    return [float(right(c, a)) + 1e-3 * calls for c, a in zip(completions, answer)]

def in_comparison(completions, answer, **columns):
    hits = [right(c, a) for c, a in zip(completions, answer)]
    return [hit - sum(hits) / len(hits) for hit in hits]

def brevity(completions, **columns):
    return [1.0 - len(said(c)) / 1000 for c in completions]

def length(completions, **columns):
    return [len(said(c)) / 100 for c in completions]

def constant(completions, **columns):
    return [0.5] * len(completions)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(marked(solution_str)[-1:] == [ground_truth])}

def marked_only(completions, answer, **columns):
    return [float(right(c, a)) if marked(said(c)) else None for c, a in zip(completions, answer)]

def refuses(completions, **columns):
    raise KeyError("gold")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def checked(reference: str, source: str = "word-problems:train", rows: int = 4, **settings) -> dict[str, Verdict]:
    """By check."""
    reward = Reward(function=reference, **settings)
    prompts = prompts_of(source, rows, RECIPE)
    trials = asyncio.run(tried(reward, RECIPE, prompts, None, lambda what: None))
    return {verdict.check: verdict for verdict in judged(trials)}


def failures(verdicts: dict[str, Verdict]) -> set[str]:
    return {check for check, verdict in verdicts.items() if verdict.outcome == "fail"}


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("reads_the_prompt", {"empty"}),
        ("pays_for_nothing", {"empty"}),
        ("pays_anything", {"empty"}),
        ("pays_for_echo", {"prompt"}),
        ("knows_the_example", {"example"}),
        ("first_number", {"working"}),
        ("gold_anywhere", {"guessing"}),
        ("begins_alike", {"wrong"}),
        ("any_answer", {"wrong"}),
        ("at_random", {"repeats"}),
        ("remembers", {"repeats"}),
        ("ascii_only", {"hostile"}),
        ("exploding", {"hostile"}),
        ("long_integers", {"hostile"}),
        ("not_far_from", {"hostile"}),
        ("bare_number", {"working"}),
        ("asleep", {"errors"}),
        ("endless", {"errors"}),
        ("nowhere", {"gold", "values"}),
        ("constant", {"values"}),
    ],
)
def test_a_bad_reward_is_found_by_the_check_for_it(file, function, found):
    verdicts = checked(f"{file}:{function}", timeout_s=0.5)
    assert found <= failures(verdicts)
    assert all(verdicts[check].example for check in found - {"values"})


def test_the_words_of_an_error_and_the_text_behind_it_are_shown(file):
    verdicts = checked(f"{file}:ascii_only", timeout_s=5)
    assert failures(verdicts) == {"hostile"}
    assert (
        "other scripts, control characters, unicode digits: no value. error: UnicodeEncodeError"
        in verdicts["hostile"].words
    )
    assert verdicts["hostile"].example.startswith("hostile/other scripts: '####")
    verdicts = checked(f"{file}:refuses")
    assert "KeyError: 'gold' (mine.py:" in verdicts["errors"].words
    assert list(verdicts) == ["errors"]  # without values there is nothing to judge


@pytest.mark.parametrize("function", ["sound", "compute_score", "in_comparison", "marked_only", "a_penalty"])
def test_sound_rewards_pass(file, function):
    verdicts = checked(f"{file}:{function}")
    assert failures(verdicts) == set()
    assert "gold" in verdicts
    doubtful = {"in_comparison": {"group"}, "marked_only": {"not applicable"}, "a_penalty": {"sign"}}
    warned = {check for check, verdict in verdicts.items() if verdict.outcome == "warn"}
    assert doubtful.get(function, set()) <= warned


@pytest.mark.parametrize(
    ("function", "options", "kind"),
    [
        ("gsm8k", {"correct": 1.0, "wrong": -1.0}, "correctness"),
        ("gsm8k", {"formatted": 0.1}, "correctness"),
        ("gsm8k", {"extractor": "last"}, "correctness"),
        ("format_think_answer", {}, "shape"),
        ("overlong", {"buffer": 16}, "shape"),
    ],
)
def test_what_comes_with_the_project_passes(function, options, kind):
    verdicts = checked(function, options=options)
    assert failures(verdicts) == set()
    assert ("kind" in verdicts) == (kind == "shape")
    assert ("partial" in verdicts) == ("formatted" in options)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not in ../shared/data/gsm8k")
def test_gsm8k_passes_on_gsm8k():
    verdicts = checked("gsm8k", str(GSM8K), rows=20)
    assert failures(verdicts) == set()
    assert "own" in verdicts["gold"].words.partition("; less")[0]


def test_guessing_counts_rows_whatever_pays_in_them(file):
    assert checked(f"{file}:gold_anywhere")["guessing"].words == "rows where several answers pay: 4 of 4"


def test_brevity_is_a_matter_of_shape(file):
    verdicts = checked(f"{file}:brevity")
    assert failures(verdicts) == set()
    assert verdicts["kind"].outcome == verdicts["empty"].outcome == "warn"
    assert failures(checked(f"{file}:length")) == set()


def test_a_call_that_comes_near_its_deadline_is_said():
    reward = Reward(function="gsm8k", timeout_s=10)
    times = [(0.1, 4)] * 98 + [(3.0, 4)] * 2
    verdict = latency(Trials(reward=reward, rows=[], seconds=times))
    assert verdict.outcome == "warn"
    assert "p50 100.0 ms, p99 3000.0, max 3000.0; a completion: 39.50 ms; 6 groups/s" in verdict.words
    assert latency(Trials(reward=reward, rows=[], seconds=times[:98])).outcome == "pass"


def test_answers_are_corrupted_never_by_chance_to_the_right_one():
    assert corrupted("18", "7") == {
        "another row's": "7",
        "one more": "19",
        "a digit more": "180",
        "digits swapped": "81",
    }
    assert corrupted("0", "0.0") == {"one more": "1"}
    assert corrupted("x + 1", "y") == {"another row's": "y"}
    for answer in ("-3", "1,011", "0.5", "77"):
        assert all(number(text) != number(answer) for text in corrupted(answer, "5").values())


def test_a_rows_own_text_is_a_form_too():
    assert [final(text) for text in ("a\n#### 1,080", r"so \boxed{3/4}.", "Paris", "x" * 300, None)] == [
        "1,080",
        "3/4",
        "Paris",
        None,
        None,
    ]
    [prompt] = prompts_of("word-problems:train", 1, RECIPE)
    texts, answer = golds(prompt, "I say {final}!"), final(prompt.columns["answer"])
    assert texts["gold/demonstration"] == f"I say {answer}!"
    around = frames(texts, answer, ["own", "demonstration"])
    assert around["demonstration"] == ("I say ", "!")
    assert around["own"][0] + answer == prompt.columns["answer"]


def test_texts_that_deserve_nothing_never_hold_the_answer():
    for prompt in prompts_of("word-problems:train", 200, RECIPE):
        answer = final(prompt.columns["answer"])
        texts = without_answer(prompt, answer)
        assert all(extract(text, how) != number(answer) for text in texts.values() for how in EXTRACTORS)
        assert answer == "42" or texts["example/of the system prompt"] == "<answer>42</answer>"


@pytest.mark.parametrize(("text", "count"), [("", 0), ("", 3), ("abcdefgh", 3), ("\u00e4" * 10, 4)])
def test_stand_ins_are_as_many_as_asked_for(text, count):
    assert len(stand_ins(text, count)) == count
    assert len(set(stand_ins("spam" * count, count))) <= 1


def test_check_ends_with_1_where_something_failed(file, capsys):
    flags = ["--data", "word-problems", "--limit", "4", "--set", "sampling.group_size=4"]
    assert main(["check", f"{file}:any_answer", *flags]) == 1
    out = capsys.readouterr().out
    assert "fail  wrong" in out
    assert "wrong/heading/another row's (answer '" in out
    assert main(["check", "gsm8k", *flags, "--option", "wrong=-1.0"]) == 0
    assert "gsm8k wrong=-1.0 as a correctness reward" in capsys.readouterr().out
    assert main(["check", "format_think_answer", *flags, "--kind", "correctness"]) == 1
    assert "fail  wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "gsm8k"], "nothing to try it on"),
        (["check", "gsm9k", "--data", "word-problems"], "expected one of gsm8k"),
        (["check", "overlong", "--data", "word-problems"], "needs the column 'buffer'"),
        (["check", "gsm8k", "--data", "word-problems", "--option", "wrong"], "expected name=value"),
        (["check", "gsm8k", "--data", "word-problems", "--option", "wrng=1"], "no parameter for the option 'wrng'"),
        (["diff", "recorded", "gsm8k", "--run", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_said_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_options_are_read_like_settings():
    assert [option(text)[1] for text in ("a=1", "a=1.5", "a=true", "a=last", 'a="1"')] == [1, 1.5, True, "last", "1"]


@pytest.fixture
def run(tmp_path) -> Path:
    """Three groups of four: the first all right, the second half right, the third right but not marked."""
    (tmp_path / "recipe.toml").write_text(dump(RECIPE))
    writer = MetricsWriter(tmp_path / "rollouts" / "one.jsonl")
    forms = [["#### {}"] * 4, ["#### {}", "#### {}", "#### 0", "It is 0\x1b[31m"], ["It is {}."] * 4]
    for row, prompt in enumerate(prompts_of("word-problems:train", 3, RECIPE)):
        for form in forms[row]:
            text = form.format(final(prompt.columns["answer"]))
            right = float("####" in text and "0" not in form)
            rollout = Rollout(
                split="train",
                group=row + 5,
                row=row,
                prompt=prompt.messages,
                completion=text,
                reward=right * 2,
                rewards={"gsm8k": right},
                finish="stop",
                tokens=8,
                snapshots=[f"s{row:08}.i0001"],
                seconds=1.0,
            )
            writer.write(msgspec.to_builtins(rollout))
    writer.close()
    return tmp_path


def test_diff_counts_what_changes(run, capsys):
    assert main(["diff", "gsm8k", "gsm8k", "--run", str(run), "--option", "extractor=last"]) == 0
    out = capsys.readouterr().out
    assert "gsm8k -> gsm8k extractor=last: 12 completions in 3 groups" in out
    assert "mean         0.500 -> 0.833" in out
    assert "same value   66.7%   up 4, down 0, to or from not applicable 0" in out
    assert "signal       0.33 -> 0.33" in out
    assert "truth        0.667 -> 1.000 agree" in out
    assert "gsm8k extractor=last more" in out
    assert "0 -> 1  step 2, row 2" in out
    assert "  2                    4  0.000   1.000     0.0%" in out


def test_what_the_run_recorded_is_what_its_function_gives(run, capsys):
    assert main(["diff", "recorded:gsm8k", "gsm8k", "--run", str(run)]) == 0
    assert "same value   100.0%" in capsys.readouterr().out
    assert main(["diff", "recorded", "gsm8k", "--run", str(run), "--limit", "1"]) == 0
    assert "mean         2.000 -> 1.000" in capsys.readouterr().out  # the weighted sum


def test_diff_says_where_a_function_does_not_apply(run, file, capsys):
    assert main(["diff", "gsm8k", f"{file}:marked_only", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "no longer applies: 5" in out
    assert "up" not in out.split("no longer")[1]
    assert "\x1b" not in out


def test_diff_refuses_other_rows_and_functions_that_always_fail(run, file, tmp_path):
    with pytest.raises(UserError, match="row 0 of the data set is not the prompt"):
        main(["diff", "recorded", "gsm8k", "--run", str(run), "--data", "word-problems:test"])
    with pytest.raises(UserError, match="no group has values under both: reward refuses: error: KeyError"):
        main(["diff", "recorded", f"{file}:refuses", "--run", str(run)])
    with pytest.raises(UserError, match="the run recorded no such function; it has: gsm8k"):
        main(["diff", "recorded:other", "gsm8k", "--run", str(run)])
    with pytest.raises(UserError, match="it takes no --option"):
        main(["diff", "gsm8k", "recorded", "--run", str(run), "--option", "wrong=0"])
