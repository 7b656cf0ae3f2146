"""What a rule says about a window, and what the doctor says about a run."""

from dataclasses import dataclass, field

from doctor.history import Seen
from protocol.rollout import Rollout

EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one rule says about one window."""

    evidence: str
    advice: str
    examples: list[Seen] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """One disease, from the step where it was first seen to the step where it was last seen."""

    rule: str
    """Its name: `truncation trap`."""
    first: int
    last: int
    """Optimizer steps."""
    evidence: str
    """One sentence with the numbers that made the rule speak, the last time that it spoke."""
    advice: str
    """One sentence that begins with the setting to change: `sampling.max_tokens = 256: ...`."""
    examples: list[Rollout]
    """Up to three completions that show it; empty where no completion can."""
