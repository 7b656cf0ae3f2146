"""`math_verify`: whether two expressions are equal, through the library of that name (`pip install '.[math]'`)."""

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from sampler.rewards.builtin import Completion, text_of

FORMULA = ("$", r"\(", r"\[", r"\boxed")
LATEX = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
"""`\\boxed{}` first, else a formula behind words like "the answer is": as TRL's `accuracy_reward` reads completions."""


def math_verify(
    completions: list[Completion],
    answer: list,
    correct: float = 1.0,
    wrong: float = 0.0,
    undecided: float | None = None,
    limit_s: int = 5,
    **columns: list,
) -> list[float | None]:
    """`correct` where the completion's expression equals the gold one, else `wrong`: `\\frac{2}{4}` equals `0.5`.

    None (not applicable) where `answer` holds no expression. limit_s: seconds for each of reading and comparing, by the
    library's SIGALRM, which works because a reward worker calls functions in its main thread. Beyond, the value is
    `undecided`. Unset, raises TimeoutError: the group fails by name, because a slow machine is no wrong answer.
    """
    values: list[float | None] = []
    for completion, column in zip(completions, answer, strict=True):
        text = text_of(completion)
        try:
            equal = _equal(text, str(column), limit_s)
            values.append(None if equal is None else correct if equal else wrong)
        except TimeoutException:
            if undecided is None:
                raise TimeoutError(f"reading or comparing took more than {limit_s} s: {text[-80:]!r}") from None
            values.append(undecided)
    return values


def _equal(text: str, column: str, limit_s: int) -> bool | None:
    """None where the column holds no expression. Raises TimeoutException."""
    expected = parse(_gold(column), parsing_timeout=limit_s, raise_on_error=True)
    if not expected:
        return None
    found = parse(text, LATEX, extraction_mode="first_match", parsing_timeout=limit_s, raise_on_error=True)
    return verify(expected, found, timeout_seconds=limit_s, raise_on_error=True)


def _gold(column: str) -> str:
    """Behind the last `####` (GSM8K). Bare LaTeX becomes a formula, else the library takes only its last number."""
    bare = column.rpartition("####")[2].strip()
    return bare if any(mark in bare for mark in FORMULA) else f"${bare}$"
