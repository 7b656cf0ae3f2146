"""What a run writes: bytes of a snapshot, of a checkpoint, and of the whole run with what it keeps."""

from dataclasses import dataclass

from launch.plan.need import BYTES, trained
from launch.plan.shape import Shape
from protocol.memory import GIB
from protocol.recipe import Recipe
from trainer.retention import SPARE

BESIDE_BYTES = 4_000_000
"""Tokenizer and configuration in a full snapshot."""
STREAM_BYTES, TEXT_BYTES, ROLLOUT_BYTES = 12, 5, 700
"""A token in stream/ (id and two log-probs) and in rollouts/, and the rest of a rollout's line (measured)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageNeed:
    """Bytes, at the most."""

    snapshot: float
    checkpoint: float
    snapshots: int
    """That lie there at the same time, with one that is being written and the best; so of checkpoints."""
    checkpoints: int
    record: float
    """stream/ and rollouts/ after the last step."""

    @property
    def whole(self) -> float:
        return self.snapshots * self.snapshot + self.checkpoints * self.checkpoint + self.record

    def words(self) -> str:
        return (
            f"{self.snapshots} snapshots of {gib(self.snapshot)} + {self.checkpoints} checkpoints of "
            f"{gib(self.checkpoint)} + rollouts {gib(self.record)} = {gib(self.whole)} at most"
        )


def storage_need(shape: Shape, recipe: Recipe) -> StorageNeed:
    """A checkpoint holds the trained weights, and of each a float32 copy and two moments; with adapters also a tied
    embedding, which DeepSpeed leaves out under one of its two names only."""
    count, size, trainer = trained(shape, recipe), BYTES[recipe.model.dtype], recipe.trainer
    stowaway = size * shape.vocabulary * shape.hidden if recipe.lora.rank and shape.tied else 0
    completions = trainer.steps * trainer.prompts_per_step * recipe.sampling.group_size
    tokens = STREAM_BYTES * trainer.keep_stream + TEXT_BYTES
    return StorageNeed(
        snapshot=size * count + (0 if recipe.lora.rank else BESIDE_BYTES),
        checkpoint=(size + (8 if trainer.zero_stage == 0 else 12)) * count + stowaway,
        snapshots=trainer.max_staleness + SPARE + 2,
        checkpoints=trainer.keep_checkpoints + 1,
        record=completions * (recipe.sampling.max_tokens * tokens + ROLLOUT_BYTES),
    )


def gib(size: float) -> str:
    """1.25 GiB, or 9.4 MiB."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
