r"""The final answer in a completion, as an exact number.

Three marks count: `#### N`, `\boxed{N}` and `<answer>N</answer>`. The one that begins last in the
text decides, whatever its kind: a model corrects itself by a later mark, and in
`<answer>\boxed{5}</answer>` the inner one begins last. `####` is also a Markdown heading, so it is
a mark only where a number follows on its line. A deciding mark without a number means no answer;
earlier marks do not step in. Without a mark there is no answer: the last number of free text never
counts, for that would pay for numbers left lying around.

Units and `%` after the number are dropped (50% is 50, as in GSM8K). Left out: exponents (1e3),
mixed numbers (1 1/2), roots, expressions (`x = 5`), number words. Every step is one pass over the
text.

That is what training pays for. Evaluation may look with other eyes too (`EXTRACTORS`): at one kind of
mark, or at the last number of the text, which tells a wrong answer from one that was only not marked.
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from protocol.recipe import Extractor

LONGEST = 200
"""Characters between the marks; more is no number. Bounds the work and the size of the integers."""

HEADING = re.compile(r"####([^\n<#]{1,200})")
BOXED = re.compile(r"\\[{}]|\\boxed[ ]?\{|[{}]")
LATEX = [
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
    (re.compile(r"\\text\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[,!;:() ]|\{,\}|~"), lambda found: "," if found[0] == "{,}" else ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("[\u2212\u2013]"), "-"),
]

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:[$\u20ac\u00a3]\s*(?P<minus>-?))?
    (?: \\frac\{{\s*(?P<over>{DECIMAL})\s*\}}\{{\s*(?P<under>{DECIMAL})\s*\}}
      | (?P<number>{DECIMAL}) (?: \s*/\s*(?P<divisor>{DECIMAL}) )? )
    (?: \s*[A-Za-z%/\u00b0('"][A-Za-z%/\u00b0()'".,\s-]* (?: \^\{{?[23]\}}? )? )?""",
    re.VERBOSE,
)


FREE = re.compile(
    rf"""(?: (?<![0-9A-Za-z_)\]}}])(?P<sign>-) )? (?:[$\u20ac\u00a3](?P<minus>-?))?
    (?: \\frac\{{\s?(?P<over>{DECIMAL})\s?\}}\{{\s?(?P<under>{DECIMAL})\s?\}}
      | (?<![0-9A-Za-z_])(?<![0-9]\.)
        (?P<number>{DIGITS}(?:\.[0-9]+)?|(?<!\.)\.[0-9]+) (?: [ ]?/[ ]?(?P<divisor>{DECIMAL}) )? )""",
    re.VERBOSE,
)
"""A number inside a text. A minus counts where nothing stands before it that could be subtracted from."""
MAX_WRITTEN = 256
"""Characters of `messages.Text`; a number that is longer, as no sane answer is, counts as none."""


def final_answer(text: str) -> Fraction | None:
    """The number in the deciding mark; None without a mark or without a number in it."""
    marks = [mark for mark in (_heading(text), _boxed(text), _tag(text)) if mark]
    return _inside(max(marks, default=None))


def gold(answer: str) -> Fraction | None:
    """The number in an answer column: behind the last `####` (GSM8K), else the whole of it."""
    return number(answer.rpartition("####")[2])


def number(text: str) -> Fraction | None:
    """`-$1,080.50.`, `3/4`, `5 apples`, `50%`, `$5$` as exact numbers; None for anything else."""
    if len(text) > LONGEST:
        return None
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    found = NUMBER.fullmatch(text.strip(" \t\r\n$*_`").rstrip(" .$*_`"))
    return _value(found) if found else None


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in the text, marked or not; None where it divides by zero or is too long."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    found = max(FREE.finditer(text), key=re.Match.start, default=None)
    return _value(found) if found and len(found[0]) <= LONGEST else None


EXTRACTORS: dict[Extractor, Callable[[str], Fraction | None]] = {
    "marks": final_answer,
    "heading": lambda text: _inside(_heading(text)),
    "boxed": lambda text: _inside(_boxed(text)),
    "tag": lambda text: _inside(_tag(text)),
    "last": last_number,
}
"""Ways to find the answer: the mark that begins last; the last `#### N`, `\\boxed{N}` or `<answer>N</answer>`; the
last number of the text, `flexible-extract` of other evaluation programs."""


def extract(text: str, how: Extractor) -> Fraction | None:
    """The number that a completion gives, found in one of the ways above; None where there is none."""
    return EXTRACTORS[how](text)


def extracted(text: str, extractors: Iterable[Extractor]) -> dict[str, str | None]:
    """By extractor, the number as `canonical` writes it: `{"marks": None, "last": "3/4"}`."""
    found = ((how, extract(text, how)) for how in extractors)
    return {how: None if value is None else canonical(value) for how, value in found}


def canonical(value: Fraction) -> str | None:
    """`-18`, `3/4`: equal numbers are equal texts. None for one of more than MAX_WRITTEN characters."""
    written = str(value)
    return written if len(written) <= MAX_WRITTEN else None


def _inside(mark: tuple[int, str] | None) -> Fraction | None:
    return number(mark[1]) if mark else None


def _value(found: re.Match) -> Fraction | None:
    """Of a match of NUMBER or FREE; None for a division by zero."""
    over = _exact(found["over"] or found["number"])
    under = _exact(found["under"] or found["divisor"] or "1")
    if under == 0:
        return None
    negative = (found["sign"] == "-") != (found["minus"] == "-")
    return -over / under if negative else over / under


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _heading(text: str) -> tuple[int, str] | None:
    for found in reversed(list(HEADING.finditer(text))):
        if number(found[1]) is not None:
            return found.start(), found[1]
    return None


def _boxed(text: str) -> tuple[int, str] | None:
    """The closed `\\boxed{` that begins last; a stack of open braces finds its end in one pass."""
    opened: list[tuple[int, int]] = []  # (start of the mark, -1 for a plain brace; start of what is inside)
    start, inside, end = -1, 0, 0
    for found in BOXED.finditer(text):
        if found[0] in (r"\{", r"\}"):
            continue
        if found[0] != "}":
            opened.append((found.start() if found[0] != "{" else -1, found.end()))
        elif opened and (closed := opened.pop())[0] > start:
            (start, inside), end = closed, found.start()
    return (start, text[inside:end]) if start >= 0 else None


def _tag(text: str) -> tuple[int, str] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (start, text[start + len("<answer>") : end]) if start >= 0 else None
