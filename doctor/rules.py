"""All rules by name, the worst disease first, and which disease is only the sign of another."""

from collections.abc import Callable

from doctor import answers, groups, learning_rate, lengths, machines, policy, rewards
from doctor.diagnosis import Finding
from doctor.window import Window

RULES: dict[str, Callable[[Window], Finding | None]] = {
    "not finite": policy.not_finite,
    "learning rate": learning_rate.unfit,
    "reward failures": rewards.failures,
    "no end": lengths.no_end,
    "truncation trap": lengths.truncation,
    "extraction failed": answers.extraction,
    "reward trap": rewards.reward_trap,
    "reward up, accuracy down": answers.accuracy_down,
    "length explosion": lengths.longer,
    "repetition": lengths.repeating,
    "text after the end": lengths.after_the_end,
    "entropy collapse": policy.collapse,
    "dead groups: all wrong": groups.dead_wrong,
    "dead groups: all right": groups.dead_right,
    "loss 0": policy.no_gradient,
    "drift": policy.drift,
    "stale weights": policy.stale,
    "slow sampler": machines.slow_sampler,
    "slow trainer": machines.slow_trainer,
    "rewards constant": rewards.constant,
}

DEAD = {"dead groups: all wrong", "dead groups: all right", "loss 0"}
EXPLAINS: dict[str, set[str]] = {
    "learning rate": {"drift", "repetition"},
    "no end": {"truncation trap", "text after the end", "repetition", *DEAD},
    "truncation trap": DEAD,
    "extraction failed": DEAD,
    "reward trap": DEAD,
    "length explosion": {"truncation trap", *DEAD},
    "repetition": {"truncation trap"},
    "entropy collapse": DEAD,
    "dead groups: all wrong": {"loss 0"},
    "dead groups: all right": {"loss 0"},
    "stale weights": {"drift"},
}
"""A cause and its signs, which are not said beside it."""


def examine(window: Window) -> dict[str, Finding]:
    """What all rules say about a window, causes only, the worst first."""
    found = {name: finding for name, rule in RULES.items() if (finding := rule(window))}
    signs = {sign for cause in found for sign in EXPLAINS.get(cause, ())}
    return {name: finding for name, finding in found.items() if name not in signs}
