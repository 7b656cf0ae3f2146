"""Diseases of the reward functions: paid for less than the answer, always the same, failing."""

import math

from doctor.diagnosis import Finding
from doctor.window import ERRORS, PARTIAL, SOLVED, Window, halves, mean, risen

STUCK = 0.6
"""Share of completions with one and the same partial score."""
RISEN = 0.3
"""Of a function's range: learned, whatever noise a batch has."""
FAILED = 0.02
"""Share of calls of a reward function that end in an error or a timeout, each a group sampled for nothing."""


def reward_trap(window: Window) -> Finding | None:
    return partial_trap(window) or format_trap(window)


def partial_trap(window: Window) -> Finding | None:
    """The reward stays at a score for less than the answer: 0.1 for the form in verl's 1 / 0.1 / 0."""
    if not window.enough:
        return None
    full = window.full_score
    scores = [round(seen.first, 6) for seen in window.train]
    most = max(set(scores), key=scores.count)
    held, more = scores.count(most) / len(scores), sum(score > most for score in scores) / len(scores)
    if not 0 < most <= PARTIAL * full or held < STUCK or more > SOLVED:
        return None
    return Finding(
        evidence=f"{held:.0%} of the completions earn {most:g} of {full:g}, {more:.1%} earn more: the partial score is "
        f"learned, the answer is not{window.loss_note}",
        advice=f"reward: give 0 instead of {most:g} for the form alone, once it is learned; or take problems that the "
        "model can solve now and then",
        examples=window.newest(lambda seen: round(seen.first, 6) == most),
    )


def format_trap(window: Window) -> Finding | None:
    """Another function than the first is learned, and the answers do not follow."""
    if not window.enough or not window.full:
        return None
    before, now = mean(window.begin, "accuracy"), window.mean("accuracy")
    noise = ERRORS * math.sqrt(max(before * (1 - before), 0.01) / len(window.train))
    if now > 0.5 or now > before + noise:
        return None
    pairs = zip(window.reward_names[1:], window.recipe.reward[1:], strict=False)
    learned = [(name, reward.weight) for name, reward in pairs if reward.weight > 0 and is_learned(window, name)]
    if not learned:
        return None
    name, weight = learned[0]
    start, end = mean(window.begin, f"rewards/{name}/mean"), halves(window.steps, f"rewards/{name}/mean")[1]
    return Finding(
        evidence=f"{name} rose from {start:.2f} to {end:.2f}, accuracy went from {before:.2f} to {now:.2f}",
        advice=f"reward: lower the weight of {name} from {weight:g} to {weight / 4:g}: it is learned, and hides "
        "whether an answer is right",
        examples=window.newest(lambda seen: (seen.rewards.get(name) or 0.0) >= end and not seen.right),
    )


def is_learned(window: Window, name: str) -> bool:
    """A function's mean rose by much of its range, and is near its best."""
    start, end = mean(window.begin, f"rewards/{name}/mean"), halves(window.steps, f"rewards/{name}/mean")[1]
    values = [value for seen in window.train if (value := seen.rewards.get(name)) is not None]
    best, worst = max(values, default=end), min([start, *values])
    return end - start >= RISEN * (best - worst) > 0 and best - end <= RISEN * (best - worst)


def constant(window: Window) -> Finding | None:
    """A function that is one of several and says the same about everything since the run began."""
    if not window.enough or not window.full or len(window.recipe.reward) < 2:
        return None
    for name, reward in zip(window.reward_names, window.recipe.reward, strict=False):
        values = {seen.rewards.get(name) for seen in window.train}
        if reward.function == "overlong" or not reward.weight or len(values) > 1:  # overlong: 0 is its best
            continue
        value = values.pop()
        if value is None or math.isclose(mean(window.begin, f"rewards/{name}/mean"), value, abs_tol=1e-6):
            said = "applied to none" if value is None else f"gave {value:g} to each"
            return Finding(
                evidence=f"{name} {said} of {len(window.train)} completions, and to those of the first steps: it "
                "teaches nothing",
                advice=f"reward: see what {name} is given (`python -m launch reward`), or take it out",
                examples=window.train[-1:],
            )
    return None


def failures(window: Window) -> Finding | None:
    """A failed call gives no value: its group is sampled again, and set aside after five times."""
    for name, reward in zip(window.reward_names, window.recipe.reward, strict=False):
        errors, timeouts = (risen(window, f"{name}/{kind}") for kind in ("errors", "timeouts"))
        failed = errors + timeouts
        calls = failed + len(window.train) / window.recipe.sampling.group_size
        if failed < max(2, FAILED * calls):
            continue
        return Finding(
            evidence=f"{name} failed {failed:.0f} times in about {calls:.0f} calls ({errors:.0f} errors, "
            f"{timeouts:.0f} timeouts of {reward.timeout_s:g} s): each time a group is sampled for nothing",
            advice=f"reward.timeout_s = {2 * reward.timeout_s:g}: or make {name} faster"
            if timeouts > errors
            else f"reward: mend {name}; the trainer's log has the reason of each failure",
        )
    return None
