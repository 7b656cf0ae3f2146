"""Diseases of the update: nothing to learn from, nothing left to explore, weights that the samples do not come from."""

import math

from doctor.diagnosis import Finding
from doctor.window import LEAST, Window, mean, risen

COLLAPSED, FALLEN = 0.05, 0.2
"""Nats a token, and share of the entropy of the first steps: the next token is certain, all completions are alike."""
GAP = 0.15
"""Mean |log-prob of the trainer - of the sampler| in nats; measured: 5e-6 in float32, 0.03 to 0.1 in bfloat16."""
TAILS = 4.0
"""The ratio's 1 % quantile is below 1 / 4, or its 99 % quantile above 4."""
MASKED = 0.2
"""Share of tokens that the correction takes out of the loss."""
HUGE = 1e4
"""A reward of this size is an error of the function, not a score."""
OLD = 3.0
"""Mean optimizer steps between the weights that sampled a token and those that it trains."""
UNREAD = 3
"""Snapshots that samplers could not read within a window; one may be a slow disk, and the next one is read."""


def no_gradient(window: Window) -> Finding | None:
    """The gradient is exactly 0 for steps on end; a loss near 0 alone is normal."""
    steps = window.steps[-LEAST:]
    if len(steps) < LEAST or any(step.get("grad_norm") != 0 or step.get("loss") != 0 for step in steps):
        return None
    why, advice = _why_no_gradient(window, steps)
    return Finding(
        evidence=f"loss and gradient norm are exactly 0 for {len(steps)} steps: {why}",
        advice=advice,
        examples=window.newest(lambda seen: True),
    )


def _why_no_gradient(window: Window, steps: list[dict]) -> tuple[str, str]:
    """The reason, and what to change."""
    masked, clipped = mean(steps, "correction/masked_fraction"), mean(steps, "clip_ratio/region_mean")
    if window.recipe.objective.mask_truncated and mean(steps, "completions/clipped_ratio") == 1:
        why = "all completions are cut, and objective.mask_truncated leaves cut ones out"
        return why, f"sampling.max_tokens = {2 * window.recipe.sampling.max_tokens}: so that some end"
    if window.grouped and mean(steps, "frac_reward_zero_std") == 1:
        advice = "trainer.refill = 1: puts other prompts in the place of groups without signal"
        return "the rewards are equal within every group", advice
    if masked == 1 or clipped == 1:
        why = f"the correction masks {masked:.0%} of the tokens, clipping holds {clipped:.0%}"
        return why, 'objective.correction = "token_truncate": bounds the weight instead of masking'
    return (
        "groups have a signal, and all advantages are 0",
        "objective.advantage: look at the function, or leave it out",
    )


def collapse(window: Window) -> Finding | None:
    before, now = (mean(steps, "entropy") for steps in (trained(window.begin), trained(window.steps)[-LEAST:]))
    if not window.enough or not now < min(COLLAPSED, FALLEN * before):
        return None
    objective, rate = window.recipe.objective, window.recipe.optimizer.learning_rate
    if objective.entropy_bonus:
        advice = f"optimizer.learning_rate = {rate / 4:g}: fewer steps into what is paid already"
    else:
        advice = "objective.entropy_bonus = 0.001: pays for keeping other continuations possible"
    same = window.mean("frac_reward_zero_std")
    return Finding(
        evidence=f"the entropy fell from {before:.2f} to {now:.3f} nats a token: the completions of a prompt are all "
        f"alike, {same:.0%} of the groups have no signal{window.loss_note}",
        advice=advice,
        examples=window.newest(lambda seen: True),
    )


def trained(steps: list[dict]) -> list[dict]:
    """Those that computed anything; without a signal there are no tokens to measure an entropy of."""
    return [step for step in steps if step.get("train/tokens")]


def drift(window: Window) -> Finding | None:
    """Sampler and trainer give the same tokens other log-probs than rounding and a step of staleness explain."""
    if len(window.steps) < LEAST or not window.grouped:
        return None
    steps, ratio = trained(window.steps), "sampling/importance_sampling_ratio"
    gap, masked = mean(steps, "sampling/sampling_logp_difference/mean"), mean(steps, "correction/masked_fraction")
    low, high = mean(steps, f"{ratio}/p01"), mean(steps, f"{ratio}/p99")
    if not (gap > GAP or low < 1 / TAILS or high > TAILS or masked > MASKED):
        return None
    return Finding(
        evidence=f"sampler and trainer differ by {gap:.2f} nats a token (rounding explains 0.1), the ratio of 98 % of "
        f"the tokens is between {low:.2g} and {high:.2g}, {masked:.0%} are masked",
        advice=_nearer(window),
        examples=[],
    )


def _nearer(window: Window) -> str:
    sampling, trainer, rate = window.recipe.sampling, window.recipe.trainer, window.recipe.optimizer.learning_rate
    for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        if getattr(sampling, name) != neutral:
            return (
                f"sampling.{name} = {neutral:g}: it makes the policy that samples another than the one that is trained"
            )
    if window.mean("staleness/mean") > 1 and trainer.max_staleness > 1:
        return "trainer.max_staleness = 1: younger weights are nearer"
    if window.mean("staleness/mean") > 0.5:
        return f"optimizer.learning_rate = {rate / 4:g}: smaller steps keep the weights that sample near"
    return 'model.dtype = "float32": with fresh weights on both sides only arithmetic can differ; else compare versions'


def stale(window: Window) -> Finding | None:
    if len(window.steps) < LEAST or not window.grouped:
        return None
    age, unread = window.mean("staleness/mean"), risen(window, "snapshots_unreadable")
    if not age >= OLD and unread < UNREAD:
        return None
    if unread >= UNREAD:
        return Finding(
            evidence=f"samplers could not read {unread:.0f} snapshots and went on with old weights, on average "
            f"{age:.1f} steps old",
            advice="network: look at the samplers' logs and at the disk that they share with the trainer",
        )
    limit = window.recipe.trainer.max_staleness
    return Finding(
        evidence=f"tokens are trained {age:.1f} steps after the weights that sampled them (at most {limit}), "
        f"{window.mean('clip_ratio/region_mean'):.1%} of them are clipped",
        advice=f"trainer.max_staleness = {max(1, math.floor(OLD / 2))}: samplers then run less far ahead",
    )


def not_finite(window: Window) -> Finding | None:
    if not window.skipped:
        return None
    huge = sorted((seen for seen in window.train if abs(seen.reward) > HUGE), key=lambda seen: -abs(seen.reward))
    if huge:
        advice = f"reward: bound it, {huge[0].reward:.2g} is more than a gradient can take"
    else:
        advice = (
            f"optimizer.learning_rate = {window.recipe.optimizer.learning_rate / 4:g}: steps that large may overflow"
        )
    return Finding(
        evidence=f"{len(window.skipped)} of {len(window.skipped) + len(window.steps)} steps were skipped: loss or "
        f"gradient was not finite, the last after step {window.skipped[-1]['step']}; see quarantine/",
        advice=advice,
        examples=huge[:3],
    )
