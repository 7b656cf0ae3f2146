"""One record a step in metrics/trainer.jsonl, and one line for whoever watches.

Names are TRL's where they mean the same.
"""

import logging
import math
import time
from collections.abc import Sequence

from protocol.intervals import wilson
from protocol.messages import Group
from protocol.metrics import MetricsWriter
from trainer.batch import Batch
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.loss import summarize
from trainer.ranks import Ranks
from trainer.store import Store

log = logging.getLogger(__name__)

MAX_MISMATCH = 0.3
"""Mean |log-prob of the trainer - log-prob of the sampler| in nats; measured: 5e-6 in float32, 0.03 in bfloat16."""


class Record:
    """Adds up what the ranks measured; the first rank writes."""

    def __init__(self, writer: MetricsWriter, ranks: Ranks, store: Store) -> None:
        self._writer, self._ranks, self._store = writer, ranks, store
        self._sums: dict[str, float] = {}
        self._apart = 0
        self._since = time.monotonic()
        self._before = {"waited": 0.0, "stored": store.spent_s, "sampled": 0.0}

    def add(self, sums: dict) -> None:
        """Sums over one micro-batch's tokens, as `loss.grpo` returns them."""
        for name, value in sums.items():
            old = self._sums.get(name, 0.0)
            number = float(value)
            self._sums[name] = max(old, number) if name.startswith("max/") else old + number

    def step(self, policy: Policy, batch: Batch, inbox: Inbox) -> None:
        """Ends a step: combines the ranks' sums and writes the record."""
        measured = summarize(self._ranks.combine(self._sums))
        self._sums = {}
        now = time.monotonic()
        spent, self._since = now - self._since, now
        if not self._ranks.first:
            return
        counts = inbox.counts()
        waited = self._difference("waited", inbox.waited_s)
        stored = self._difference("stored", self._store.spent_s)
        sampled = self._difference("sampled", counts["sampler/tokens"])
        figures = {
            **batch.figures,
            **measured,
            **counts,
            "grad_norm": policy.grad_norm,
            "learning_rate": policy.learning_rate,
            "records_lost": self._writer.lost,
            "step_time": spent,
            "time/wait_s": waited,
            "time/publish_s": stored,
            "train/tokens_per_s": batch.figures["train/tokens"] / max(1e-9, spent - waited - stored),
            "sampler/tokens_per_s": max(0.0, sampled) / max(1e-9, spent),
        }
        self._watch_mismatch(figures["sampling/sampling_logp_difference/mean"])
        self._writer.write({"kind": "step", "step": policy.steps_done, "groups": batch.group_ids, **figures})
        log.info("%s", line(policy.steps_done, policy.recipe.trainer.steps, figures))

    def _watch_mismatch(self, gap: float) -> None:
        """Log-probs that are plausible and wrong: rounding and a few steps of staleness stay far below the limit."""
        self._apart = self._apart + 1 if gap > MAX_MISMATCH else 0
        if self._apart >= 3:
            log.error(
                "sampler and trainer disagree by %.2f nats a token for %d steps (expected: below %.1f): the update is "
                "off-policy; compare the versions on both sides, lower max_staleness or the learning rate",
                gap, self._apart, MAX_MISMATCH,
            )  # fmt: skip

    def skipped(self, policy: Policy, batch: Batch) -> None:
        """A step that was not finite: what was measured is of no use."""
        self._sums = {}
        if self._ranks.first:
            self._writer.write({"kind": "skipped", "step": policy.steps_done, "groups": batch.group_ids})

    def exam(self, policy: Policy, groups: Sequence[Group], inbox: Inbox) -> None:
        """Held-out accuracy with its 95 % interval; its time counts for no step."""
        self._since, self._before["waited"] = time.monotonic(), inbox.waited_s
        if not self._ranks.first or not groups:
            return
        first = next(iter(groups[0].completions[0].rewards))
        completions = [completion for group in groups for completion in group.completions]
        correct = sum((completion.rewards.get(first) or 0.0) > 0 for completion in completions)
        low, high = wilson(correct, len(completions))
        self._before["sampled"] = inbox.counts()["sampler/tokens"]
        record = {"accuracy": correct / len(completions), "low": low, "high": high, "n": len(completions)}
        record["reward"] = math.fsum(completion.reward for completion in completions) / len(completions)
        record["completions/clipped_ratio"] = sum(c.finish == "length" for c in completions) / len(completions)
        self._writer.write({"kind": "exam", "step": policy.steps_done, **record})
        log.info(
            "held-out accuracy after %d steps: %.3f [%.3f, %.3f] (n=%d)",
            policy.steps_done, record["accuracy"], low, high, len(completions),
        )  # fmt: skip

    def _difference(self, name: str, value: float) -> float:
        before, self._before[name] = self._before[name], value
        return value - before


def line(step: int, steps: int, figures: dict[str, float]) -> str:
    """Example: step 12/40  reward 0.34  accuracy 0.34  signal 0.75  length 31  kl 0.002  staleness 0.8  9.1 s ..."""
    kl = f"  kl {figures['kl']:.4f}" if "kl" in figures else ""
    return (
        f"step {step}/{steps}  reward {figures['reward']:.3f}  accuracy {figures['accuracy']:.3f}  "
        f"signal {1 - figures['frac_reward_zero_std']:.2f}  length {figures['completions/mean_length']:.0f}{kl}  "
        f"staleness {figures['staleness/mean']:.2f}  {figures['step_time']:.1f} s "
        f"(waited {figures['time/wait_s']:.1f}, published {figures['time/publish_s']:.1f})  "
        f"tokens/s: sampler {figures['sampler/tokens_per_s']:.0f}, trainer {figures['train/tokens_per_s']:.0f}"
    )
