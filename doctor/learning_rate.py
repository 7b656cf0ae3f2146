"""A learning rate that is allowed and rarely meant. The rates of both modes lie a factor of ten or more apart."""

from doctor.diagnosis import Finding
from doctor.window import LEAST, Window, mean
from protocol.recipe import Recipe

MOST_FULL = 5e-5
"""Above this, full fine-tuning with AdamW usually forgets more than it learns; TRL and verl start at 1e-6."""
LEAST_LORA = 1e-5
"""Below this adapters hardly move: they want about ten times the rate of full fine-tuning (Schulman et al., 2025)."""
MOST_LORA = 2e-3
"""Above this adapters diverge; Schulman et al. find the best between 1e-4 and 1e-3."""
USUAL_FULL, USUAL_LORA = 1e-6, 1e-4


def learning_rate_advice(recipe: Recipe) -> str | None:
    """One line for the log where `optimizer.learning_rate` is outside the usual range, else None."""
    rate, rank = recipe.optimizer.learning_rate, recipe.lora.rank
    if rank and rate < LEAST_LORA:
        return f"optimizer.learning_rate = {rate:g} is low for adapters (lora.rank = {rank}): usual are 1e-5 to 2e-4"
    if rank and rate > MOST_LORA:
        return f"optimizer.learning_rate = {rate:g} is high for adapters (lora.rank = {rank}): usual are 1e-5 to 2e-4"
    if not rank and rate > MOST_FULL:
        return f"optimizer.learning_rate = {rate:g} is high for full fine-tuning: usual are 1e-7 to 5e-5"
    return None


def unfit(window: Window) -> Finding | None:
    """Said again with what it did, once there are steps to show it."""
    advice = learning_rate_advice(window.recipe)
    if not advice or len(window.steps) <= LEAST:
        return None
    before, now = mean(window.begin, "reward"), window.mean("reward")
    usual = USUAL_LORA if window.recipe.lora.rank else USUAL_FULL
    return Finding(
        evidence=f"{advice}; the reward went from {before:.2f} to {now:.2f}, entropy from "
        f"{mean(window.begin, 'entropy'):.2f} to {window.mean('entropy'):.2f}",
        advice=f"optimizer.learning_rate = {usual:g}: where others start",
        examples=window.newest(lambda seen: True),
    )
