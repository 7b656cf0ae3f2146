"""Out of memory, in one line: what was asked for, what there was, and the settings that make it less."""

import contextlib
import re
from collections.abc import Iterator

import torch

from protocol.errors import OutOfMemory
from protocol.memory import GIB, peak_gb
from protocol.recipe import Recipe

SHORT = re.compile(r"out of memory|can't allocate memory|_ALLOC_FAILED", re.IGNORECASE)
"""What torch, CUDA and its libraries say in RuntimeErrors of other kinds."""


@contextlib.contextmanager
def shortage_explained(recipe: Recipe) -> Iterator[None]:
    """Turns any library's error for a lack of memory into OutOfMemory; all others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not SHORT.search(str(error)):
            raise
        raise OutOfMemory(f"out of memory: {_asked(error)}; {_had()}; {_smaller(recipe)}") from error


def _asked(error: BaseException) -> str:
    """Torch's own first sentences, without advice of its own and the place in its sources."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"(Tried to allocate .*? is free|you tried to allocate \d+ bytes)", text)
    return found[0] if found else text[:300]


def _had() -> str:
    if not torch.cuda.is_available():
        return f"this process had {peak_gb():.1f} GiB at most"
    tensors, taken = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return f"its tensors had {tensors:.1f} GiB at most, torch had taken {taken:.1f} GiB"


def _smaller(recipe: Recipe) -> str:
    """The settings that help, dearest last."""
    trainer = recipe.trainer
    changes = [f"trainer.tokens_per_micro_batch (now {trainer.tokens_per_micro_batch})"]
    changes += [f"trainer.logits_chunk (now {trainer.logits_chunk})"]
    others = [] if trainer.gradient_checkpointing else ["trainer.gradient_checkpointing = true"]
    others += ["trainer.zero_stage = 3"] if trainer.zero_stage < 3 and trainer.gpus > 1 else []
    others += [] if recipe.lora.rank else ["adapters (lora.rank)"]
    return (
        f"lower {' or '.join(changes)}{''.join(f', or use {other}' for other in others)}; beside a sampler on the same "
        "GPU lower sampler.gpu_memory; `python -m launch plan` looks for settings that fit"
    )
