"""Settings that are allowed and rarely meant."""

from protocol.recipe import Recipe

MOST_FULL = 5e-5
"""Above this, full fine-tuning with AdamW usually forgets more than it learns; TRL and verl start at 1e-6."""
LEAST_LORA = 1e-5
"""Below this adapters hardly move: they want about ten times the rate of full fine-tuning (Schulman et al., 2025)."""


def learning_rate_advice(recipe: Recipe) -> str | None:
    """One line for the log where `optimizer.learning_rate` is outside the usual range, else None."""
    rate, rank = recipe.optimizer.learning_rate, recipe.lora.rank
    if rank and rate < LEAST_LORA:
        return f"optimizer.learning_rate = {rate:g} is low for adapters (lora.rank = {rank}): usual are 1e-5 to 2e-4"
    if not rank and rate > MOST_FULL:
        return f"optimizer.learning_rate = {rate:g} is high for full fine-tuning: usual are 1e-7 to 5e-5"
    return None
