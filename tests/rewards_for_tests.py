"""A reward that a random model earns by chance: how many of a completion's characters are vowels."""


def vowels(prompts, completions, scale=1.0, **columns):
    return [scale * sum(c in "aeiou" for c in completion[0]["content"]) for completion in completions]
