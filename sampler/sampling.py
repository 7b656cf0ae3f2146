"""How completions are drawn and what ends them: the recipe's settings, resolved against a model.

A completion ends with an end-of-sequence token, with a text of `sampling.stop` or `stop_after`, or at
`sampling.max_tokens`. The tokenizer names one end-of-sequence token, the generation configuration often others:
all of them count. Tokens and log-probs hold everything that was sampled, the last token whole; the text ends before
a `stop` and behind a `stop_after`, also where that is in the middle of the last token.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from policy.model import vocabulary_size
from protocol.errors import UserError
from protocol.messages import Split
from protocol.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def settings(recipe: Recipe, split: Split) -> dict:
    """Named as in vLLM's SamplingParams. Held-out prompts have a temperature and a top_p of their own and no other
    filter."""
    sampling, evaluation = recipe.sampling, recipe.eval
    ends = {"max_tokens": sampling.max_tokens, "stop": sampling.stop + sampling.stop_after}
    if split == "eval":
        return {"n": evaluation.samples, "temperature": evaluation.temperature, "top_p": evaluation.top_p} | ends
    filters = {
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return {"n": sampling.group_size, "temperature": sampling.temperature} | filters | ends


def end_tokens(recipe: Recipe, directory: Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end a completion: of tokenizer, generation configuration and `sampling.stop_token_ids`, ascending.

    Raises UserError for an id of the recipe that is outside the vocabulary; one of the model's own files is left out
    with a warning.
    """
    size = vocabulary_size(directory)
    for token in recipe.sampling.stop_token_ids:
        if token >= size:
            raise UserError(f"sampling.stop_token_ids: {token} is outside the vocabulary of {size} tokens; remove it")
    own = tokenizer.eos_token_id
    declared = _declared(directory) | ({own} if isinstance(own, int) else set())
    for token in sorted(token for token in declared if token >= size):
        log.warning("end-of-sequence token %d of the model's files is outside its vocabulary of %d", token, size)
    return sorted({token for token in declared if token < size} | set(recipe.sampling.stop_token_ids))


def closing_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token with which the chat template closes an assistant's turn; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    said = "7 apples"
    conversation = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": said}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert isinstance(rendered, str), "not tokenized, it is a text"
    behind = tokenizer(rendered.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in behind if token in tokenizer.added_tokens_decoder), None)


def show(recipe: Recipe, ends: list[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Logs what holds, and a warning where a model cannot end its turn as its chat template does."""
    for split in ("train", "eval"):
        log.info("sampling (%s): %s", split, ", ".join(f"{k} {v}" for k, v in settings(recipe, split).items()))
    log.info("end of sequence: %s", ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in ends))
    closing = closing_token(tokenizer)
    if closing is not None and closing not in ends:
        log.warning(
            "the chat template closes a turn with %r, which ends no completion: add %d to sampling.stop_token_ids",
            tokenizer.decode([closing]),
            closing,
        )


def _declared(directory: Path) -> set[int]:
    """Of generation_config.json, or without that file of config.json: where vLLM looks, too."""
    files = [directory / name for name in ("generation_config.json", "config.json")]
    found = json.loads(next(file for file in files if file.is_file()).read_text()).get("eos_token_id")
    return set(found if isinstance(found, list) else [found]) - {None}
