"""Is an answered lease sound? The checks that stand between the network and the loss."""

import math

import numpy as np

from protocol.codec import Malformed, unpack, unpack_joined
from protocol.messages import Completion, Group, without_signal
from protocol.recipe import Recipe

MAX_POSITIVE = 1e-3
"""Log-probs may exceed 0 by rounding only."""


def problem(group: Group, *, completions: int, max_tokens: int, vocabulary: int, reference: bool) -> str | None:
    """What is wrong with a group; None if nothing. A wrong group is never trained and its lease is tried again.

    completions: expected in the group. reference: log-probs under the reference are expected too.
    """
    items = group.completions
    if len(items) != completions:
        return f"{len(items)} completions, expected {completions}"
    names = items[0].rewards.keys()
    if not names or any([item.rewards.keys() != names for item in items]):
        return "completions name no reward functions, or different ones"
    try:
        prompt = unpack(group.prompt)
        if not len(prompt) or not _are_tokens(prompt, vocabulary):
            return "prompt tokens are empty or outside the vocabulary"
        return _in_arrays(items, max_tokens, vocabulary, reference) or _in_numbers(items)
    except Malformed as error:
        return str(error)


def has_reference(group: Group, recipe: Recipe) -> bool:
    """Whether a sampler scores a training group under the reference. Not one that another may replace."""
    replaced = recipe.trainer.refill > 0 and without_signal([completion.reward for completion in group.completions])
    return recipe.objective.kl_beta > 0 and not recipe.lora.rank and not replaced


def _in_arrays(items: list[Completion], max_tokens: int, vocabulary: int, reference: bool) -> str | None:
    """Of all completions at once: numpy's calls on short arrays cost more than the work."""
    tokens, lengths = unpack_joined([item.tokens for item in items])
    if min(lengths) == 0 or max(lengths) > max_tokens:
        return f"completions of {min(lengths)} to {max(lengths)} tokens, expected 1 to {max_tokens}"
    if not _are_tokens(tokens, vocabulary):
        return f"token ids outside the vocabulary of {vocabulary}"
    if not _are_logprobs([item.logprobs for item in items], lengths):
        return "log-probs are not finite, not negative, or not one for each token"
    references = [item.ref_logprobs for item in items if item.ref_logprobs is not None]
    if len(references) != reference * len(items):
        return "reference log-probs are missing" if reference else "reference log-probs were not asked for"
    if reference and not _are_logprobs(references, lengths):
        return "reference log-probs are not finite, not negative, or not one for each token"
    if not all(map(_covered, items, lengths)):
        return "weight versions do not cover the tokens"
    return None


def _in_numbers(items: list[Completion]) -> str | None:
    numbers = [number for item in items for number in (item.reward, *item.rewards.values()) if number is not None]
    return None if all(map(math.isfinite, numbers)) else "reward is not finite"


def _covered(item: Completion, length: int) -> bool:
    end = 0
    for span in item.spans:
        if span.start != end or span.end < end:
            return False
        end = span.end
    return end == length


def _are_tokens(ids: np.ndarray, vocabulary: int) -> bool:
    return ids.dtype.kind in "iu" and bool(np.minimum.reduce(ids) >= 0 and np.maximum.reduce(ids) < vocabulary)


def _are_logprobs(parts: list[bytes], lengths: list[int]) -> bool:
    values, counts = unpack_joined(parts)
    if values.dtype.kind != "f" or counts != lengths:
        return False
    return bool(np.minimum.reduce(values) > -math.inf and np.maximum.reduce(values) <= MAX_POSITIVE)  # NaN: neither
