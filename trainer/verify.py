"""Whether a model directory holds the policy of a snapshot, whole and right.

Every tensor is looked at in the files, the directory is loaded as `from_pretrained` loads any model, and what it
computes is compared with the canary that the trainer wrote into the snapshot.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from policy.canary import TOLERANCE, canary_sequences, mean_gap
from policy.logprobs import TokenLogprobs, pack
from policy.model import DTYPES, load_model, load_tokenizer, model_fingerprint
from protocol.errors import UserError, WrongWeights
from protocol.recipe import Recipe
from protocol.snapshot import Canary, Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    size: int
    """Bytes of the weights."""
    tensors: int
    gap: float
    """Mean absolute difference to the trainer's canary log-probs, in nats."""


def verify(directory: Path, manifest: Manifest, recipe: Recipe) -> Verified:
    """Raises WrongWeights where the directory is not the policy that the manifest describes."""
    size, tensors = _inspect(directory, manifest.id, recipe.model.dtype)
    log.info("loading the result from the disk and comparing its log-probs with the trainer's")
    return Verified(size=size, tensors=tensors, gap=_canary_gap(directory, manifest, recipe))


def _inspect(directory: Path, name: str, dtype: str) -> tuple[int, int]:
    """Bytes and number of the tensors in the files. Raises WrongWeights for any that cannot be what was trained."""
    size = count = 0
    for file in sorted(directory.glob("*.safetensors")):
        try:
            tensors = load(file.read_bytes())
        except SafetensorError as error:
            raise WrongWeights(f"{name}: {file.name} cannot be read: {error}") from None
        size += sum(_sound(f"{name}: {key}", tensor, dtype) for key, tensor in tensors.items())
        count += len(tensors)
    return size, count


def _sound(name: str, tensor: Tensor, dtype: str) -> int:
    """Its bytes."""
    if not tensor.numel():
        raise WrongWeights(f"{name} is empty: its parts were not gathered when the snapshot was written (ZeRO 3)")
    if tensor.dtype != DTYPES[dtype]:
        raise WrongWeights(f"{name} is {tensor.dtype}, expected {dtype} as in the recipe")
    if not torch.isfinite(tensor).all():
        raise WrongWeights(f"{name} holds values that are not finite")
    return tensor.nbytes


def _canary_gap(directory: Path, manifest: Manifest, recipe: Recipe) -> float:
    """Raises WrongWeights where the directory is no whole model, or one that computes something else."""
    name, canary = manifest.id, manifest.canary
    if canary is None:
        raise WrongWeights(f"{name} carries no canary log-probs, so nobody can tell whether its export is right")
    try:
        model, tokenizer = load_model(directory, recipe.model.dtype, exact=True), load_tokenizer(directory)
    except UserError as error:
        raise WrongWeights(f"{name} is no whole model: {error}") from None
    if model_fingerprint(directory) != manifest.model or canary_sequences(tokenizer) != canary.tokens:
        raise WrongWeights(f"{name} has another configuration or tokenizer than the policy that was trained")
    gap, tolerance = mean_gap(canary.logprobs, _logprobs(model, canary, recipe)), TOLERANCE[recipe.model.dtype]
    if not gap <= tolerance:
        raise WrongWeights(
            f"the export of {name} computes something else than the trainer did: log-probs of fixed texts differ by "
            f"{gap:.3f} nats on average (at most {tolerance} expected); is model.path still the model that was trained?"
        )
    return gap


@torch.no_grad()
def _logprobs(model: PreTrainedModel, canary: Canary, recipe: Recipe) -> list[list[float]]:
    """[sequences][n - 1], as the trainer computes them for a snapshot."""
    sequences = [np.array(tokens) for tokens in canary.tokens]
    packed = pack([(tokens[:1], [tokens[1:]]) for tokens in sequences])
    logprobs, _ = TokenLogprobs(model.eval(), 1.0, recipe.trainer.logits_chunk)(packed)
    return [part.tolist() for part in logprobs.split([len(tokens) - 1 for tokens in sequences])]
