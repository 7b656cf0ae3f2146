"""Models and tokenizers, found and loaded alike on both sides.

A model is named by a hub id, a directory, a .gguf file or the name of an embedded one; `locate` turns any of them
into a local Hugging Face directory. Code that a model repository carries is never run.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policy.embedded import cache, embedded, from_gguf, made_once, stamp
from policy.nf4 import keep_differentiable, packing, round_weights
from protocol.errors import UserError
from protocol.recipe import Lora, Model

if TYPE_CHECKING:
    from peft import LoraConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings that change logits after the head; log-probs that ignored them would be silently wrong."""
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
"""Keys of config.json that differ between copies of one model."""


def locate(model: Model) -> Path:
    """The local directory of a model, fetched, converted or rounded on first use. Raises UserError."""
    directory = _locate(model)
    if model.quantize == "none":
        return directory
    key = stamp(sorted(directory.glob("*.safetensors")))
    name = f"{directory.name}-{model.quantize}-{model.dtype}-{key}"
    return made_once(cache() / name, lambda aside: _write_rounded(directory, aside, model.dtype))


def _write_rounded(source: Path, target: Path, dtype: str) -> None:
    model = load_model(source, dtype)
    round_weights(model)
    model.save_pretrained(target)
    copy_model_files(source, target, dtype)


def _locate(model: Model) -> Path:
    known = embedded(model.path)
    if known:
        return known
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.path = {model.path!r}: no such file")
        return from_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.path = {model.path!r} has no config.json; expected a Hugging Face model directory")
        return path
    return _from_hub(model)


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path = {model.path!r} is no directory, no .gguf file, and the hub does not give it: {reason}"
        ) from None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {directory} has no chat template; use an instruction-tuned model")
    return tokenizer


def load_model(directory: Path, dtype: str, exact: bool = False, quantize: str = "none") -> PreTrainedModel:
    """The causal language model on the CPU. Raises UserError for one whose log-probs would come out wrong.

    That is also one that transformers would complete with random weights. exact: nor may the files hold anything that
    the model does not have. quantize: "nf4" packs the linear weights into four bits, on the GPU where there is one.
    """
    config = AutoConfig.from_pretrained(directory)
    strange = [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, 1, 1.0)]
    layers = {*(getattr(config, "layer_types", None) or [])}
    strange += layers - {"full_attention"}
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    strange += ["sliding_window"] if windowed and not layers else []
    if strange:
        raise UserError(f"{directory}: models with {', '.join(strange)} are not supported")
    try:
        # transformers' annotation does not know that output_loading_info makes it a pair.
        model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            directory,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",  # takes our own mask of who sees whom; others take other kinds of masks
            quantization_config=packing(DTYPES[dtype]) if quantize == "nf4" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in `found`, like all that was not loaded
        )
    except ImportError:
        raise UserError(
            "model.quantize needs bitsandbytes in the trainer's environment; pip install bitsandbytes"
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory} cannot be read: {str(error).splitlines()[0]}; copy or download it again"
        ) from None
    _refuse_if_not_whole(directory, model, found, exact)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{directory}: models whose output layer has a bias are not supported")
    model.config.use_cache = False
    keep_differentiable(model)
    return model


def _refuse_if_not_whole(directory: Path, model: PreTrainedModel, found: dict, exact: bool) -> None:
    """found: transformers' loading info, names by kind."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    problems = {
        "lacks": found["missing_keys"],
        "has the wrong shape of": {name for name, *_ in found["mismatched_keys"]},
        "has, against its config.json, other values for the tied": set(tied) - set(model.all_tied_weights_keys),
        "has the unknown": found["unexpected_keys"] if exact else set(),
    }
    for what, names in problems.items():
        if names:
            some = ", ".join(sorted(names)[:3])
            raise UserError(f"{directory} {what} {some} ({len(names)} tensors in all); copy or download it again")


def adapted(directory: Path, lora: Lora) -> list[str]:
    """Last names of the layers that adapters go into: for `all-linear` every linear layer but the output layer."""
    if lora.targets != "all-linear":
        return [lora.targets] if isinstance(lora.targets, str) else lora.targets
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    output = model.get_output_embeddings()
    layers = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one is not output]
    return sorted({name.rpartition(".")[2] for name in layers})


def adapter_settings(lora: Lora) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel, lora: Lora) -> None:
    """Puts trainable low-rank adapters, in the weights' own dtype, into a model and freezes the rest of it."""
    model.add_adapter(adapter_settings(lora))
    model.enable_input_require_grads()  # else checkpointed layers see no input that needs a gradient


def copy_model_files(source: Path, target: Path, dtype: str) -> None:
    """Everything beside the weights; config.json names the dtype that the weights now have.

    The source may be another run's snapshot: its manifest describes that one alone.
    """
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in path.name
        if path.is_file() and wanted and path.name != "manifest.json":
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def model_fingerprint(directory: Path) -> str:
    """Of the configuration as it lies on the disk, so that two transformers versions agree on it."""
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return _short_hash(kept)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    return _short_hash(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "template": tokenizer.chat_template,
            "eos": tokenizer.eos_token_id,
        }
    )


def vocabulary_size(directory: Path) -> int:
    """Rows of the output layer; at least the number of tokens that the tokenizer knows."""
    return json.loads((directory / "config.json").read_text())["vocab_size"]


def _short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
