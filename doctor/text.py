"""What can be seen in a completion's text without a model."""

import re

GRAM = 5
"""Words in a row that, said again, count as repetition."""
MARK = re.compile(
    r"####[ \t]{0,9}[-+$]{0,2}\d[\d,./]{0,99}[ \t]?[^\W\d]{0,30}[.%]?[ \t]{0,9}(?=\n|<|\Z)"
    r"|\\boxed\s?\{[^{}]{1,200}\}|<answer>[^<>]{1,200}</answer>"
)
"""Behind `####` only a number and its unit count: it is a heading in Markdown, too."""


def repetition(text: str) -> float:
    """Share of 5-grams of words that came before, in [0, 1]; 0 for fewer than 10 words."""
    words = text.split()
    if len(words) < 2 * GRAM:
        return 0.0
    return 1 - len(set(zip(*(words[start:] for start in range(GRAM)), strict=False))) / (len(words) - GRAM + 1)


def tail_after_answer(text: str) -> int:
    """Characters behind the answer mark (`#### 5`, `\\boxed{5}`, `<answer>5</answer>`); 0 without one.

    Marks among thoughts are none: what counts is behind the last `</think>`. Of several, the first one is meant where
    all hold the same number; else the model was still working, and the last one is.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    marks = list(MARK.finditer(text))
    if not marks:
        return 0
    mark = marks[0] if len({digits(found[0]) for found in marks}) == 1 else marks[-1]
    return len(text[mark.end() :].strip())


def digits(mark: str) -> str:
    return "".join(letter for letter in mark if letter.isdigit() or letter in "-./").strip("./")
