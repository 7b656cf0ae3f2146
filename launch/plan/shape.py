"""The sizes of a model, from its config.json alone: what memory and disk follow from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from protocol.errors import UserError
from protocol.recipe import Lora, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = ["*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
"""Everything of a hub model but its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of one transformer; widths are numbers of values for one token."""

    parameters: int
    """Tied ones once."""
    tied: bool
    """The output layer is the embedding."""
    layers: int
    hidden: int
    inner: int
    """Of the feed-forward part."""
    heads: int
    """Of queries."""
    query: int
    """All heads together; so is `key`, which keys and values have each."""
    key: int
    vocabulary: int
    context: int
    """Positions."""
    linears: dict[str, tuple[int, int]]
    """Inputs and outputs of each linear layer but the output layer, by its full name."""

    def adapter(self, lora: Lora) -> int:
        """Parameters of the adapters: r * (inputs + outputs) for each layer that gets one (arXiv 2106.09685)."""
        return lora.rank * sum(map(sum, self._targets(lora).values()))

    def largest(self, lora: Lora) -> int:
        """Elements of the largest parameter that is trained."""
        if lora.rank:
            return lora.rank * max((max(size) for size in self._targets(lora).values()), default=0)
        return max(self.vocabulary * self.hidden, *(inputs * outputs for inputs, outputs in self.linears.values()))

    def packed(self) -> int:
        """Parameters that NF4 packs."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    def _targets(self, lora: Lora) -> dict[str, tuple[int, int]]:
        """As peft reads them: a text is `all-linear` or a pattern of full names, a list holds last names."""
        if lora.targets == "all-linear":
            return self.linears
        if isinstance(lora.targets, str):
            return {name: size for name, size in self.linears.items() if re.fullmatch(lora.targets, name)}
        return {name: size for name, size in self.linears.items() if name.rpartition(".")[2] in lora.targets}


def described(model: Model) -> tuple[Path, str]:
    """A directory with config and tokenizer, and where the weights are, in words. Raises UserError.

    Of a hub model that is not here only these small files are fetched.
    """
    path = Path(model.path).expanduser()
    if path.is_dir() or path.suffix == ".gguf" or "/" not in model.path:
        from policy.model import locate

        return locate(replace(model, quantize="none")), "on this machine"
    directory = _from_hub(model)
    here = any(directory.glob("*.safetensors"))
    return directory, "in the hub's cache" if here else "to be fetched from the hub at the first start"


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=DESCRIPTION))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path = {model.path!r} is no directory, no .gguf file, and the hub does not give it: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def shape_of(directory: Path) -> Shape:
    """Built on torch's meta device, which holds no values. Raises UserError for a model that cannot be built so."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return _shape(config, model)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: its config.json cannot be planned with: {str(error).splitlines()[0]}") from None


def _shape(config, model: "PreTrainedModel") -> Shape:
    from torch import nn

    heads, output = config.num_attention_heads, model.get_output_embeddings()
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=model.num_parameters(),
        tied=bool(model.all_tied_weights_keys),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=heads,
        query=heads * width,
        key=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        linears={
            name: (one.in_features, one.out_features)
            for name, one in model.named_modules()
            if isinstance(one, nn.Linear) and one is not output
        },
    )
