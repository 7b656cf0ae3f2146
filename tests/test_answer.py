"""A lease becomes a group: demonstrations without the engine, and rewards that see tokens and their limit."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from protocol.codec import unpack
from protocol.errors import UserError
from protocol.messages import Group, Span
from protocol.metrics import MetricsWriter
from protocol.recipe import Reward
from protocol.resolve import load
from sampler.answer import Answerer, gold_of
from sampler.demonstrations import demonstrated
from sampler.prompts import load_prompts
from sampler.rewards.builtin import overlong
from sampler.rewards.loader import accepted, required
from sampler.rewards.pool import RewardPool
from tests.tiny import make_tokenizer

SNAPSHOT = "s00000003.i0001"
ROW = {"question": "Tom has 48 plums and sells half. How many are left?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}


def demonstrate(directory: Path, rows: list[dict], *overrides: str) -> tuple:
    """The recipe, and the prompts with their demonstrations."""
    source = directory / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = ["objective.name=sft", "objective.kl_beta=0", "sampling.group_size=1"]
    form = 'data.demonstration="<think>{reasoning}</think><answer>{final}</answer>"'
    recipe = load(None, [f"data.train={source}", "data.max_prompt_tokens=999", *sft, form, *overrides])
    tokenizer = make_tokenizer()
    prompts = load_prompts(str(source), 0, recipe.data, tokenizer)
    ends = [tokenizer.eos_token_id]
    return recipe, demonstrated(prompts, recipe.data, tokenizer, ends, recipe.sampling.max_tokens)


def test_a_demonstration_is_answered_without_the_engine_and_rewarded_like_a_completion(tmp_path):
    recipe, prompts = demonstrate(tmp_path, [ROW], 'reward=[{function="gsm8k"},{function="ends_properly"}]')
    engine = SimpleNamespace(weights=SimpleNamespace(snapshot=SNAPSHOT))  # it has nothing that could sample

    async def main() -> Group:
        with MetricsWriter(tmp_path / "rollouts.jsonl") as rollouts:
            async with RewardPool(recipe.reward, 1) as rewards:
                answerer = Answerer(recipe, "s", 320, {"train": prompts}, engine, rewards, None, rollouts)
                group = await answerer.answer("train", 7, 0)
                assert answerer.counts == {"groups": 1, "groups_without_signal": 0}
                return group

    group = asyncio.run(main())
    [one] = group.completions
    tokens = unpack(one.tokens).tolist()
    assert make_tokenizer().decode(tokens) == "<think>48/2 = 24</think><answer>24</answer><|im_end|>"
    assert not unpack(one.logprobs).any() and unpack(one.logprobs).dtype == np.float32
    assert (one.finish, one.ref_logprobs, one.spans) == ("stop", None, [Span(SNAPSHOT, 0, len(tokens))])
    assert one.rewards == {"gsm8k": 1.0, "ends_properly": 1.0} and one.reward == 2.0
    assert one.answers == {} and group.gold is None
    written = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert written["completion"] == "<think>48/2 = 24</think><answer>24</answer>"
    assert (written["gold"], written["answers"], written["specials"]) == ("24", {"marks": "24", "last": "24"}, 0)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"answer": "so\n#### 1,080"}, "1080"),
        ({"answer": 0.75}, "3/4"),
        ({"answer": "a poem"}, None),
        ({"question": "?"}, None),
    ],
)
def test_the_right_number_of_a_row_is_written_like_an_answer(columns, expected):
    assert gold_of(columns) == expected


def test_the_soft_overlong_punishment_is_dapos():
    """Equation 13 with L_max = 10 and L_cache = 4: 0 up to 6 tokens, then (6 - length) / 4."""
    lengths = [1, 6, 7, 8, 9, 10]
    ids = [[5] * length for length in lengths]
    assert overlong(ids, max_tokens=10, buffer=4) == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0]
    assert overlong(ids, max_tokens=10, buffer=10) == [-length / 10 for length in lengths]
    for buffer in (0, 11):
        with pytest.raises(ValueError, match=f"buffer = {buffer}, expected 1 to max_tokens = 10"):
            overlong(ids, max_tokens=10, buffer=buffer)


def test_functions_get_token_ids_and_the_limit_if_they_want_them(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def few(completions, completion_ids, max_tokens):\n"
        "    return [len(ids) / max_tokens for ids in completion_ids]\n"
        "def columns_alone(completions, **columns):\n"
        "    return [float(len(columns)) for _ in zip(*columns.values(), strict=True)]\n"
        "def own(completions, max_tokens):\n"
        "    return [float(max_tokens)] * 2\n"
    )
    rewards = [
        Reward(function="overlong", options={"buffer": 4}),
        Reward(function=f"{mine}:few"),
        Reward(function=f"{mine}:columns_alone"),
        Reward(function=f"{mine}:own", options={"max_tokens": 5}),
    ]

    async def main():
        async with RewardPool(rewards, 1) as pool:
            pool.check_columns({"answer": "4"})  # neither is a column that the data would lack
            return await pool.score("2 + 2?", ["4", "5"], {"answer": "4"}, completion_ids=[[7] * 8, [7]], max_tokens=10)

    score = asyncio.run(main())
    assert score.by_function == {
        "overlong": [-0.5, 0.0],
        "few": [0.8, 0.1],
        "columns_alone": [3.0, 3.0],  # answer, completion_ids and prompts: lists of one value for each completion
        "own": [5.0, 5.0],
    }


def test_an_overlong_reward_without_its_buffer_is_refused_before_anything_is_sampled():
    async def main():
        async with RewardPool([Reward(function="overlong")], 1) as pool:
            pool.check_columns({"answer": "4"})

    with pytest.raises(UserError, match="overlong needs the column 'buffer', or an option of that name"):
        asyncio.run(main())
    assert required(overlong, {"buffer": 4}) == []


def test_a_column_of_the_data_wins_over_the_recipes_limit():
    def function(completions, max_tokens):
        raise NotImplementedError

    assert accepted(function, {"completions": [], "max_tokens": [3]}, {"max_tokens": 9})["max_tokens"] == [3]
