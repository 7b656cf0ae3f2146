"""What a step was fed with and what its forward passes showed: numbers for the record.

Names are TRL's where they mean the same. All of the mismatch is raw: measured before anything is truncated or masked.
"""

from collections.abc import Sequence

import numpy as np

from protocol.messages import Group, without_signal
from protocol.snapshot import step_of

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def of_groups(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Rewards, lengths and ages of a step's groups, before it is known which completions are trained."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = np.array([[completion.reward for completion in group.completions] for group in groups])
    lengths = np.array([span.end - span.start for c in completions for span in c.spans], np.float64)
    ages = np.array([step - step_of(span.snapshot) for c in completions for span in c.spans], np.float64)
    totals = np.array([c.spans[-1].end for c in completions], np.float64)
    ended = totals[[c.finish == "stop" for c in completions]]
    figures = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(ddof=min(1, rewards.size - 1)),
        "frac_reward_zero_std": np.mean([without_signal(row) for row in rewards.tolist()]),
        "completions/mean_length": totals.mean(),
        "completions/min_length": totals.min(),
        "completions/max_length": totals.max(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else 0.0,
        "completions/clipped_ratio": 1 - len(ended) / len(totals),
        "staleness/mean": (ages * lengths).sum() / lengths.sum(),
        "staleness/max": ages.max(),
        "completions/tokens": totals.sum(),
    }
    for name in completions[0].rewards:
        values = [value for c in completions if (value := c.rewards.get(name)) is not None]
        figures[f"rewards/{name}/mean"] = np.mean(values) if values else float("nan")
    first = next(iter(completions[0].rewards))
    figures["accuracy"] = np.mean([(c.rewards.get(first) or 0.0) > 0 for c in completions])
    return {name: float(value) for name, value in figures.items()}


def of_tokens(tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """`loss.Figures` [n] of all tokens of a step, fillers included -> means, extremes, quantiles."""
    real = tokens["mask"] > 0
    tokens = {name: values[real].astype(np.float64) for name, values in tokens.items()}
    if not real.any():  # nobody had a signal: nothing was computed
        names = ("loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
        return dict.fromkeys((*names, "correction/masked_fraction", "sampling/sampling_logp_difference/mean"), 0.0)
    figures = {
        "loss": tokens["loss"].sum(),
        "entropy": tokens["entropy"].mean(),
        "clip_ratio/low_mean": tokens["clipped_low"].mean(),
        "clip_ratio/high_mean": tokens["clipped_high"].mean(),
        "clip_ratio/region_mean": tokens["clipped_low"].mean() + tokens["clipped_high"].mean(),
    }
    if "kl" in tokens:
        figures["kl"] = tokens["kl"].mean()
    return {name: float(value) for name, value in (figures | _mismatch(tokens) | _masked(tokens)).items()}


def _mismatch(tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """How far sampler and trainer are apart: per token, and the product over each completion."""
    gap, ratio = np.abs(tokens["log_mismatch"]), np.exp(tokens["log_mismatch"])
    starts = np.flatnonzero(tokens["start"])
    whole = np.exp(np.clip(np.add.reduceat(tokens["log_mismatch"], starts), -20, 20))
    figures = {
        "sampling/sampling_logp_difference/mean": gap.mean(),
        "sampling/sampling_logp_difference/max": gap.max(),
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
    }
    for name, quantile in QUANTILES.items():
        figures[f"sampling/importance_sampling_ratio/{name}"] = np.quantile(ratio, quantile)
        figures[f"sampling/sequence_ratio/{name}"] = np.quantile(whole, quantile)
    return figures


def _masked(tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of tokens that the correction masks: of all, and of quarters of them from short to long completions."""
    masked = 1 - tokens["kept"]
    order = np.argsort(tokens["length"], kind="stable")
    quarters = {
        f"correction/masked_fraction/{name}": part.mean() if len(part) else 0.0
        for name, part in zip(("shortest", "short", "long", "longest"), np.array_split(masked[order], 4), strict=True)
    }
    return {"correction/masked_fraction": masked.mean(), **quarters}
