"""Rows of a data set -> prompts as token ids, rendered once through the tokenizer's chat template.

From here on a prompt is its ids: the engine samples behind them and the trainer trains behind
them, so the two cannot tokenize differently. What a row asks is, in this order: its column `data.prompt`
as messages (TRL, verl), a `data.template` other than the default, `data.prompt` as a string (TRL,
OpenRLHF), `question` (GSM8K). The column `data.answer`, or verl's `reward_model.ground_truth`, becomes
the column `answer`. docs/data.md shows rows of each kind.
"""

import datetime
import decimal
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from protocol.errors import UserError
from protocol.recipe import Data
from sampler.rows import load_rows

if TYPE_CHECKING:  # seconds of import, and `--help` must answer in one
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

PLAIN = Data()
NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row: `messages=[{"role": "user", "content": "2 + 2?"}]`, `columns={"answer": "4"}`."""

    ids: np.ndarray  # [tokens] int32
    messages: Messages | str  # a string only if the tokenizer has no chat template
    columns: dict  # all of the row but `data.prompt`, as JSON values, for the rewards
    demonstration: np.ndarray | None = None  # [tokens] int32, with the token that ends the turn; objective `sft`
    demonstration_text: str = ""


def load_prompts(source: str, limit: int, data: Data, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """The first `limit` rows of `source` (0: all), rendered and tokenized.

    Raises UserError, one line: what `read_prompts` raises, a row that cannot be rendered, a prompt above
    `data.max_prompt_tokens`.
    """
    prompts = read_prompts(source, limit, data, chat=tokenizer.chat_template is not None)
    ids = tokenize([prompt.messages for prompt in prompts], tokenizer, source)
    _refuse_long(ids, data.max_prompt_tokens, source)
    return [replace(prompt, ids=np.array(i, np.int32)) for prompt, i in zip(prompts, ids, strict=True)]


def read_prompts(source: str, limit: int, data: Data, *, chat: bool = True) -> list[Prompt]:
    """The first `limit` rows of `source` (0: all) as what they ask, without token ids.

    chat: whether there is a chat template; else each prompt is a text. Raises UserError, one line: nothing there, no
    rows, a row that asks nothing, a row without an answer among rows with one.
    """
    rows = load_rows(source, limit)
    if not rows:
        raise UserError(f"{source}: the data set is empty")
    named = [(f"{source}: row {index} (from 0)", row) for index, row in enumerate(rows)]
    columns = [_columns(row, data, where) for where, row in named]
    conversations = [_messages(row, data, where) for where, row in named]
    asked = conversations if chat else [_text_alone(conversation, source) for conversation in conversations]
    _refuse_missing_gold(columns, data.answer, source)
    return [Prompt(ids=NO_IDS, messages=m, columns=c) for m, c in zip(asked, columns, strict=True)]


def fingerprint(prompts: list[Prompt]) -> str:
    """sha256 (hex) over ids, columns and demonstrations in order: one row means one prompt on both sides."""
    digest = hashlib.sha256()
    for prompt in prompts:
        columns = json.dumps(prompt.columns, sort_keys=True, separators=(",", ":")).encode()
        digest.update(f"{len(prompt.ids)} {len(columns)} ".encode())  # no two lists run together
        digest.update(prompt.ids.astype("<i4").tobytes() + columns)
        if prompt.demonstration is not None:
            digest.update(f"and {len(prompt.demonstration)} ".encode() + prompt.demonstration.astype("<i4").tobytes())
    return digest.hexdigest()


def _messages(row: dict, data: Data, where: str) -> Messages:
    """The conversation that a row asks to continue: system, `data.prefix`, then the row's own."""
    own = _own_messages(row, data, where)
    if data.system and own[0]["role"] == "system":
        raise UserError(f'{where} has its own system message; set data.system = "" to use that, or remove it')
    if own[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's; nothing is left to sample")
    system = [{"role": "system", "content": data.system}] if data.system else []
    head = own[:1] if own[0]["role"] == "system" else []
    return [*system, *head, *data.prefix, *own[len(head) :]]


def _own_messages(row: dict, data: Data, where: str) -> Messages:
    prompt = row.get(data.prompt)
    if prompt is None and data.prompt != PLAIN.prompt:
        raise UserError(f"{where} has no column {data.prompt!r} for data.prompt; it has: {_filled_columns(row)}")
    if isinstance(prompt, list) and prompt:
        if data.template != PLAIN.template:
            raise UserError(f"{where}: `{data.prompt}` holds messages; remove data.template, it has no use")
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
            raise UserError(f"{where}: expected messages {{role, content}}, got {prompt!r:.80}")
        return [{"role": str(m.get("role")), "content": m["content"]} for m in prompt]
    if isinstance(prompt, str) and data.template == PLAIN.template:
        return [{"role": "user", "content": prompt}]
    return [{"role": "user", "content": filled(data.template, row, where, "data.template")}]


def filled(template: str, row: dict, where: str, setting: str) -> str:
    """`{column}` replaced in one pass; other braces, as in `\\boxed{}`, stay as they are.

    A row whose `answer` is written as GSM8K's also has `{reasoning}` and `{final}`. Raises UserError, with the name of
    the setting, for a column that the row lacks.
    """
    row = _solution(row.get("answer")) | row
    for name in re.findall(r"\{(\w+)\}", template):
        if row.get(name) is None:
            asks = setting == "data.template" and template == PLAIN.template
            hint = "; set data.prompt to the one that asks, or data.template" if asks else ""
            raise UserError(f"{where} has no column {name!r} for {setting}; it has: {_filled_columns(row)}{hint}")
    return re.sub(r"\{(\w+)\}", lambda found: str(row[found[1]]), template)


def _solution(answer: object) -> dict[str, str]:
    """`reasoning\\n#### 42` in two parts, without the annotations for a calculator: `48/2 = <<48/2=24>>24`."""
    reasoning, mark, final = str(answer).rpartition("####")
    return {"reasoning": re.sub(r"<<[^<>\n]*>>", "", reasoning).strip(), "final": final.strip()} if mark else {}


def _filled_columns(row: dict) -> str:
    return ", ".join(name for name in row if row[name] is not None)


def _columns(row: dict, data: Data, where: str) -> dict:
    columns = {name: value for name, value in row.items() if name != data.prompt}
    verl = row.get("reward_model")
    if data.answer != PLAIN.answer:
        if data.answer not in row:
            raise UserError(f"{where} has no column {data.answer!r} for data.answer; it has: {_filled_columns(row)}")
        columns["answer"] = row[data.answer]
    elif isinstance(verl, dict) and "answer" not in row:
        columns["answer"] = verl.get("ground_truth")
    try:
        return json.loads(json.dumps(columns, default=_json))
    except TypeError as error:
        raise UserError(f"{where}: {error}; remove that column") from None


def _json(value: object) -> str:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise TypeError(f"a column holds {type(value).__name__}, expected text, numbers or lists")


def _text_alone(conversation: Messages, source: str) -> str:
    if len(conversation) > 1:
        raise UserError(
            f"{source}: the tokenizer has no chat template for system, prefix or several messages; "
            'use an instruct model, or data.system = "" and no data.prefix'
        )
    return conversation[0]["content"]


def tokenize(
    messages: Sequence[Messages | str], tokenizer: "PreTrainedTokenizerBase", source: str, open_turn: bool = True
) -> list[list[int]]:
    """Token ids of texts where there is no chat template, else of conversations.

    `open_turn` ends them with the header of the assistant's turn, which is not its own task.
    """
    if tokenizer.chat_template is None:
        texts = [text for text in messages if isinstance(text, str)]
        assert len(texts) == len(messages), "without a chat template every prompt is a text"
        return tokenizer(texts)["input_ids"]
    conversations = [conversation for conversation in messages if not isinstance(conversation, str)]
    assert len(conversations) == len(messages), "with a chat template every prompt is a conversation"
    from jinja2 import TemplateError

    try:
        # transformers' annotation names all that may come back; of several conversations it is one list of ids each.
        return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
            conversations, add_generation_prompt=open_turn, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise UserError(f"{source}: the chat template refuses the messages: {error}") from None


def _refuse_missing_gold(columns: list[dict], column: str, source: str) -> None:
    """Rows with an answer and rows without one are a mistake in the data, not a choice."""
    missing = [i for i, row in enumerate(columns) if row.get("answer") in (None, "")]
    if missing and (len(missing) < len(columns) or "answer" in columns[0]):
        raise UserError(
            f"{source}: row {missing[0]} (from 0) has no gold answer in the column `{column}` "
            f"({len(missing)} of {len(columns)} rows); fill or remove it"
        )


def _refuse_long(ids: list[list[int]], most: int, source: str) -> None:
    long = [index for index, row in enumerate(ids) if len(row) > most]
    if long:
        raise UserError(
            f"{source}: row {long[0]} (from 0) has {len(ids[long[0]])} tokens, more than "
            f"data.max_prompt_tokens = {most} ({len(long)} such rows, the longest "
            f"{max(map(len, ids))}); raise it or remove the rows"
        )
