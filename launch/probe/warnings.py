"""What a probe says against a recipe: what is wrong, with the numbers, and which setting to change."""

from collections.abc import Mapping

from launch.probe.forecast import completions_for_one
from protocol.recipe import Recipe
from sampler.probed import Probed

WARN_CUT, STOP_CUT = 0.2, 0.9
"""Shares of completions that are cut at `max_tokens`: above the first a warning, above the second no run pays."""
MANY, SOME = 0.2, 0.1
"""Shares of completions from which a habit of the model is worth a word."""
FEW_PROMPTS = 20
BUSY = 0.8
"""Share of the reward processes' time."""
WARM = "begin with a warm start (objective.name = 'sft')"

Figures = Mapping[str, float]


def hopeless(recipe: Recipe, figures: Figures, forecast: Mapping) -> str | None:
    """Why a run of this recipe would learn nothing, and what to set; None where nothing says so."""
    if figures["truncated"] <= STOP_CUT:
        return None
    return f"{figures['truncated']:.0%} of the completions are cut before they end. {longer(recipe, figures, forecast)}"


def warnings(recipe: Recipe, probed: Probed, figures: Figures, rewards: Mapping, forecast: Mapping) -> list[str]:
    """In the order in which they should be mended."""
    return [
        *_of_measuring(probed),
        *_of_ends(recipe, probed, figures, forecast),
        *_of_answers(recipe, figures, next(iter(rewards))),
        *_of_signal(recipe, figures, rewards, forecast),
        *_of_rewards(recipe, probed, rewards),
    ]


def longer(recipe: Recipe, figures: Figures, forecast: Mapping) -> str:
    """What to do about completions that are cut."""
    if figures["truncated/repeats"] > 0.5:
        return (
            f"{figures['truncated/repeats']:.0%} of these repeat themselves, which a larger sampling.max_tokens does "
            f"not end: look at the prompt and the end tokens, or {WARM}."
        )
    if figures["truncated/after"] > 0.5:
        return (
            f"{figures['truncated/after']:.0%} of these go on behind a final answer: set sampling.stop or "
            "sampling.stop_after to the text that closes an answer."
        )
    if forecast["max_tokens"]:
        return f"Set sampling.max_tokens = {forecast['max_tokens']}, which would cut about 1 %."
    tried = 4 * recipe.sampling.max_tokens
    return f"Too few end to tell how long they get: set sampling.max_tokens = {tried} and probe again."


def _of_measuring(probed: Probed) -> list[str]:
    found = []
    if probed.answered < FEW_PROMPTS:
        found.append(f"only {probed.answered} prompts were answered: all shares are rough. Use more --seconds.")
    if unfinished := probed.begun - probed.answered - len(probed.failed):
        found.append(
            f"{unfinished} of {probed.begun} prompts were begun and not ended: lengths and truncation look smaller "
            "than they are. Use more --seconds, or a smaller sampler.max_running."
        )
    return found


def _of_ends(recipe: Recipe, probed: Probed, figures: Figures, forecast: Mapping) -> list[str]:
    found, cut = [], figures["truncated"]
    if WARN_CUT < cut <= STOP_CUT:
        found.append(f"{cut:.0%} of the completions are cut before they end. {longer(recipe, figures, forecast)}")
    if probed.closing:
        found.append(
            f"the chat template closes a turn with {probed.closing!r}, which ends no completion. Add its id to "
            "sampling.stop_token_ids."
        )
    elif figures["specials"] > SOME:
        found.append(
            f"{figures['specials']:.0%} of the completions hold special tokens before their last token: the model "
            "makes up turns. Add the token that ends its turn to sampling.stop_token_ids."
        )
    if cut == 1:
        found.append("no completion ended by itself: the end token is another one, or never comes. See `ends` above.")
    if figures["after"] > MANY:
        found.append(
            f"{figures['after']:.0%} of the completions go on behind a final answer. Set sampling.stop_after to the "
            "text that closes an answer (`</answer>`), or let a reward ask for an end."
        )
    if figures["repeats"] > MANY:
        found.append(f"{figures['repeats']:.0%} of the completions repeat themselves. Read some, or {WARM}.")
    return found


def _of_answers(recipe: Recipe, figures: Figures, function: str) -> list[str]:
    first, last = recipe.eval.extractors[0], figures.get("right/last", 0.0)
    if figures["pass_rate"] == 0 and last > 0:
        return [
            f"{function} never gives more than 0, but the last number is right in {last:.1%} of the completions: the "
            f"form of the answer is missing, not the answer. Ask for it in data.system or data.prefix, or {WARM}."
        ]
    if figures.get("extraction_failures", 0.0) > SOME:
        return [
            f"{figures['extraction_failures']:.0%} of the completions hold the right number last, but not where "
            f"{first} looks. Ask for the form of an answer in data.system or data.prefix."
        ]
    return []


def _of_signal(recipe: Recipe, figures: Figures, rewards: Mapping, forecast: Mapping) -> list[str]:
    size, dead = recipe.sampling.group_size, figures["dead"]
    easier = figures["dead/wrong"] >= figures["dead/right"]
    if dead == 1:
        return [f"{_flat(figures, rewards)}: nothing can be learned. {_data(easier)}"]
    if dead <= 0.5:
        return []
    cost = completions_for_one(size, forecast["dead"][size])
    refill = "" if recipe.trainer.refill >= 1 else " Set trainer.refill = 1.0, which puts others in their place."
    return [
        f"{dead:.0%} of the groups teach nothing: {cost:.0f} completions for one that does, and larger groups cost "
        f"more.{refill} {_data(easier)}"
    ]


def _flat(figures: Figures, rewards: Mapping) -> str:
    """No group has a signal: in which way."""
    if figures["never"] == 1:
        what = "all completions are wrong"
    elif figures["always"] == 1:
        what = "all completions are right"
    else:
        what = "no group holds a right and a wrong completion"
    values = rewards["sum"]
    constant = f", and every reward is {values['mean']:g}" if values["std"] == 0 else ""
    return f"{what}{constant}"


def _data(easier: bool) -> str:
    return "Choose easier prompts (data.train), or " + WARM + "." if easier else "Choose harder prompts (data.train)."


def _of_rewards(recipe: Recipe, probed: Probed, rewards: Mapping) -> list[str]:
    found = []
    for name, calls in probed.rewards.items():
        if failed := calls.errors + calls.timeouts:
            why = next(iter(probed.failed.values()), "")
            found.append(f"{name} failed in {failed} of {len(calls.seconds)} calls, first: {why}")
        if rewards[name].get("std") == 0 and len(probed.rewards) > 1:
            found.append(f"{name} gives {rewards[name]['mean']:g} to every completion: it teaches nothing yet.")
    asked = sum(sum(calls.seconds) for calls in probed.rewards.values())
    if (busy := asked / recipe.sampler.reward_workers / probed.seconds) > BUSY:
        found.append(f"the reward processes are busy {busy:.0%} of the time. Raise sampler.reward_workers.")
    return found
