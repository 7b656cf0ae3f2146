"""Diseases that lengths and texts show: completions that are cut, do not end, go on, or go round in circles."""

import math
import statistics

from doctor.diagnosis import Finding
from doctor.history import Seen
from doctor.window import ERRORS, LEAST, SOLVED, Window, accuracy_error, halves, mean

CUT = 0.2
"""Share of completions cut at `sampling.max_tokens` above which answers are lost (TRL's issue 6219)."""
NEARLY_ALL = 0.8
"""Cut: so few end that there is nothing to wait for."""
LOST = 4
"""Right answers that are missing among cut completions; fewer may be chance."""
FALLING = 0.9
"""The later half of a window over the earlier: a model that learns to be brief needs no more room."""
ENDLESS = 0.95
"""Share of completions that are cut although most of them had given an answer, or had said an end."""
FINISHED = 0.5
SPECIAL = 0.1
"""Share of completions with special tokens inside; a model that is well rendered has none."""
TAIL = 80
"""Characters behind the answer: more than a closing sentence."""
TALKING = 0.2
LOOP = 0.5
"""Share of a completion's 5-grams that came before; worked solutions have below 0.2."""
LOOPING = 0.1
LONGER = 2.0
"""Mean length over that of the first steps."""
BETTER = 0.02
"""A rise of accuracy, of the whole window, that pays for length; a smaller one beyond its error does, too."""


def unfinished(window: Window) -> tuple[float, float]:
    """Share of completions that were cut, and among them the share that had said an end or an answer before."""
    cut = [seen for seen in window.train if seen.truncated]
    return len(cut) / max(1, len(window.train)), sum(map(went_on, cut)) / max(1, len(cut))


def went_on(seen: Seen) -> bool:
    return seen.specials > 0 or seen.after > 0


def truncation(window: Window) -> Finding | None:
    if not window.enough:
        return None
    share, _ = unfinished(window)
    earlier, later = halves(window.steps, "completions/clipped_ratio")
    lasting = window.full and later > FALLING * earlier
    cut, ended = _right(window, True), _right(window, False)
    missing = (ended - cut) * share * len(window.train)
    lost = (cut < 0.5 * ended and missing >= LOST) or (share >= NEARLY_ALL and cut < SOLVED)
    if share < CUT or not lost or not (lasting or share >= NEARLY_ALL):
        return None
    limit, silent = window.recipe.sampling.max_tokens, window.mean("frac_reward_zero_std")
    return Finding(
        evidence=f"{share:.0%} of the completions are cut at {limit} tokens ({cut:.1%} of them right, "
        f"{ended:.1%} of those that end); {silent:.0%} of the groups have no signal{window.loss_note}",
        advice=f"sampling.max_tokens = {more_tokens(window)}: a cut answer has no answer",
        examples=window.newest(lambda seen: seen.truncated),
    )


def _right(window: Window, truncated: bool) -> float:
    found = [seen.right for seen in window.train if seen.truncated == truncated]
    return sum(found) / max(1, len(found))


def more_tokens(window: Window) -> int:
    """1.5 times the 95th percentile of the lengths seen; twice the limit where most are cut. A multiple of 8."""
    limit = window.recipe.sampling.max_tokens
    lengths = sorted(seen.tokens for seen in window.train)
    p95 = lengths[math.ceil(0.95 * len(lengths)) - 1]
    wanted = 2 * limit if unfinished(window)[0] >= 0.5 else max(limit, 1.5 * p95)
    return 8 * math.ceil(wanted / 8)


def no_end(window: Window) -> Finding | None:
    """Nothing ends, and not for want of room: the answer was there, or the end was said, and the engine went on."""
    share, finished = unfinished(window)
    if not window.enough or share < ENDLESS or finished < FINISHED:
        return None
    special, limit = window.share(lambda seen: seen.specials > 0), window.recipe.sampling.max_tokens
    if special:
        why = f"{special:.0%} say a special token and go on: the token that ends a turn is no end for the sampler"
        advice = "sampling.stop_token_ids: add the token that ends a turn in the chat template; what ends a completion "
        advice += "is in the sampler's log, at its start"
    else:
        why = f"{finished:.0%} of these have given an answer: the model does not end its turn"
        advice = 'sampling.stop_after: name the text that closes an answer, `["</answer>"]` for example'
    return Finding(
        evidence=f"{share:.0%} of the completions go on to the limit of {limit} tokens; {why}",
        advice=advice,
        examples=window.newest(lambda seen: seen.truncated and went_on(seen)),
    )


def after_the_end(window: Window) -> Finding | None:
    if not window.enough:
        return None
    special, talking = window.share(lambda seen: seen.specials > 0), window.share(lambda seen: seen.after > TAIL)
    if special < SPECIAL and talking < TALKING:
        return None
    if special >= SPECIAL:
        what, holds = f"{special:.0%} of the completions hold special tokens", lambda seen: seen.specials > 0
        advice = "sampling.stop_token_ids: add the tokens that the completions go on after"
    else:
        what, holds = f"{talking:.0%} of the completions go on behind their answer", lambda seen: seen.after > TAIL
        advice = 'sampling.stop_after: name what closes an answer, `["</answer>"]` for example'
    tail = statistics.fmean([seen.after for seen in window.train if holds(seen)])
    return Finding(
        evidence=f"{what}, with {tail:.0f} characters behind the answer on average; they are trained like the answer",
        advice=advice,
        examples=window.newest(holds),
    )


def repeating(window: Window) -> Finding | None:
    share = window.share(lambda seen: seen.repetition > LOOP)
    if not window.enough or share < LOOPING:
        return None
    mean_share = statistics.fmean(seen.repetition for seen in window.train)
    if window.recipe.objective.kl_beta:
        advice = 'reward: add the function "repetition", which takes something off for what is said again'
    else:
        advice = (
            "objective.kl_beta = 0.04: holds the model near one that does not repeat itself; or pay less for length"
        )
    return Finding(
        evidence=f"{share:.0%} of the completions repeat most of their 5-word sequences (the mean share is "
        f"{mean_share:.2f}), {unfinished(window)[0]:.0%} are cut",
        advice=advice,
        examples=window.newest(lambda seen: seen.repetition > LOOP),
    )


def longer(window: Window) -> Finding | None:
    """Length doubles, and accuracy does not follow; a model that reasons longer and better is left alone."""
    if not window.enough or len(window.steps) <= LEAST:
        return None
    begin, end = window.begin, window.steps[-LEAST:]
    before, now = (mean(steps, "completions/mean_length") for steps in (begin, end))
    right = mean(begin, "accuracy"), window.mean("accuracy")
    if not now >= LONGER * before or right[1] > right[0] + min(BETTER, ERRORS * accuracy_error(window)):
        return None
    limit = window.recipe.sampling.max_tokens
    return Finding(
        evidence=f"the mean length went from {before:.0f} to {now:.0f} tokens of at most {limit}, accuracy from "
        f"{right[0]:.2f} to {right[1]:.2f}",
        advice=f'reward: add {{ function = "overlong", options = {{ buffer = {max(1, limit // 2)} }} }}, which takes '
        f"something off above {limit - max(1, limit // 2)} tokens; or pay less for length",
        examples=sorted(window.newest(lambda seen: seen.tokens >= now), key=lambda seen: -seen.tokens),
    )
