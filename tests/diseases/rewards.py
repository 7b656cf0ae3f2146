"""Reward functions that lead a model astray, each a plausible first try."""

from sampler.rewards.answers import final_answer, gold


def texts(completions: list) -> list[str]:
    return [completion[-1]["content"] for completion in completions]


def ladder(prompts, completions, answer, **columns):
    """verl's: 1 for the right number behind ####, 0.1 for any number there, else 0."""
    found = [(final_answer(text), gold(row)) for text, row in zip(texts(completions), answer, strict=True)]
    return [1.0 if given == right else 0.0 if given is None else 0.1 for given, right in found]


def marked(prompts, completions, **columns):
    """1 for any number behind ####."""
    return [0.0 if final_answer(text) is None else 1.0 for text in texts(completions)]


def brief(prompts, completions, **columns):
    """1 below 400 characters, which is always."""
    return [1.0 if len(text) < 400 else 0.0 for text in texts(completions)]


def long(completion_ids, max_tokens, **columns):
    """The share of `max_tokens` that is used: "longer reasoning is better"."""
    return [len(ids) / max_tokens for ids in completion_ids]


def short(prompts, completions, **columns):
    """Less for each character: "do not waste tokens"."""
    return [-len(text) / 20 for text in texts(completions)]


def near(prompts, completions, answer, **columns):
    """One over the distance to the right number; at distance 0 more than a float32 holds."""
    values = []
    for text, row in zip(texts(completions), answer, strict=True):
        given = final_answer(text)
        values.append(0.0 if given is None else 1 / max(1e-60, abs(float(given - gold(row)))))
    return values


def careless(prompts, completions, **columns):
    """1 where the first line is an equation that holds; takes for granted that it reads `2 + 3 = 5`."""
    values = []
    for text in texts(completions):
        left, sign, right, _, value = text.splitlines()[0].split(" ")
        values.append(float({"+": int(left) + int(right), "-": int(left) - int(right)}[sign] == int(value)))
    return values
