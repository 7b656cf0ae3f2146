"""Rows with a solution -> what the model learns to say behind the prompt (objective `sft`).

A demonstration is the part of the conversation, as the chat template renders it, from the end of the prompt to the
token that ends the assistant's turn. So a model that has learned it says exactly what a sampled completion would hold.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from protocol.errors import UserError
from protocol.recipe import Data
from sampler.prompts import Prompt, filled, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def demonstrated(
    prompts: Sequence[Prompt],
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int],
    max_tokens: int,
) -> list[Prompt]:
    """The prompts of `data.train`, each with its demonstration [n] and the text that it decodes to.

    ends: token ids that end a completion; without a chat template the tokenizer's own is put at the end.
    Raises UserError, one line: a column that is missing, a demonstration that does not continue its prompt, that
    does not end or ends early, or that has more than `max_tokens` tokens.
    """
    texts = [
        filled(data.demonstration, prompt.columns, _where(data, index), "data.demonstration")
        for index, prompt in enumerate(prompts)
    ]
    behind = [
        _behind(prompt.ids.tolist(), ids, set(ends), tokenizer)
        for prompt, ids in zip(prompts, _conversations(prompts, texts, tokenizer, data.train), strict=True)
    ]
    found = _sound(behind, data)
    _refuse_long(found, max_tokens, data)
    said = [_text(ids, tokenizer) for ids in found]
    _warn_of_changes(texts, said)
    return [
        dataclasses.replace(prompt, demonstration=np.array(ids, np.int32), demonstration_text=text)
        for prompt, ids, text in zip(prompts, found, said, strict=True)
    ]


def _conversations(
    prompts: Sequence[Prompt], texts: list[str], tokenizer: "PreTrainedTokenizerBase", source: str
) -> list[list[int]]:
    """Token ids of prompt and demonstration together."""
    if tokenizer.chat_template is None:
        whole = [f"{prompt.messages}{text}" for prompt, text in zip(prompts, texts, strict=True)]
        end = tokenizer.eos_token_id
        ends = [end] if isinstance(end, int) else []
        return [ids + ends for ids in tokenize(whole, tokenizer, source)]
    whole = [
        [*prompt.messages, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, texts, strict=True)
    ]
    return tokenize(whole, tokenizer, source, open_turn=False)


def _behind(
    prompt: list[int], whole: list[int], ends: set[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[int] | str:
    """What follows the prompt, up to and with the token that ends the turn; else what is wrong with it."""
    if whole[: len(prompt)] != prompt:
        return "does not begin with the prompt's tokens when it is rendered together with it"
    rest = whole[len(prompt) :]
    length = next((place for place, token in enumerate(rest, start=1) if token in ends), None)
    if length is None:
        return "is closed by no end-of-sequence token of the chat template"
    if _text(rest[length:], tokenizer).strip():
        return "holds an end-of-sequence token in the middle"
    return rest[:length]


def _text(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the text of the ids, without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str), "the ids of one text make one text"
    return text


def _sound(found: list[list[int] | str], data: Data) -> list[list[int]]:
    """Returns all of them. Raises UserError where one is a text, which says why it is wrong."""
    wrong = [index for index, ids in enumerate(found) if isinstance(ids, str)]
    if wrong:
        raise UserError(
            f"{_where(data, wrong[0])}: the demonstration {found[wrong[0]]} ({len(wrong)} of {len(found)} rows); "
            "change data.demonstration, or the chat template of the model"
        )
    return [ids for ids in found if not isinstance(ids, str)]


def _refuse_long(found: list[list[int]], max_tokens: int, data: Data) -> None:
    long = [index for index, ids in enumerate(found) if len(ids) > max_tokens]
    if long:
        raise UserError(
            f"{_where(data, long[0])}: the demonstration has {len(found[long[0]])} tokens, more than "
            f"sampling.max_tokens = {max_tokens} ({len(long)} such rows, the longest {max(map(len, found))}); "
            "raise it or remove the rows"
        )


def _warn_of_changes(texts: list[str], said: list[str]) -> None:
    """Templates may strip a text, or move its reasoning elsewhere."""
    changed = [index for index, pair in enumerate(zip(texts, said, strict=True)) if pair[0] != pair[1]]
    if changed:
        log.warning(
            "the chat template changes %d of %d demonstrations; the first of them becomes %r",
            len(changed),
            len(texts),
            said[changed[0]],
        )


def _where(data: Data, index: int) -> str:
    return f"{data.train}: row {index} (from 0)"
