"""The reward functions that come with the project, in TRL's signature: lists in, a list out.

The recipe's `options` arrive as keyword arguments (`correct`, `wrong`), data columns as lists, and so do the
completions' token ids; `max_tokens` is the recipe's.
"""

from sampler.rewards.answers import final_answer
from sampler.rewards.answers import gold as gold_answer

Completion = str | list[dict[str, str]]
"""Text, or a conversation of which the last message is the model's."""


def text_of(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def gsm8k(
    prompts: list,
    completions: list[Completion],
    answer: list,
    correct: float = 1.0,
    wrong: float = 0.0,
    **columns: list,
) -> list[float | None]:
    """`correct` where the final answer equals the gold one exactly, else `wrong`.

    None (not applicable) where `answer` holds no number: no completion could be right there.
    """
    values: list[float | None] = []
    for completion, column in zip(completions, answer, strict=True):
        expected = gold_answer(str(column))
        right = final_answer(text_of(completion)) == expected
        values.append(None if expected is None else correct if right else wrong)
    return values


def format(
    prompts: list,
    completions: list[Completion],
    correct: float = 1.0,
    wrong: float = 0.0,
    **columns: list,
) -> list[float | None]:
    """`correct` for `<think>...</think><answer>...</answer>`, else `wrong`.

    Each tag once, in this order, and nothing but white space before, between and after.
    """
    return [correct if _well_formed(text_of(item)) else wrong for item in completions]


def overlong(completion_ids: list[list[int]], max_tokens: int, buffer: int, **columns: list) -> list[float]:
    """Soft overlong punishment: 0 up to `max_tokens - buffer` tokens, from there on linear, -1 at `max_tokens`.

    DAPO (arXiv 2503.14476), equation 13, which has 4096 for 20480 tokens. A completion that was cut gets -1.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer = {buffer}, expected 1 to max_tokens = {max_tokens}")
    return [min(0.0, (max_tokens - buffer - len(ids)) / buffer) for ids in completion_ids]


def _well_formed(text: str) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return False
    before, rest = text.split("<think>")
    if "</think>" not in rest:
        return False
    between, rest = rest.split("</think>")[1].partition("<answer>")[::2]
    after = rest.partition("</answer>")
    return not (before.strip() or between.strip() or after[2].strip()) and bool(after[1])
