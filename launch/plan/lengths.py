"""How long the prompts of a data set are, and what about that cannot work or is doubtful."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from protocol.recipe import Data, Recipe

if TYPE_CHECKING:
    from sampler.prompts import Prompt

ENDLESS = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens."""

    rows: int
    half: int
    """Half of the rows have at most as many; of `most_of` 95 %."""
    most_of: int
    longest: int
    too_long: int
    """Rows above a limit."""

    def words(self) -> str:
        return f"{self.rows} rows, tokens p50 {self.half}, p95 {self.most_of}, max {self.longest}"


def lengths(counts: Sequence[int], limit: int) -> Lengths:
    """counts: tokens of each row, at least one row."""
    half, most_of = np.percentile(counts, [50, 95], method="higher").tolist()
    too_long = sum(count > limit for count in counts)
    return Lengths(rows=len(counts), half=half, most_of=most_of, longest=max(counts), too_long=too_long)


def all_prompts(source: str, limit: int, data: Data, tokenizer) -> "list[Prompt]":
    """As the sampler reads them, those above `data.max_prompt_tokens` too. Raises UserError."""
    from sampler.prompts import load_prompts

    return load_prompts(source, limit, replace(data, max_prompt_tokens=ENDLESS), tokenizer)


def refusals(found: Sequence[tuple[str, Lengths]], recipe: Recipe, context: int) -> list[str]:
    """found: of each source. context: positions of the model."""
    most, answer = recipe.data.max_prompt_tokens, recipe.sampling.max_tokens
    lines = [
        f"{source}: {one.too_long} of {one.rows} prompts have more than data.max_prompt_tokens = {most} tokens; set "
        f"data.max_prompt_tokens = {one.longest} or remove the rows"
        for source, one in found
        if one.too_long
    ]
    longest = max(one.longest for _, one in found)
    if most + answer > context:
        way = f"sampling.max_tokens = {context - most}" if most < context else ""
        if longest + answer <= context:
            way = f"data.max_prompt_tokens = {context - answer}"
        lines.append(
            f"data.max_prompt_tokens = {most} and sampling.max_tokens = {answer} are {most + answer} tokens, more than "
            f"the model's {context} positions; " + (f"set {way}" if way else "take a model with a longer context")
        )
    return lines


def doubts(found: Sequence[tuple[str, Lengths]], recipe: Recipe) -> list[str]:
    """found: of each source, `data.train` first."""
    longest, train = max(one.longest for _, one in found), found[0][1]
    whole, row = longest + recipe.sampling.max_tokens, recipe.trainer.tokens_per_micro_batch
    lines = []
    if recipe.data.train == recipe.data.eval:
        lines.append(
            f"data.train and data.eval are both {recipe.data.train}: held-out accuracy would be that of trained "
            "prompts; name other rows in data.eval"
        )
    if whole > row:
        lines.append(
            f"a prompt and a completion can have {whole} tokens, more than trainer.tokens_per_micro_batch = {row}: "
            "such a completion is a row of its own, and needs memory for it"
        )
    if train.rows < recipe.trainer.prompts_per_step:
        lines.append(
            f"{train.rows} training prompts are fewer than trainer.prompts_per_step = "
            f"{recipe.trainer.prompts_per_step}: a step trains some of them twice"
        )
    return lines
