"""An evaluation as people read it."""

from collections.abc import Mapping

from protocol.evaluation import Evaluation, summary

SHARES = ("extraction_failures", "reward", "completions/clipped_ratio", "completions/mean_length")


def table(evaluation: Evaluation, seconds: float, tokens: int, failed: Mapping[int, str]) -> str:
    """One line a figure, shares with their 95 % interval. failed: by row, why it has no result."""
    figures, drawn = summary(evaluation), evaluation.sampling
    samples = f"{drawn.samples} samples" if drawn.samples > 1 else "1 sample"
    rows = [("accuracy", figures["accuracy"], f"[{figures['low']:.3f}, {figures['high']:.3f}]")]
    for how in evaluation.prompts[0].answers:
        if (name := f"accuracy/{how}") in figures:
            rows.append((name, figures[name], f"[{figures[name + '/low']:.3f}, {figures[name + '/high']:.3f}]"))
    rows += [(name, value, "") for name, value in figures.items() if "@" in name or name in SHARES]
    lines = [
        f"{evaluation.snapshot} on {evaluation.data}: {len(evaluation.prompts)} prompts, {samples} each, "
        f"temperature {drawn.temperature:g}, top_p {drawn.top_p:g}, at most {drawn.max_tokens} tokens",
        *(f"{name:<27}{value:8.3f} {interval}".rstrip() for name, value, interval in rows),
        f"{'tokens/s':<27}{tokens / max(1e-9, seconds):8.0f} ({tokens} tokens in {seconds:.1f} s)",
    ]
    if failed:
        why = next(iter(failed.values()))
        lines.append(f"left out: {len(failed)} prompts without a reward, the first one because of {why}")
    return "\n".join(lines)


def versus(before: Evaluation, change: Mapping[str, float]) -> str:
    """Example: against before: +0.540 [0.486, 0.594] (95 % paired bootstrap), 220 prompts won, 4 lost, p = 3e-60"""
    return (
        f"against {before.snapshot}: {change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] "
        f"(95 % paired bootstrap, n={change['n']}), {change['wins']} prompts won, {change['losses']} lost, "
        f"p = {change['p']:.2g} (exact sign test)"
    )
