"""The batch numbers of a recipe and what follows from them. Imports nothing heavy."""

import math

from protocol.recipe import Recipe


def arithmetic(recipe: Recipe) -> str:
    """The three batch numbers and what follows from them, in one sentence."""
    trainer, sampling = recipe.trainer, recipe.sampling
    completions = trainer.prompts_per_step * sampling.group_size
    return (
        f"each of {trainer.steps} steps trains {trainer.prompts_per_step} prompts x {sampling.group_size} completions "
        f"= {completions} completions of at most {sampling.max_tokens} tokens, packed into rows of "
        f"{trainer.tokens_per_micro_batch} tokens; samplers run at most {trainer.max_staleness} steps ahead"
    )


def step_tokens(recipe: Recipe, prompt: int) -> int:
    """The most that one step can compute, with prompts of so many tokens: each prompt once for its completions."""
    group = prompt + recipe.sampling.group_size * recipe.sampling.max_tokens
    return recipe.trainer.prompts_per_step * group


def row_tokens(recipe: Recipe, prompt: int) -> int:
    """The most in one forward pass. A single completion that is longer than the budget gets a row of its own."""
    share = math.ceil(step_tokens(recipe, prompt) / recipe.trainer.gpus)
    whole = prompt + recipe.sampling.max_tokens
    return max(whole, min(recipe.trainer.tokens_per_micro_batch, share))


def micro_batches(recipe: Recipe, prompt: int) -> int:
    """The most that one rank computes in a step."""
    return math.ceil(step_tokens(recipe, prompt) / recipe.trainer.gpus / row_tokens(recipe, prompt))


def consequences(recipe: Recipe, prompt: int, rows: int) -> str:
    """What follows from the batch numbers for prompts of `prompt` tokens, `rows` of them in the data set."""
    tokens, ranks = step_tokens(recipe, prompt), recipe.trainer.gpus
    epochs = recipe.trainer.steps * recipe.trainer.prompts_per_step / rows
    return (
        f"that is at most {tokens} tokens a step, {ranks} ranks x {micro_batches(recipe, prompt)} micro-batches of "
        f"{row_tokens(recipe, prompt)} tokens; {rows} prompts last {rows / recipe.trainer.prompts_per_step:.0f} steps, "
        f"so the run sees each {epochs:.2g} times"
    )
