"""A reward that costs nothing, is the same every time, and tells nearly any two completions apart."""


def vowels(completions: list[list[dict[str, str]]], **columns: list) -> list[float]:
    """The share of vowels in each text. Called by our sampler and by TRL alike."""
    texts = [completion[0]["content"].lower() for completion in completions]
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in texts]


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.end_to_end")
