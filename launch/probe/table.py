"""A probe as people read it."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from launch.probe.figures import looked_for
from launch.probe.forecast import completions_for_one
from launch.progress import duration
from protocol.cli import CONTROL
from protocol.recipe import Recipe
from sampler.probed import Calls, Probed

LONGEST_PROMPT = 1200
"""Characters that are shown."""

Figures = Mapping[str, float]


def table(recipe: Recipe, probed: Probed, result: Mapping) -> str:
    """result: what `launch.probe.explained` computes of the completions."""
    figures, forecast = result["figures"], result["forecast"]
    rewards = dict(result["rewards"])
    if len(rewards) == 2:
        del rewards["sum"]  # of one function
    parts = [
        [*_head(recipe, probed), "", "measured"],
        _passed(next(iter(result["rewards"])), figures, result["histogram"]),
        _texts(recipe, figures, result["answers"]),
        *(_reward(name, values, probed.rewards.get(name)) for name, values in rewards.items()),
        _speed(probed, figures),
        ["", "foretold, before anything is learned"],
        _sizes(recipe, forecast),
        _step(recipe, probed, forecast, figures),
    ]
    return "\n".join(line.rstrip() for part in parts for line in part).translate(CONTROL)


def row(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _head(recipe: Recipe, probed: Probed) -> list[str]:
    sampling = recipe.sampling
    cut = "..." if len(probed.prompt) > LONGEST_PROMPT else ""
    lengths = "{}, {}, {}".format(*probed.prompt_lengths)
    context = f", model made for {probed.context}" if probed.context else ""
    ends = ", ".join(f"{token} {text!r}" for token, text in probed.ends.items())
    return [
        f"{recipe.name}: {probed.model} on {probed.data}, {probed.device}",
        f"{probed.answered} of {probed.rows} prompts in the order of a run, {sampling.group_size} completions each, "
        f"temperature {sampling.temperature:g}, {duration(probed.seconds)}" + " (stopped)" * probed.stopped,
        "",
        row("first prompt", f"{probed.prompt[:LONGEST_PROMPT]!r}{cut}"),
        row("prompts", f"{lengths} tokens (p50, p95, longest of all rows; at most {recipe.data.max_prompt_tokens})"),
        row("completions", f"at most {sampling.max_tokens} tokens{context}"),
        row("ends", ends or "none: every completion is cut"),
    ]


def _passed(first: str, figures: Figures, histogram: Sequence[int]) -> list[str]:
    interval = "{pass_rate/low:.3f}, {pass_rate/high:.3f}".format_map(figures)
    lines = [
        row("passed", f"{figures['pass_rate']:.3f} [{interval}]  of the completions, {first} > 0"),
        row("prompts", "always {always:.2f}  sometimes {sometimes:.2f}  never {never:.2f}".format_map(figures)),
    ]
    most = max(histogram)
    for low, high in bins(len(histogram) - 1):
        count = sum(histogram[low : high + 1])
        name = f"{low}" if low == high else f"{low}-{high}"
        lines.append(
            f"    {name:>5} of {len(histogram) - 1:<4} {count:5}  {'#' * round(40 * count / max(most, count))}"
        )
    text = "{dead:.2f} [{dead/low:.2f}, {dead/high:.2f}]  all wrong {dead/wrong:.2f}, all right {dead/right:.2f}"
    return [*lines, row("dead groups", text.format_map(figures))]


def bins(size: int) -> list[tuple[int, int]]:
    """0, up to eight equal parts of 1 .. size - 1, size: first and last number of right completions, both included."""
    edges = np.linspace(1, size, min(8, size - 1) + 1).round().astype(int).tolist()
    return [(0, 0), *((low, high - 1) for low, high in itertools.pairwise(edges)), (size, size)]


def _texts(recipe: Recipe, figures: Figures, answers: Figures) -> list[str]:
    hows = looked_for(recipe)
    found = "  ".join(f"{how} {answers[f'answered/{how}']:.2f}" for how in hows)
    lines = [row("answer found", f"{found}  (share of completions with a number, by where it is looked for)")]
    if f"right/{hows[0]}" in answers:
        right = "  ".join(f"{how} {answers[f'right/{how}']:.3f}" for how in hows)
        missed = f"  (by last and not by {hows[0]} {answers['extraction_failures']:.3f})" if hows[0] != "last" else ""
        lines.append(row("answer right", right + missed))
    cut = "{truncated:.2f} [{truncated/low:.2f}, {truncated/high:.2f}]".format_map(figures)
    of_these = "of these {truncated/after:.2f} go on behind an answer, {truncated/repeats:.2f} repeat themselves"
    habits = "{after:.2f} go on behind an answer, {repeats:.2f} repeat themselves, {specials:.2f} hold special tokens"
    lengths = "{length/p50:.0f}, {length/p95:.0f}, {length/p99:.0f}, {length/max:.0f} tokens (p50, p95, p99, longest)"
    return [
        *lines,
        row("cut", f"{cut}  {of_these.format_map(figures)}"),
        row("all texts", habits.format_map(figures)),
        row("lengths", f"{lengths.format_map(figures)}, mean {figures['length/mean']:.1f}"),
    ]


def _reward(name: str, values: Figures, calls: Calls | None) -> list[str]:
    """`sum` is the weighted sum of several."""
    text = "mean {mean:.3f}, std {std:.3f}, differs within {within:.2f} of the groups"
    lines = [row("reward", f"{name}: {text.format_map(values) if values else 'not applicable to any completion'}")]
    if calls:
        middle, worst = np.percentile(calls.seconds, (50, 99)) * 1000
        failed = f"{calls.errors} errors, {calls.timeouts} timeouts, {calls.not_applicable} not applicable"
        lines.append(row("", f"{failed}; {middle:.1f}, {worst:.1f} ms a group (p50, p99)"))
    return lines


def _speed(probed: Probed, figures: Figures) -> list[str]:
    prompts = probed.answered / probed.seconds
    return [row("speed", f"{probed.tokens_per_s:.0f} tokens/s, {prompts:.2f} prompts/s (one engine, alone)")]


def _sizes(recipe: Recipe, forecast: Mapping) -> list[str]:
    """One column a group size, the recipe's in brackets."""
    own, dead = recipe.sampling.group_size, forecast["dead"]
    names = [f"[{size}]" if size == own else f"{size} " for size in dead]
    costs = [completions_for_one(size, share) for size, share in dead.items()]
    good = forecast["group_size"]
    better = f"{good} is the smallest above 2 with fewer than a third" if good else "no size has fewer than a third"
    return [
        row("group size", "".join(f"{name:>8}" for name in names)),
        row("dead groups", "".join(f"{share:7.2f} " for share in dead.values())),
        row("cost", "".join(f"{cost:7.0f} " for cost in costs) + " completions for one group that teaches"),
        row("", f"up to {own} counted over subsets, beyond by a Dirichlet-multinomial; {better}"),
    ]


def _step(recipe: Recipe, probed: Probed, forecast: Mapping, figures: Figures) -> list[str]:
    trainer = recipe.trainer
    refill = f", refill {trainer.refill:g}" if trainer.refill else ""
    needed, limit = forecast["max_tokens"], recipe.sampling.max_tokens
    how = "99 % of the lengths seen" if figures["truncated"] <= 0.01 else "if they go on ending as in the second half"
    length = f"{needed} would cut about 1 % ({how}); now {limit}" if needed else "too few completions end to tell"
    engines = recipe.sampler.gpus // recipe.sampler.tensor_parallel
    return [
        row(
            "a step",
            f"{forecast['useful']:.1f} of {forecast['groups']:.1f} groups teach something "
            f"({trainer.prompts_per_step} prompts a step{refill})",
        ),
        row(
            "sampler",
            f"{forecast['sampler_s']:.1f} s a step: {forecast['tokens']:.0f} tokens at "
            f"{engines} x {probed.tokens_per_s:.0f} tokens/s",
        ),
        row("max_tokens", length),
    ]
