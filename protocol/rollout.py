"""One completion in `rollouts/*.jsonl`: what a sampler writes, and what doctor, report and watch read."""

from typing import Literal

from msgspec import Struct

from protocol.messages import Split


class Rollout(Struct, frozen=True, kw_only=True):
    """A line without its `time_s`. Fields that older runs lack have defaults."""

    split: Split
    group: int
    row: int
    prompt: list[dict[str, str]] | str
    completion: str
    """Without special tokens and `sampling.stop`."""
    reward: float
    rewards: dict[str, float | None]
    """By function, before weighting; None = not applicable."""
    finish: Literal["stop", "length"]
    tokens: int
    specials: int = 0
    """Special tokens before the last token: ends that did not end it, or turns that the model made up."""
    gold: str | None = None
    """The right number of the row; None where its `answer` holds none."""
    answers: dict[str, str | None] = {}
    """By extractor of `eval.extractors`, the number that the completion gives."""
    snapshots: list[str]
    """Whose weights sampled it, oldest first."""
    seconds: float
    """From the lease to the finished group."""
