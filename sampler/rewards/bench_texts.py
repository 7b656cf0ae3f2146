r"""What a reward function is tried on: right answers in the usual forms, wrong ones, texts that hold no answer,
guesses, and texts that break careless code.

Every text has a name that says what it is: `gold/heading`, `wrong/heading/one more`, `empty/nothing`.
"""

import re

from sampler.prompts import Prompt, filled
from sampler.rewards.answers import EXTRACTORS, canonical, extract, number

Frame = tuple[str, str]
"""What stands before an answer, and behind it."""
FORMS: dict[str, Frame] = {
    "heading": ("#### ", ""),
    "boxed": (r"The answer is \boxed{", "}."),
    "tag": ("<think>Let me think.</think><answer>", "</answer>"),
    "plain": ("", ""),
    "sentence": ("The answer is ", "."),
}
"""How a model may write its answer. Besides there are `own`, the row's own text, and `demonstration`."""
WORKING = "First I take 3 of the 10, which leaves 7. Then I add 12 to the 7 and get 19."
EXAMPLE = re.compile(r"(?:<think>[^<]*</think>\s*)?<answer>[^<]*</answer>|\\boxed\{[^{}]*\}|#### \S+")
LONGEST_GOLD = 200
"""Characters; a longer column without a mark is a solution, no answer."""
AROUND = 50
"""How far below and above the right number a guess goes that names them all."""
LONG = 100_000
"""Characters of the texts that find code which is not linear."""


def final(answer: object) -> str | None:
    r"""The answer alone, as the column writes it: behind the last `####`, else the number in `\boxed{}`, else all of it
    where that is short. None where there is none."""
    text = str(answer if answer is not None else "")
    behind = text.rpartition("####")[2].strip()
    boxed = extract(text, "boxed") if "####" not in text else None
    if boxed is not None:
        return canonical(boxed)
    return behind if 0 < len(behind) <= LONGEST_GOLD else None


def golds(prompt: Prompt, demonstration: str) -> dict[str, str]:
    """The right answer in every form: `gold/heading`, ..., `gold/own`, `gold/demonstration`."""
    own = prompt.columns.get("answer")
    answer = final(own)
    texts = {} if answer is None else {f"gold/{form}": framed(frame, answer) for form, frame in FORMS.items()}
    if isinstance(own, str) and own.strip() not in ("", answer):
        texts["gold/own"] = own
    if demonstration:
        texts["gold/demonstration"] = filled(demonstration, prompt.columns, "a row", "data.demonstration")
    return texts


def frames(texts: dict[str, str], answer: str, forms: list[str]) -> dict[str, Frame]:
    """Of these forms; `own` and `demonstration` are what stands around the last place of the answer in their texts."""
    found = {form: FORMS[form] for form in forms if form in FORMS}
    for form in forms:
        before, place, behind = texts.get(f"gold/{form}", "").rpartition(answer)
        if form not in FORMS and place:
            found[form] = before, behind
    return found


def framed(frame: Frame, answer: str | None) -> str:
    return f"{frame[0]}{answer}{frame[1]}"


def workings(answer: str, frames: dict[str, Frame]) -> dict[str, str]:
    """The right answer behind a sentence with other numbers."""
    texts = {}
    for form in [form for form in frames if form in FORMS]:
        whole = framed(FORMS[form], answer)
        inside = whole.replace("Let me think.", WORKING)
        texts[f"working/{form}"] = inside if inside != whole else f"{WORKING}\n{whole}"
    return texts


def wrongs(answer: str, other: str | None, frames: dict[str, Frame]) -> dict[str, str]:
    """Wrong answers in these forms. other: the answer of another row."""
    changed = corrupted(answer, other)
    return {
        f"wrong/{form}/{name}": framed(frame, text) for form, frame in frames.items() for name, text in changed.items()
    }


def corrupted(answer: str, other: str | None) -> dict[str, str]:
    """`{"one more": "19", "a digit more": "180", "digits swapped": "81", "another row's": "7"}` for 18."""
    value = number(answer)
    found = {"another row's": other}
    if value is not None:
        found["one more"] = canonical(value + 1)
    if value is not None and value.denominator == 1:
        found |= {"a digit more": f"{value}0", "digits swapped": swapped(str(value))}
    return {name: text for name, text in found.items() if text and not same(text, answer)}


def swapped(digits: str) -> str | None:
    """`18` -> `81`: the first two neighbours that differ; None where all are equal."""
    pair = re.search(r"(\d)(?!\1)(\d)", digits)
    return None if pair is None else digits[: pair.start()] + pair[2] + pair[1] + digits[pair.end() :]


def same(text: str, answer: str) -> bool:
    return text == answer or (number(text) is not None and number(text) == number(answer))


def without_answer(prompt: Prompt, answer: str | None) -> dict[str, str]:
    """Texts that deserve nothing: parts of the prompt, its examples, nothing at all.

    Left out are those that happen to give the row's own answer.
    """
    messages = [{"role": "user", "content": prompt.messages}] if isinstance(prompt.messages, str) else prompt.messages
    said = {message["role"]: message["content"] for message in messages}
    texts = {
        "prompt/question": messages[-1]["content"],
        "prompt/all of it": "\n".join(message["content"] for message in messages),
        "empty/nothing": "",
        "empty/white space": " \n\n ",
    }
    if "assistant" in said:
        texts["example/worked example"] = said["assistant"]
    if examples := EXAMPLE.findall(said.get("system", "")):
        texts["example/of the system prompt"] = examples[-1]
    right = None if answer is None else number(answer)
    return {
        name: text
        for name, text in texts.items()
        if right is None or all(extract(text, how) != right for how in EXTRACTORS)
    }


def guesses(answer: str, frame: Frame) -> dict[str, str]:
    """Several answers of which one is right; none for an answer that is no number."""
    value = number(answer)
    if value is None:
        return {}
    right, wrong = framed(frame, answer), framed(frame, canonical(value + 1))
    around = [canonical(value + step) for step in range(-AROUND, AROUND + 1)]
    return {
        "guess/right first": f"{right}\n{wrong}",
        "guess/right last": f"{wrong}\n{right}",
        "guess/every number": "\n".join(framed(frame, text) for text in around),
        "guess/every number in free text": " ".join(f"Maybe {text}." for text in around),
    }


def hostile(answer: str, frame: Frame) -> dict[str, str]:
    """Texts that hold no right answer (`hostile/`), and those that do (`holds gold/`) and must not beat it."""
    right = framed(frame, answer)
    return {f"hostile/{name}": text for name, text in HOSTILE.items()} | {
        "holds gold/nested tags": f"<answer><answer>{answer}</answer></answer>",
        "holds gold/control characters": f"\0\a\x1b[31m {right} \x1b[0m\x7f\x9b",
        "holds gold/unicode digits": framed(frame, answer.translate(FULLWIDTH)),
        "holds gold/a thousand times": f"{right}\n" * 1000,
        "holds gold/in free text": f"Whether it is {answer}, nobody can say.",
    }


FULLWIDTH = {ord("0") + digit: 0xFF10 + digit for digit in range(10)}
HOSTILE = {
    "10 kB of LaTeX": r"\frac{\sqrt{x}}{\left(1" * 400 + "}" * 400,
    "many spaces": " " * LONG,
    "many backslashes": "\\" * LONG,
    "many digits": "9" * LONG,
    "many letters": "a" * LONG,
    "many words": "a b" * (LONG // 3),
    "many line ends": "\n" * LONG,
    "many open tags": "<answer>" * (LONG // 8),
    "many open thoughts": "<think>" * (LONG // 7),
    "many open braces": r"\boxed{" * (LONG // 7),
    "many marks": "#### " * (LONG // 5),
    "a tag that does not end": "<think>x</think><answer>" + " " * LONG,
    "parentheses": "(" * 5000 + ")" * 5000,
    "a repeated letter, then another sign": "a" * 40 + "!",
    "repeated digits, then another sign": "#### " + "1" * 40 + "!",
    "a huge integer": "#### " + "9" * 5000,
    "a huge boxed integer": r"\boxed{" + "9" * 5000 + "}",
    "a huge tagged integer": "<answer>" + "9" * 5000 + "</answer>",
    "a tower of powers": r"<answer>9**9**9**9</answer> \boxed{9^{9^{9^9}}} #### 9**9**9**9",
    "nan": r"<answer>nan</answer> \boxed{nan} #### nan",
    "only nan": "nan",
    "infinity": r"<answer>inf</answer> \boxed{\infty} #### 1e999",
    "a division by zero": r"<answer>1/0</answer> \boxed{\frac{1}{0}} #### 1/0",
    "empty marks": r"<think></think><answer></answer> \boxed{} ####",
    "empty tags": "<answer></answer>",
    "closed before opened": "</answer></think><answer><think>",
    "other scripts": "#### \u0664\u0662 \u202e\U0001f642 \u00bd \u00b2 \u4e09\u5341",
    "code": "<answer>__import__('os').getcwd()</answer> {0.__class__} %s%n ${HOME}",
}
