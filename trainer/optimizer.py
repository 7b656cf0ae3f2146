"""What updates the weights: AdamW, its learning rate over the steps, and what DeepSpeed is told about it."""

import math

import torch

from protocol.recipe import Optimizer, Recipe
from trainer.zero import zero_settings


def learning_rate_factor(step: int, optimizer: Optimizer, steps: int) -> float:
    """The share of the learning rate that update number `step` (from 0) uses."""
    if step < optimizer.warmup_steps:
        return (step + 1) / (optimizer.warmup_steps + 1)
    done = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optimizer.schedule]


def schedule(torch_optimizer: torch.optim.Optimizer, optimizer: Optimizer, steps: int):
    return torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: learning_rate_factor(step, optimizer, steps))


def adamw(parameters: list[torch.nn.Parameter], optimizer: Optimizer, device: torch.device) -> torch.optim.AdamW:
    """torch's, which needs no compiler. Decay for matrices only: norms and biases are no weights to shrink.

    device: where the weights will be. On a CPU one pass over them, without temporary copies.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
        fused=device.type == "cpu" or None,
    )


def engine_settings(recipe: Recipe, backend: str, trained: list[int]) -> dict:
    """DeepSpeed's. trained: elements of each parameter that is.

    They follow from measurements: ZeRO 1 with float32 gradient accumulation and communication is exact in bf16;
    `gradient_accumulation_steps` stays 1, because the number of micro-batches changes with every step.
    """
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_settings(recipe, backend, sum(trained), max(trained)),
        "communication_data_type": "fp32",
    }
    if recipe.model.dtype == "bfloat16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings
