"""A reward that a random model earns by chance: how many of a completion's characters are vowels."""

import time


def vowels(prompts, completions, scale=1.0, pause_s=0.0, **columns):
    """pause_s: a run of many groups then takes a while, so that something can happen to it before its end."""
    time.sleep(pause_s)
    return [scale * sum(c in "aeiou" for c in completion[0]["content"]) for completion in completions]
