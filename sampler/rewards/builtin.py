"""The reward functions that come with the project, in TRL's signature: lists in, a list out.

The recipe's `options` arrive as keyword arguments (`correct`, `wrong`), data columns as lists, and so do the
completions' token ids and the reasons why they ended; `max_tokens` is the recipe's. Each names whose it is.
"""

from collections.abc import Hashable, Sequence
from math import floor

from protocol.recipe import Extractor
from sampler.rewards.answers import EXTRACTORS, extract
from sampler.rewards.answers import gold as gold_answer

Completion = str | list[dict[str, str]]
"""Text, or a conversation of which the last message is the model's."""
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def text_of(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def gsm8k(
    completions: list[Completion],
    answer: list,
    correct: float = 1.0,
    wrong: float = 0.0,
    formatted: float | None = None,
    extractor: Extractor = "marks",
    tail: int = 0,
    **columns: list,
) -> list[float | None]:
    """`correct` where the final answer equals the gold one exactly; `formatted` for another number; else `wrong`.

    extractor: how the answer is found (sampler/rewards/answers.py). tail: in so many characters at the end; 0: in
    all. formatted: unset, it is `wrong`. verl's `gsm8k` calls it `format_score`; its "strict" is "heading"
    with a tail of 300, its "flexible" is "last".
    None (not applicable) where `answer` holds no number: no completion could be right there.
    Raises ValueError for an unknown extractor or a negative tail.
    """
    if extractor not in EXTRACTORS or tail < 0:
        raise ValueError(f"extractor = {extractor!r}, tail = {tail}: expected {', '.join(EXTRACTORS)}, and 0 or more")
    other = wrong if formatted is None else formatted
    values: list[float | None] = []
    for completion, column in zip(completions, answer, strict=True):
        expected, found = gold_answer(str(column)), extract(text_of(completion)[-tail:], extractor)
        values.append(None if expected is None else wrong if found is None else correct if found == expected else other)
    return values


def format_think_answer(
    completions: list[Completion], correct: float = 1.0, wrong: float = 0.0, **columns: list
) -> list[float]:
    """`correct` for `<think>...</think><answer>...</answer>`, else `wrong`.

    Each tag once, in this order, and nothing but white space before, between and after. simple_GRPO, grpo_reproduce,
    GRPO-Zero and open-r1 ask for it; their patterns differ in the white space.
    """
    return [correct if _well_formed(text_of(item)) else wrong for item in completions]


def tag_count(completions: list[Completion], **columns: list) -> list[float]:
    """A quarter for each of the four tags that occurs exactly once: a first step to the format above (open-r1)."""
    return [sum(text_of(item).count(tag) == 1 for tag in TAGS) / len(TAGS) for item in completions]


def ends_properly(finish_reasons: list[str], correct: float = 1.0, wrong: float = 0.0, **columns: list) -> list[float]:
    """`correct` where the model ended the completion itself, `wrong` where it was cut at `max_tokens`.

    OpenRLHF's `stop_properly_penalty_coef`, after ProRL (arXiv 2505.24864), scales rewards by it; here it is a term.
    """
    return [correct if reason == "stop" else wrong for reason in finish_reasons]


def overlong(completion_ids: list[list[int]], max_tokens: int, buffer: int, **columns: list) -> list[float]:
    """Soft overlong punishment: 0 up to `max_tokens - buffer` tokens, from there on linear, -1 at `max_tokens`.

    DAPO (arXiv 2503.14476), equation 13, which has 4096 for 20480 tokens. A completion that was cut gets -1.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer = {buffer}, expected 1 to max_tokens = {max_tokens}")
    return [min(0.0, (max_tokens - buffer - len(ids)) / buffer) for ids in completion_ids]


def repetition(
    completions: list[Completion],
    completion_ids: list[list[int]],
    size: int = 5,
    penalty: float = 1.0,
    steps: int = 0,
    unit: str = "tokens",
    **columns: list,
) -> list[float]:
    """`-penalty` times the share of n-grams that occurred before; 0 for completions with less than `size` units.

    size: units in an n-gram. unit: tokens, or words (in small letters, between white space), which miss a loop
    without white space. steps: above 0, the share is rounded down to multiples of 1 / steps, so that the little
    repetition of sane text costs nothing.
    Appendix C.2 of arXiv 2502.03373; TRL's `get_repetition_penalty_reward` counts tokens, open-r1's words.
    """
    if size < 1 or steps < 0 or penalty < 0 or unit not in ("tokens", "words"):
        raise ValueError(
            f"size = {size}, steps = {steps}, penalty = {penalty}, unit = {unit!r}: expected 1 or more, 0 or more, "
            "0 or more, and tokens or words"
        )
    units = completion_ids if unit == "tokens" else [text_of(item).lower().split() for item in completions]
    shares = [repeated(item, size) for item in units]
    return [0.0 - penalty * (floor(share * steps) / steps if steps else share) for share in shares]


def repeated(units: Sequence[Hashable], size: int) -> float:
    """The share of n-grams of `size` units that occurred before in the same sequence: 0 to less than 1."""
    ngrams = list(zip(*(units[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def length_target(
    completions: list[Completion],
    completion_ids: list[list[int]],
    target: int,
    scale: int = 0,
    unit: str = "tokens",
    **columns: list,
) -> list[float]:
    """1 at `target` units, linearly less with the distance, 0 at a distance of `scale`, never below -1.

    scale: 0 stands for `target`. unit: tokens or characters. After the reward of TRL's first example, which trains
    summaries (TL;DR): minus the distance in characters, without a bound.
    """
    if target < 1 or scale < 0 or unit not in ("tokens", "characters"):
        raise ValueError(
            f"target = {target}, scale = {scale}, unit = {unit!r}: expected 1 or more, 0 or more, tokens or characters"
        )
    lengths = map(len, completion_ids if unit == "tokens" else map(text_of, completions))
    return [max(-1.0, 1 - abs(length - target) / (scale or target)) for length in lengths]


def _well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    before, rest = text.split("<think>")
    if "</think>" not in rest:
        return False
    between, rest = rest.split("</think>")[1].partition("<answer>")[::2]
    after = rest.partition("</answer>")
    return not (before.strip() or between.strip() or after[2].strip()) and bool(after[1])
