"""Is an answered lease sound? The checks that stand between the network and the loss."""

import numpy as np

from protocol.codec import Malformed, unpack
from protocol.messages import Completion, Group, without_signal
from protocol.recipe import Recipe

MAX_POSITIVE = 1e-3
"""Log-probs may exceed 0 by rounding only."""


def problem(group: Group, *, completions: int, max_tokens: int, vocabulary: int, reference: bool) -> str | None:
    """What is wrong with a group; None if nothing. A wrong group is never trained and its lease is tried again.

    completions: expected in the group. reference: log-probs under the reference are expected too.
    """
    try:
        prompt = unpack(group.prompt)
        if len(group.completions) != completions:
            return f"{len(group.completions)} completions, expected {completions}"
        if not len(prompt) or not _tokens(prompt, vocabulary):
            return "prompt tokens are empty or outside the vocabulary"
        names = {tuple(sorted(item.rewards)) for item in group.completions}
        if len(names) != 1 or () in names:
            return "completions name no reward functions, or different ones"
        problems = (_in_completion(item, max_tokens, vocabulary, reference) for item in group.completions)
        return next((found for found in problems if found), None)
    except Malformed as error:
        return str(error)


def has_reference(group: Group, recipe: Recipe) -> bool:
    """Whether a sampler scores a training group under the reference. Not one that another may replace."""
    replaced = recipe.trainer.refill > 0 and without_signal([completion.reward for completion in group.completions])
    return recipe.objective.kl_beta > 0 and not recipe.lora.rank and not replaced


def _in_completion(item: Completion, max_tokens: int, vocabulary: int, reference: bool) -> str | None:
    tokens, logprobs = unpack(item.tokens), unpack(item.logprobs)
    if not 0 < len(tokens) <= max_tokens:
        return f"completion of {len(tokens)} tokens, expected 1 to {max_tokens}"
    if not _tokens(tokens, vocabulary):
        return f"token ids outside the vocabulary of {vocabulary}"
    if not _logprobs(logprobs, len(tokens)):
        return "log-probs are not finite, not negative, or not one for each token"
    if reference != (item.ref_logprobs is not None):
        return "reference log-probs are missing" if reference else "reference log-probs were not asked for"
    if item.ref_logprobs is not None and not _logprobs(unpack(item.ref_logprobs), len(tokens)):
        return "reference log-probs are not finite, not negative, or not one for each token"
    if not np.isfinite([item.reward, *(value for value in item.rewards.values() if value is not None)]).all():
        return "reward is not finite"
    ends = [0, *(span.end for span in item.spans)]
    if [span.start for span in item.spans] != ends[:-1] or ends[-1] != len(tokens) or sorted(ends) != ends:
        return "weight versions do not cover the tokens"
    return None


def _tokens(ids: np.ndarray, vocabulary: int) -> bool:
    return ids.dtype.kind in "iu" and int(ids.min()) >= 0 and int(ids.max()) < vocabulary


def _logprobs(values: np.ndarray, count: int) -> bool:
    return (
        values.dtype.kind == "f"
        and len(values) == count
        and bool(np.isfinite(values).all())
        and float(values.max()) <= MAX_POSITIVE
    )
