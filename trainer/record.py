"""One record a step in metrics/trainer.jsonl, one at the start, and one line for whoever watches.

Names are TRL's where they mean the same.
"""

import logging
import time

import torch

from protocol.evaluation import Evaluation
from protocol.memory import GIB, peak_gb
from protocol.versions import versions
from trainer import figures
from trainer.batch import Batch
from trainer.checkup import Checkup
from trainer.engine import Policy
from trainer.loss import Figures
from trainer.parts import Source, Spending, Writer
from trainer.ranks import Ranks

log = logging.getLogger(__name__)


class Record:
    """Adds up what the ranks measured; the first rank writes."""

    def __init__(self, writer: Writer, ranks: Ranks, store: Spending, checkup: Checkup | None = None) -> None:
        """checkup: on the first rank of a run with samplers."""
        self._writer, self._ranks, self._store, self._checkup = writer, ranks, store, checkup
        self._seen: list[Figures] = []
        self._since = time.monotonic()
        self._before = {"waited": 0.0, "stored": store.spent_s, "sampled": 0.0}

    def start(self, steps_done: int) -> None:
        """What the first rank runs on, once in the life of a trainer."""
        if self._ranks.first:
            self._writer.write({"kind": "start", "step": steps_done, "versions": versions()})

    def add(self, tokens: Figures) -> None:
        """What one forward pass showed of its tokens. It stays on the GPU until the step ends: nobody waits for it."""
        self._seen.append(tokens)

    def measured(self) -> dict[str, float]:
        """Of all tokens of all ranks since the last time, on the first rank."""
        names = sorted(self._seen[0])
        table = torch.cat([torch.stack([seen[name] for name in names]) for seen in self._seen], dim=1)
        self._seen = []
        return figures.of_tokens(dict(zip(names, self._ranks.gather(table.cpu().numpy()), strict=True)))

    def step(self, policy: Policy, batch: Batch, inbox: Source) -> None:
        """Ends a step: gathers what the ranks have seen and writes the record."""
        measured = self.measured()
        host, allocated, reserved = self._ranks.max([int(peak_gb() * GIB), *policy.device_memory])
        now = time.monotonic()
        spent, self._since = now - self._since, now
        if not self._ranks.first:
            return
        counts = inbox.counts()
        waited = self._difference("waited", inbox.waited_s)
        stored = self._difference("stored", self._store.spent_s)
        sampled = self._difference("sampled", counts["sampler/tokens"])
        record = {
            **batch.figures,
            **measured,
            **counts,
            "grad_norm": policy.grad_norm,
            "learning_rate": policy.learning_rate,
            "records_lost": self._writer.lost,
            "stream_lost": self._store.lost,
            "memory/peak_gb": host / GIB,
            "memory/device_peak_gb": allocated / GIB,
            "memory/device_reserved_gb": reserved / GIB,
            "step_time": spent,
            "time/wait_s": waited,
            "time/publish_s": stored,
            "train/tokens_per_s": batch.figures["train/tokens"] / max(1e-9, spent - waited - stored),
            "sampler/tokens_per_s": max(0.0, sampled) / max(1e-9, spent),
        }
        self._writer.write({"kind": "step", "step": policy.steps_done, "groups": batch.group_ids, **record})
        log.info("%s", line(policy.steps_done, policy.recipe.trainer.steps, record))
        if self._checkup:
            self._checkup.look()

    def skipped(self, policy: Policy, batch: Batch) -> None:
        """A step that was not finite: what was measured is of no use."""
        self._seen = []
        if self._ranks.first:
            self._writer.write({"kind": "skipped", "step": policy.steps_done, "groups": batch.group_ids})
        if self._checkup:
            self._checkup.look()

    def exam(self, result: Evaluation, figures: dict[str, float], change: dict[str, float]) -> None:
        """Held-out accuracy with its 95 % interval, and its change since before training."""
        self._writer.write(
            {"kind": "exam", "step": result.step, "snapshot": result.snapshot, **figures}
            | {f"change/{name}": value for name, value in change.items()}
        )
        since = "  change {difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**change) if change else ""
        log.info(
            "held-out accuracy after %d steps: %.3f [%.3f, %.3f] (n=%d)%s",
            result.step, figures["accuracy"], figures["low"], figures["high"], figures["n"], since,
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
