"""What DeepSpeed's ZeRO is told, and what the ranks then send each other. Pure: `launch plan` counts with it.

Over gloo all stages work on GPUs: 0, 1 and 2 use broadcast, all-reduce and all-gather, which gloo has for CUDA tensors,
and 3 does with the setting below (tests/test_backend.py traces the calls).
"""

from protocol.recipe import Recipe

BUCKET = 50_000_000
"""Gradients that are exchanged at a time, at most: 200 MB in float32, which is enough for full speed. DeepSpeed's own
500 million take 1 to 2 GB of each GPU, whatever the model's size."""
PARTS = 10
"""Buckets that a smaller model's gradients take."""


def bucket(recipe: Recipe, backend: str, trained: int, largest: int) -> int:
    """Elements of a rank's buffer for gradients. trained: parameters that are; largest: elements of the largest.

    A larger gradient goes by itself. Over gloo ZeRO 3 would then call reduce-scatter, so there all have room.
    """
    usual = max(1, min(BUCKET, trained // PARTS))
    return max(usual, largest) if recipe.trainer.zero_stage == 3 and backend == "gloo" else usual


def zero_settings(recipe: Recipe, backend: str, trained: int, largest: int) -> dict[str, object]:
    """DeepSpeed's `zero_optimization`."""
    return {
        "stage": recipe.trainer.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket(recipe, backend, trained, largest),
        # Under ZeRO 3 only norms and biases stay whole on every rank.
        "stage3_param_persistence_threshold": 10_000,
        # Of CUDA tensors gloo makes it from an all-reduce and a copy; older ones do it wrong without a word.
        "reduce_scatter": not (backend == "gloo" and recipe.trainer.zero_stage == 3),
    }


def exchanged(recipe: Recipe, trained: int, parameters: int, micro_batches: int) -> float:
    """Bytes that each rank sends in one step, and as many it receives, where the ranks form a ring.

    Of B bytes an all-reduce sends 2 (W - 1) / W * B, an all-gather half of it (arXiv 1910.02054, section 7). Gradients
    go in float32, under ZeRO 2 and 3 after each micro-batch; weights in the model's dtype. ZeRO 3 gathers all weights,
    trained or not, twice for each micro-batch, and twice more for the step and the snapshot.
    """
    trainer, world = recipe.trainer, recipe.trainer.gpus
    size = 2 if recipe.model.dtype == "bfloat16" else 4
    reduced = 4 * trained * (micro_batches if trainer.zero_stage >= 2 else 1)
    gathered = size * {0: 0, 1: trained, 2: trained, 3: 2 * (micro_batches + 1) * parameters}[trainer.zero_stage]
    return (2 * reduced + gathered) * (world - 1) / world
