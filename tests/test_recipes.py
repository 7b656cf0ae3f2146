"""Every recipe in recipes/ can be run, as far as that can be known without its model."""

import asyncio
import tomllib
from pathlib import Path

import msgspec
import pytest

from protocol.recipe import Recipe
from protocol.resolve import dump, load
from sampler.prompts import load_prompts
from sampler.rewards.loader import load as load_reward
from sampler.rewards.loader import required
from sampler.rewards.pool import RewardPool
from sampler.rewards.worker import Call, answer
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
ROWS = {
    "openai/gsm8k": {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    "trl-lib/tldr": {"prompt": "POST: I lost my keys.\n\nTL;DR:", "completion": " Lost keys."},
    "Jiayi-Pan/Countdown-Tasks-3to4": {"target": 98, "nums": [44, 19, 35]},
}
"""A row with the columns of each data set of the hub."""


def one_row(recipe: Recipe, directory: Path) -> tuple[str, Recipe]:
    """A source that can be read here, and the recipe for the tests' tokenizer, which has a token for each byte."""
    data = msgspec.structs.replace(recipe.data, max_prompt_tokens=8192)
    name = recipe.data.train.partition(":")[0]
    if name in ROWS:
        (directory / "row.jsonl").write_bytes(msgspec.json.encode(ROWS[name]))
        return str(directory / "row.jsonl"), msgspec.structs.replace(recipe, data=data)
    return recipe.data.train, msgspec.structs.replace(recipe, data=data)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_to_what_it_says(path, tmp_path):
    recipe = load(path)
    assert recipe.name == path.stem
    (tmp_path / "resolved.toml").write_text(dump(recipe))
    assert load(tmp_path / "resolved.toml") == recipe
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# "), "a recipe begins with what it is"
    assert tomllib.loads(path.read_text())["trainer"]["steps"] == recipe.trainer.steps


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_rows_make_prompts_that_its_rewards_can_score(path, tmp_path):
    source, recipe = one_row(load(path), tmp_path)
    prompt = load_prompts(source, 1, recipe.data, make_tokenizer())[0]
    request = {
        "prompts": [prompt.messages] * 2,
        "completions": ["#### 4", "no " * 30],
        "completion_ids": [list(range(40)), [7] * recipe.sampling.max_tokens],
        "finish_reasons": ["stop", "length"],
        "max_tokens": recipe.sampling.max_tokens,
        "columns": {name: [value] * 2 for name, value in prompt.columns.items()},
    }
    for reward in recipe.reward:
        function = load_reward(reward.function, reward.options)
        assert set(required(function, reward.options)) <= set(prompt.columns)
        call = Call(reference=reward.function, options=reward.options, run=function)
        with asyncio.Runner() as runner:
            assert len(answer(call, request, runner)["values"]) == 2


def test_the_two_terms_of_the_ladder_make_1_and_a_tenth_and_0():
    ladder = load(ROOT / "recipes/demo-ladder.toml").reward
    assert ladder == load(ROOT / "recipes/gsm8k-verl.toml").reward

    async def main():
        async with RewardPool(ladder, 1) as pool:
            return await pool.score("?", ["#### 4", "#### 5", "4"], {"answer": "4"})

    score = asyncio.run(main())
    assert score.rewards == [1.0, 0.1, 0.0]
    assert score.by_function["gsm8k"] == [1.0, 0.0, 0.0]  # accuracy counts right answers alone
