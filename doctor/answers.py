"""Right answers: not found by the reward, or no longer given while the reward rises."""

import math

from doctor.diagnosis import Finding
from doctor.history import Seen
from doctor.window import ERRORS, Window, mean
from protocol.recipe import Reward

UNMARKED = 0.1
"""Share of all completions that are right and not paid; who is learning the form leaves out some marks, too."""


def extraction(window: Window) -> Finding | None:
    """The last number is right, and the reward, which looks for a mark, did not see it."""
    if not window.enough:
        return None
    right = [seen for seen in window.train if seen.gold is not None and seen.answers.get("last") == seen.gold]
    reward = window.recipe.reward[0]
    paid = [seen for seen in window.train if seen.first > window.partial]
    missed = [seen for seen in right if seen.first <= window.partial and not marked(seen, reward)]
    looks = reward.function == "gsm8k" or 2 * sum(marked(seen, reward) for seen in paid) >= len(paid)
    if not looks or len(missed) < max(UNMARKED * len(window.train), len(right) / 2):
        return None
    return Finding(
        evidence=f"in {len(missed)} of {len(window.train)} completions the last number is right and earns nothing, "
        f"{len(paid)} are paid: the reward does not find the answer",
        advice="data.prefix: show a worked example with the mark that the reward looks for, or name the mark in "
        "data.system",
        examples=missed[:-4:-1],
    )


def marked(seen: Seen, reward: Reward) -> bool:
    """A mark that the reward looks for holds the right number: of `gsm8k` its option `extractor`, of other functions
    any. One that pays for others looks at something else than marks."""
    if reward.function == "gsm8k":
        own = {str(reward.options.get("extractor", "marks"))}
    else:
        own = set(seen.answers) - {"last"}
    return any(seen.answers.get(how) == seen.gold for how in own)


def accuracy_down(window: Window) -> Finding | None:
    """Held-out accuracy is below its best, outside both 95 % intervals, while the reward in training rose."""
    if len(window.exams) < 2 or not window.steps or not window.grouped:
        return None
    best, now = max(window.exams[:-1], key=lambda exam: exam["accuracy"]), window.exams[-1]
    before, reward = mean(window.begin, "reward"), window.mean("reward")
    noise = ERRORS * window.mean("reward_std") / math.sqrt(max(1, len(window.train)))
    fallen = now["high"] < best["low"] or (now.get("change/high") or 0.0) < 0
    if not fallen or not reward > before + noise:
        return None
    return Finding(
        evidence=f"held-out accuracy fell from {best['accuracy']:.3f} [{best['low']:.3f}, {best['high']:.3f}] at step "
        f"{best['step']} to {now['accuracy']:.3f} [{now['low']:.3f}, {now['high']:.3f}] at step {now['step']}, while "
        f"the reward rose from {before:.2f} to {reward:.2f}",
        advice="reward: something else than the answer is paid; raise the weight of the function that checks it, and "
        f"go on from the weights of step {best['step']} (`best`)",
        examples=[seen for seen in window.held_out if not seen.right][:3],
    )
