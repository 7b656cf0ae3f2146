"""This side of the handshake: what sampler and trainer must hold to be the same."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from policy.model import model_fingerprint, tokenizer_fingerprint, vocabulary_size
from protocol.messages import PROTOCOL, Agreement
from protocol.recipe import Recipe
from protocol.resolve import fingerprint


def agree(run_id: str, directory: Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Agreement:
    return Agreement(
        protocol=PROTOCOL,
        run_id=run_id,
        model=model_fingerprint(directory),
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocabulary=vocabulary_size(directory),
        group_size=recipe.sampling.group_size,
        recipe=fingerprint(recipe),
    )
