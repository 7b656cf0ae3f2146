"""What ends a completion and how it is drawn: in real vLLM with a real model, and refused before it starts."""

import json
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from policy.embedded import NAME, embedded
from policy.model import load_tokenizer
from protocol.codec import unpack
from protocol.errors import UserError
from protocol.metrics import MetricsWriter
from protocol.recipe import Reward
from protocol.resolve import load
from sampler.answer import Answerer
from sampler.engine import Engine
from sampler.prompts import load_prompts
from sampler.reference import Reference
from sampler.rewards.pool import RewardPool
from sampler.sampling import closing_token, end_tokens, settings, show
from tests.running_engine import Running, logprobs, publish, trainers_model
from tests.tiny import make_model, make_tokenizer

RECIPE = Path("recipes/demo.toml")
TOP_P, TOP_K = 0.9, 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """SmolLM2, whose generation configuration names another end of sequence than its tokenizer."""
    try:
        found = embedded(NAME)
    except UserError as error:
        pytest.skip(str(error))
    copy = tmp_path_factory.mktemp("generation") / "smollm2"
    copy.mkdir()
    for file in found.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "generation_config.json").unlink()
    so = load_tokenizer(found).encode(" so")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": so}))
    return copy


@pytest.fixture(scope="module")
def running(directory, tmp_path_factory):
    plus = load_tokenizer(directory).encode(" +")
    result = Running(
        tmp_path_factory.mktemp("engine"),
        "model.dtype=float32",
        "data.max_prompt_tokens=160",
        "sampling.max_tokens=24",
        "sampling.temperature=1.3",
        f"sampling.top_p={TOP_P}",
        f"sampling.top_k={TOP_K}",
        "sampling.stop=[' row', 'never']",
        'sampling.stop_after=["\\n##"]',
        f"sampling.stop_token_ids={plus}",
        "objective.recompute_old_logprobs=true",
        "objective.correction=none",
        "eval.temperature=0",
        model=directory,
    )
    result.call(result.engine.weights.load(publish(directory, result.snapshots, 0)))
    yield result
    result.close()


@pytest.fixture(scope="module")
def greedy(running, directory, tmp_path_factory) -> dict:
    """What the model says to some questions, and its log-probs computed as the trainer does."""
    questions = [
        "Max makes 2 rows of 5 coins. How many coins are there?",
        "Liam had 20 stamps and lost 11. How many stamps does Liam have now?",
        "Dan has 9 pens and Rosa has 6. How many pens do they have together?",
        "Will has 16 cups and Finn has 8. How many more cups does Will have?",
        "Finn finds 10 cookies today and 6 tomorrow. How many cookies does Finn find?",
    ]
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    prompts = load_prompts(str(rows), 0, load(RECIPE).data, load_tokenizer(directory))
    said = {}
    for prompt, question in zip(prompts, questions, strict=True):
        [one] = running.call(running.engine.generate(prompt.ids, "eval"))
        said[question.split()[0]] = (one, logprobs(directory, prompt.ids, [one.tokens])[0])
    return said


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("who", "text", "last"),
    [
        ("Max", "Max has 2", " rows"),  # `stop` begins and ends inside the last token
        ("Liam", "20 - 11 = 11\n##", "####"),  # `stop_after` ends inside the last token and stays in the text
        ("Dan", "Sarah has 9 pens,", " so"),  # end of sequence of the generation configuration, no special token
        ("Will", "16", " +"),  # of the recipe
    ],
)
def test_the_text_ends_where_the_recipe_says_and_the_tokens_hold_all_that_was_sampled(
    greedy, directory, who, text, last
):
    one, expected = greedy[who]
    tokenizer = load_tokenizer(directory)
    assert (one.text, one.finish) == (text, "stop")
    assert tokenizer.decode(one.tokens[-1:]) == last
    assert tokenizer.decode(one.tokens).startswith(text)
    assert len(one.logprobs) == len(one.tokens) == one.spans[-1].end
    assert abs(one.logprobs - expected).max() < 1e-3


@pytest.mark.slow
@pytest.mark.long
def test_a_completion_that_nothing_ends_is_cut(greedy):
    one, expected = greedy["Finn"]
    assert (one.finish, len(one.tokens)) == ("length", 24)
    assert abs(one.logprobs - expected).max() < 1e-3


@pytest.mark.slow
@pytest.mark.long
def test_filtered_log_probs_are_too_high_by_the_kept_mass(running, directory):
    """Why the recipe refuses filters wherever the sampler's log-probs weigh anything: every importance weight
    would be too small by the mass of the kept tokens, another one at each token. Measured: 0.21 nats on average."""
    prompt = load_prompts("word-problems:test", 1, load(RECIPE).data, load_tokenizer(directory))[0].ids
    sampled = running.call(running.engine.generate(prompt, "train"))
    assert len(sampled) == 8
    sampled = sampled[:4]  # enough, and no minute of computing
    bias, kept = [], []
    for one, own in zip(
        sampled, logprobs(directory, prompt, [one.tokens for one in sampled], temperature=1.3), strict=True
    ):
        bias += (one.logprobs - own).tolist()
        kept += kept_mass(directory, prompt, one.tokens).tolist()
    gap = abs(np.array(bias) + np.log(kept))
    assert np.quantile(gap, 0.9) < 1e-3, gap  # a token at the edge of a filter may fall on either side of it
    assert min(bias) > -1e-3 and np.mean(bias) > 0.1


@torch.no_grad()
def kept_mass(directory: Path, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[n] share of the probability at temperature 1.3 that top_k and then top_p leave for each token."""
    ids = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    logits = trainers_model(directory, torch.float32)(ids).logits[0, len(prompt) - 1 : -1] / 1.3
    mass = logits.softmax(-1).topk(TOP_K).values
    before = (mass / mass.sum(-1, keepdim=True)).cumsum(-1) - mass / mass.sum(-1, keepdim=True)
    return (mass * (before < TOP_P)).sum(-1).numpy()


@pytest.mark.slow
@pytest.mark.long
def test_held_out_prompts_are_answered_with_the_numbers_that_evaluation_needs(running, directory, tmp_path):
    recipe, prompts = of_demo("eval.extractors=['marks', 'last', 'boxed']")
    group, counts = answer(running, recipe, prompts, tmp_path, "eval", 2)  # Liam: 20 - 11
    [one] = group.completions
    assert one.answers == {"marks": None, "last": "11", "boxed": None}  # the stop came before the mark's number
    assert (group.gold, one.rewards, counts["groups"]) == ("9", {"gsm8k": 0.0}, 0)


@pytest.mark.slow
@pytest.mark.long
def test_a_group_without_signal_is_counted_and_its_reference_left_out_where_it_is_replaced(running, tmp_path):
    """Nothing is right."""
    recipe, prompts = of_demo("trainer.refill=1.0", "objective.kl_beta=0.04")
    prompts["train"][0].columns["answer"] = "#### 987654"
    group, counts = answer(running, recipe, prompts, tmp_path, "train", 0, reference=True)
    assert [one.ref_logprobs for one in group.completions] == [None] * 8
    assert counts == {"groups": 1, "groups_without_signal": 1}
    recipe, prompts = of_demo("objective.kl_beta=0.04")  # trained like all
    prompts["train"][0].columns["answer"] = "#### 987654"
    group, counts = answer(running, recipe, prompts, tmp_path, "train", 0, reference=True)
    assert all(len(unpack(one.ref_logprobs)) == len(unpack(one.tokens)) for one in group.completions)
    assert counts == {"groups": 1, "groups_without_signal": 1}


@pytest.mark.slow
@pytest.mark.long
def test_a_reward_of_the_tokens_makes_the_signal(running, tmp_path):
    recipe, prompts = of_demo("trainer.refill=1.0", "objective.kl_beta=0.04")
    recipe = msgspec.structs.replace(recipe, reward=[Reward(function="overlong", options={"buffer": 32})])
    group, counts = answer(running, recipe, prompts, tmp_path, "train", 0, reference=True)
    assert [one.reward for one in group.completions] == [-len(unpack(one.tokens)) / 32 for one in group.completions]
    assert len({one.reward for one in group.completions}) > 1
    assert counts == {"groups": 1, "groups_without_signal": 0}
    assert all(one.ref_logprobs for one in group.completions)


def of_demo(*overrides: str) -> tuple:
    """The demo's recipe, and the prompts that its `eval` names for both splits."""
    recipe = load(RECIPE, ["model.dtype=float32", "eval.temperature=0", *overrides])
    rows = load_prompts("word-problems:test", 3, recipe.data, load_tokenizer(embedded(NAME)))
    return recipe, {"train": rows, "eval": rows}


def answer(running: Running, recipe, prompts: dict, directory: Path, split: str, row: int, reference: bool = False):
    """The group, and what the answerer counted."""

    async def main():
        scorer = Reference(recipe, running.model, "cpu") if reference else None
        with MetricsWriter(directory / "rollouts.jsonl") as rollouts:
            async with RewardPool(recipe.reward, 1) as rewards:
                answerer = Answerer(recipe, "s", 49152, prompts, running.engine, rewards, scorer, rollouts)
                return await answerer.answer(split, 0, row), answerer.counts

    return running.call(main())


def make(directory: Path, *overrides: str):
    recipe = load(None, [f"model.path={directory}", *overrides])
    return recipe, directory, load_tokenizer(directory)


def declare(directory: Path, ends: int | list[int] | None) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def test_all_ends_of_sequence_count(tiny):
    own = make_tokenizer().eos_token_id
    assert end_tokens(*make(tiny)) == [own]
    declare(tiny, [own, 7])
    assert end_tokens(*make(tiny, "sampling.stop_token_ids=[9, 3]")) == [3, 7, 9, own]
    declare(tiny, 7)
    assert end_tokens(*make(tiny)) == [7, own]
    (tiny / "generation_config.json").unlink()  # then the model's configuration speaks
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"eos_token_id": 8}))
    assert end_tokens(*make(tiny)) == [8, own]


def test_an_end_of_sequence_outside_the_vocabulary_is_refused_or_left_out(tiny, caplog):
    with pytest.raises(UserError, match="stop_token_ids: 320 is outside the vocabulary of 320"):
        Engine(make(tiny, "sampling.stop_token_ids=[5, 320]")[0], tiny, tiny, gpu=False, seed=0)
    declare(tiny, [320, 7])
    assert 320 not in end_tokens(*make(tiny))
    assert "token 320 of the model's files is outside" in caplog.text


def test_a_template_that_closes_a_turn_otherwise_is_a_warning(tiny, caplog):
    recipe, _, tokenizer = make(tiny)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert closing_token(tokenizer) == end
    show(recipe, [end], tokenizer)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    show(recipe, [end], tokenizer)
    assert f"add {start} to sampling.stop_token_ids" in caplog.text
    tokenizer.chat_template = None
    assert closing_token(tokenizer) is None


def test_what_holds_is_shown(tiny, caplog):
    caplog.set_level(logging.INFO)
    recipe, _, tokenizer = make(tiny, "sampling.stop=['Q:']", "sampling.stop_after=['</answer>']", "eval.top_p=0.5")
    show(recipe, [tokenizer.eos_token_id], tokenizer)
    assert f"end of sequence: {tokenizer.eos_token_id} '<|im_end|>'" in caplog.text
    assert "sampling (train): n 8, temperature 1.0, top_p 1.0, top_k 0, min_p 0.0" in caplog.text
    assert "sampling (eval): n 1, temperature 0.0, top_p 0.5, max_tokens 512, stop ['Q:', '</answer>']" in caplog.text


def test_filters_of_training_do_not_reach_held_out_prompts():
    free = ["objective.recompute_old_logprobs=true", "objective.correction=none"]
    recipe = load(None, [*free, "sampling.top_k=5", "sampling.repetition_penalty=1.1", "sampling.min_p=0.1"])
    assert settings(recipe, "train").items() >= {"top_k": 5, "repetition_penalty": 1.1, "min_p": 0.1}.items()
    assert not settings(recipe, "eval").keys() & {"top_k", "repetition_penalty", "min_p"}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            ["sampling.stop=['a']", "sampling.stop_after=['a', 'b']"],
            "'a' is in sampling.stop and in sampling.stop_after",
        ),
        (["sampling.stop=['']"], "every text contains it"),
        (["eval.samples=4"], "4 times the same"),
        (["sampling.temperature=0.001"], "vLLM raises temperatures below 0.01"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_before_the_model_loads(tiny, override, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        Engine(make(tiny, *override)[0], tiny, tiny, gpu=False, seed=0)
    assert "\n" not in str(refused.value)
