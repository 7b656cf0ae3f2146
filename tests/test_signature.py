"""Reward functions of TRL, verl and OpenRLHF run as they are; what is none of them is refused at the start."""

import asyncio
from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.recipe import Reward
from sampler.rewards.pool import RewardFailed, RewardPool

FUNCTIONS = """
import json

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(solution_str == ground_truth)

def partly(solution_str, ground_truth, format_score=0.0):
    return 1.0 if solution_str == ground_truth else format_score

def by_dict(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str)), "acc": True, "pred": solution_str}

async def judged(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str))}

def told(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    raise ValueError(json.dumps([data_source, solution_str, ground_truth, extra_info, kwargs], sort_keys=True))

def scoreless(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0}

def strict(data_source, solution_str, ground_truth, judge):
    return 1.0

class Tensor:
    def __init__(self, values):
        self.values = list(values)

    def tolist(self):
        return self.values

def reward_func(queries, prompts, labels, **kwargs):
    rewards = Tensor(float(query == prompt + label) for query, prompt, label in zip(queries, prompts, labels))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy": rewards}}

def reward_list(queries, prompts, labels):
    raise ValueError(json.dumps([queries, prompts, labels]))

def ends(completions, finish_reasons, **kwargs):
    return [float(reason == "stop") for reason in finish_reasons]

def given(completions, **kwargs):
    return [float(reason == "stop") for reason in kwargs["finish_reasons"]]

def text_and_gold(text, gold):
    return 1.0

def by_position(prompts, completions, /):
    return [1.0 for _ in completions]

def anything(*args):
    return 1.0
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def score(rewards: list[Reward], columns: dict, said=("4", "five")) -> dict:
    async def main():
        async with RewardPool(rewards, 1) as pool:
            pool.check_columns(columns)
            prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
            reasons = ["stop", "length"][: len(said)]
            return (await pool.score(prompt, list(said), columns, finish_reasons=reasons, max_tokens=8)).by_function

    return asyncio.run(main())


def test_functions_of_each_convention_score_the_same_group(mine):
    names = ("compute_score", "by_dict", "judged", "reward_func", "ends", "given")
    rewards = [Reward(function=f"{mine}:{name}") for name in names]
    rewards += [Reward(function=f"{mine}:partly", options={"format_score": 0.1})]
    assert score(rewards, {"answer": "4"}) == {
        "compute_score": [1.0, 0.0],
        "by_dict": [1.0, 4.0],
        "judged": [1.0, 4.0],
        "reward_func": [1.0, 0.0],
        "ends": [1.0, 0.0],
        "given": [1.0, 0.0],
        "partly": [1.0, 0.1],
    }


VERL = {
    "data_source": "openai/gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "1080"},
    "extra_info": {"index": 7},
    "answer": "1080",
}
PLAIN = {"question": "?", "answer": "3 * 360\n#### 1,080"}


@pytest.mark.parametrize(
    ("columns", "options", "seen"),
    [
        (VERL, {}, '["openai/gsm8k", "x", "1080", {"index": 7}, {}]'),
        (VERL, {"data_source": "mine", "strict": True}, '["mine", "x", "1080", {"index": 7}, {"strict": true}]'),
        (PLAIN, {}, '["unknown", "x", "1080", {"answer": "3 * 360\\n#### 1,080", "question": "?"}, {}]'),
        ({"answer": 7}, {}, '["unknown", "x", 7, {"answer": 7}, {}]'),
    ],
    ids=["verl's columns", "options", "gsm8k's columns", "a bare answer"],
)
def test_what_a_verl_function_is_told(mine, columns, options, seen):
    with pytest.raises(RewardFailed) as failed:
        score([Reward(function=f"{mine}:told", options=options)], columns, said=["x"])
    assert f"ValueError: {seen} (mine.py:" in failed.value.why


def test_what_an_openrlhf_function_is_told(mine):
    with pytest.raises(RewardFailed) as failed:
        score([Reward(function=f"{mine}:reward_list")], {"answer": "4"}, said=["x"])
    assert r'[["Add.\n2 + 2?\nx"], ["Add.\n2 + 2?\n"], ["4"]]' in failed.value.why


def test_a_dict_without_a_score_fails_the_group_by_name(mine):
    with pytest.raises(RewardFailed, match=r"scoreless: error: TypeError: .* a dict without 'score'; it has: acc"):
        score([Reward(function=f"{mine}:scoreless")], {"answer": "4"})


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("text_and_gold", {}, r"the function takes \(text, gold\); expected one of f\(prompts, .*TRL.*verl.*OpenRLHF"),
        ("by_position", {}, r"takes \(prompts, completions\); expected one of"),
        ("anything", {}, r"takes \(\*args\); expected one of"),
        ("strict", {}, "the function needs 'judge'; give it as an option"),
        ("partly", {"fromat_score": 0.1}, "no parameter for the option 'fromat_score'; it has: format_score"),
        ("compute_score", {"solution_str": "4"}, "no parameter for the option 'solution_str'"),
        ("ends", {"finish_reasons": "stop"}, "no parameter for the option 'finish_reasons'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_the_start(mine, name, options, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        score([Reward(function=f"{mine}:{name}", options=options)], {"answer": "4"})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["compute_score", "reward_func"])
def test_foreign_functions_need_an_answer(mine, name):
    with pytest.raises(UserError, match=r"needs the column 'answer'.*has: question"):
        score([Reward(function=f"{mine}:{name}")], {"question": "?"})
