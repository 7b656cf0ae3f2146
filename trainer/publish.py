"""Weights -> an immutable snapshot that samplers, `from_pretrained` and vLLM can load.

All ranks gather together; rank 0 alone writes. A full snapshot is a complete Hugging Face model directory; with
adapters it is the adapter alone. Weights that are not finite are never written.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.canary import canary_sequences
from policy.logprobs import pack
from policy.model import copy_model_files, model_fingerprint
from protocol.errors import Diverged
from protocol.messages import Pulse
from protocol.rundir import RunDir
from protocol.snapshot import (
    Canary,
    File,
    Manifest,
    hash_file,
    seal,
    snapshot_id,
    staging,
    write_hashed,
)
from trainer.engine import Policy
from trainer.retention import check_room, size_of_newest

SHARD_BYTES = 2 << 30


class Publisher:
    """Writes a run's snapshots, one a step."""

    def __init__(self, rundir: RunDir, run_id: str, incarnation: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rundir, self._run_id, self._incarnation = rundir, run_id, incarnation
        self._sequences = canary_sequences(tokenizer)
        self._parent: str | None = None

    def publish(self, policy: Policy, first: bool) -> Pulse:
        """Called by all ranks; the pulse that rank 0 (first) gets names the snapshot. Raises Diverged, StorageError."""
        identifier = snapshot_id(policy.steps_done, self._incarnation)
        canary = self._canary(policy)
        weights = policy.weights()
        try:
            if not first:
                return Pulse(snapshot=identifier, manifest_sha256="")
            self._rundir.refuse_if_superseded(self._incarnation)
            return self._write(identifier, weights, canary, policy)
        finally:
            for _ in weights:  # also after an error: the ranks gather together
                pass

    def _write(self, identifier: str, weights: Iterator[tuple[str, Tensor]], canary: Canary, policy: Policy) -> Pulse:
        with staging(self._rundir.snapshots, identifier) as aside:
            check_room(aside, identifier, size_of_newest(self._rundir.snapshots))
            manifest = Manifest(
                kind="adapter" if policy.recipe.lora.rank else "full",
                run_id=self._run_id,
                id=identifier,
                parent=self._parent,
                step=policy.steps_done,
                incarnation=self._incarnation,
                model=model_fingerprint(policy.directory),
                canary=canary,
                files=write_weights(aside, _finite(weights), policy),
            )
            sha256 = seal(aside, self._rundir.snapshots / identifier, manifest)
        self._parent = identifier
        return Pulse(snapshot=identifier, manifest_sha256=sha256)

    def _canary(self, policy: Policy) -> Canary:
        sequences = [torch.tensor(sequence).numpy() for sequence in self._sequences]
        logprobs = policy.score(pack([(tokens[:1], [tokens[1:]]) for tokens in sequences]), temperature=1.0)
        parts = logprobs.split([len(tokens) - 1 for tokens in sequences])
        return Canary(tokens=self._sequences, logprobs=[part.tolist() for part in parts])


def write_weights(aside: Path, weights: Iterator[tuple[str, Tensor]], policy: Policy) -> dict[str, File]:
    """A model directory without its manifest: shards, index, configuration and tokenizer; or an adapter."""
    if policy.recipe.lora.rank:
        return _write_adapter(aside, dict(weights), policy)
    shards = _write_shards(aside, weights)
    copy_model_files(policy.directory, aside, policy.recipe.model.dtype)
    return shards | {path.name: hash_file(path) for path in aside.iterdir() if "safetensors" not in path.name}


def _write_shards(aside: Path, weights: Iterator[tuple[str, Tensor]]) -> dict[str, File]:
    shards: list[dict[str, Tensor]] = [{}]
    files, index, size, total = {}, {}, 0, 0
    temporary: list[str] = []

    def flush() -> None:
        name = f"model-{len(temporary) + 1:05d}.safetensors"
        files[name] = write_hashed(aside / name, save(shards[-1], metadata={"format": "pt"}))
        index.update(dict.fromkeys(shards[-1], name))
        temporary.append(name)
        shards[-1] = {}

    for name, tensor in weights:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(temporary) == 1:
        (aside / temporary[0]).rename(aside / "model.safetensors")
        return {"model.safetensors": files[temporary[0]]}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    return files | {"model.safetensors.index.json": write_hashed(aside / "model.safetensors.index.json", text.encode())}


def _write_adapter(aside: Path, weights: dict[str, Tensor], policy: Policy) -> dict[str, File]:
    """peft's own layout, which peft, vLLM and the hub read."""
    named = get_peft_model_state_dict(policy.model, state_dict=weights)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()}
    settings = policy.model.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    settings |= {"inference_mode": True, "base_model_name_or_path": policy.recipe.model.path}
    text = json.dumps({key: value for key, value in settings.items() if _plain(value)}, indent=1)
    return {
        "adapter_model.safetensors": write_hashed(aside / "adapter_model.safetensors", save(prefixed)),
        "adapter_config.json": write_hashed(aside / "adapter_config.json", text.encode()),
    }


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _finite(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if not torch.isfinite(tensor).all():
            raise Diverged(f"{name} holds values that are not finite: nothing is published; lower the learning rate")
        yield name, tensor
