"""What a rule says about a run."""

from dataclasses import dataclass

from protocol.rollout import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """One disease, from the step where it was first seen to the step where it was last seen."""

    rule: str
    """Its name: `truncation trap`."""
    first: int
    last: int
    """Optimizer steps."""
    evidence: str
    """One sentence with the numbers that made the rule speak."""
    advice: str
    """One sentence that begins with the setting to change: `sampling.max_tokens = 256: ...`."""
    examples: list[Rollout]
    """Up to three completions that show it; empty where no completion can."""
