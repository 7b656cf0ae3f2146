"""Diseases of the reward functions: paid for less than the answer, always the same, failing."""

import math

from doctor.diagnosis import Finding
from doctor.window import ERRORS, SOLVED, Window, accuracy_error, best_value, halves, mean, risen, solved

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
    scores = [round(seen.first, 6) for seen in window.train]
    most = max(set(scores), key=scores.count)
    held, more = scores.count(most) / len(scores), sum(score > most for score in scores) / len(scores)
    unsolved = pays_the_unsolved(window)
    if most <= 0 or not (most <= window.partial or unsolved) or held < STUCK or more > SOLVED:
        return None
    right = f", {window.share(solved):.1%} hold the right number" if unsolved else ""
    return Finding(
        evidence=f"{held:.0%} of the completions earn {most:g}{'' if unsolved else f' of {window.full_score:g}'}, "
        f"{more:.1%} earn more{right}: a score for something else is learned, the answer is not{window.loss_note}",
        advice=f"reward: give 0 instead of {most:g} for what is not the answer, once it is learned; or take problems "
        "that the model can solve now and then",
        examples=window.newest(lambda seen: round(seen.first, 6) == most),
    )


def pays_the_unsolved(window: Window) -> bool:
    """A user's own function, of which nobody says what it gives at best: hardly a completion holds the right number."""
    asked = window.share(lambda seen: seen.gold is not None and bool(seen.answers))
    return best_value(window.recipe.reward[0]) is None and asked > STUCK and window.share(solved) <= SOLVED


def format_trap(window: Window) -> Finding | None:
    """Another function than the first is learned, and the answers do not follow; where one in ten is right, groups
    have enough of a signal to learn the answers next."""
    if not window.enough or not window.full:
        return None
    before, now = mean(window.begin, "accuracy"), window.mean("accuracy")
    earlier, later = halves(window.steps, "accuracy")
    noise = ERRORS * accuracy_error(window)
    if now > SOLVED or now > before + noise or later > earlier + noise:
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
    """A function's mean rose by much of its range, and has been near its best for the whole window."""
    start = mean(window.begin, f"rewards/{name}/mean")
    middle, end = halves(window.steps, f"rewards/{name}/mean")
    values = [value for seen in window.train if (value := seen.rewards.get(name)) is not None]
    best, worst = max(values, default=end), min([start, *values])
    return end - start >= RISEN * (best - worst) > 0 and best - min(middle, end) <= RISEN * (best - worst)


def constant(window: Window) -> Finding | None:
    """A function that is one of several and says the same about everything since the run began."""
    if not window.enough or not window.full or len(window.recipe.reward) < 2:
        return None
    for name, reward in zip(window.reward_names, window.recipe.reward, strict=False):
        values = {seen.rewards.get(name) for seen in window.train}
        if not reward.weight or len(values) > 1:
            continue
        value = values.pop()
        if value is not None and value == best_value(reward):  # all do what it asks for
            continue
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
