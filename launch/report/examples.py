"""Which completions of many a reader should see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doctor.history import Seen
from protocol.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Example:
    why: str
    """Which of many it is: `best`."""
    seen: Seen
    rollout: Rollout


def choose(seen: Sequence[Seen]) -> list[tuple[str, Seen]]:
    """Two of the best, one in the middle, two of the worst, one that was cut and the newest; none of them twice."""
    ranked = sorted(seen, key=lambda one: one.reward)
    wanted: list[tuple[str, Callable[[], list[Seen]], int]] = [
        ("best", lambda: ranked[::-1], 2),
        ("median", lambda: ranked[len(ranked) // 2 :], 1),
        ("worst", lambda: ranked, 2),
        ("truncated", lambda: [one for one in ranked if one.truncated], 1),
        ("newest", lambda: list(seen)[::-1], 1),
    ]
    chosen: list[tuple[str, Seen]] = []
    for why, candidates, count in wanted:
        taken, rows = {id(one) for _, one in chosen}, {one.row for name, one in chosen if name == why}
        for one in candidates():
            if count and id(one) not in taken and one.row not in rows:
                chosen.append((why, one))
                rows.add(one.row)
                count -= 1
    return chosen
