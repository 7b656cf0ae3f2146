"""Weights -> an immutable snapshot that samplers, `from_pretrained` and vLLM can load.

All ranks gather together, parameter by parameter; rank 0 alone writes, and holds one of them at a time. A full snapshot
is a complete Hugging Face model directory; with adapters it is the adapter alone. Weights that are not finite
are never written.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.canary import canary_sequences
from policy.logprobs import pack
from policy.model import copy_model_files, model_fingerprint
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
from trainer.shards import Entry, write_file, write_shards


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
                files=write_weights(aside, weights, policy),
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
    """A model directory without its manifest: shards, index, configuration and tokenizer; or an adapter.

    Raises Diverged where values are not finite.
    """
    if policy.recipe.lora.rank:
        return _write_adapter(aside, {name: tensor.clone() for name, tensor in weights}, policy)
    shards = write_shards(aside, policy.layout(), weights)
    copy_model_files(policy.directory, aside, policy.recipe.model.dtype)
    return shards | {path.name: hash_file(path) for path in aside.iterdir() if "safetensors" not in path.name}


def _write_adapter(aside: Path, weights: dict[str, Tensor], policy: Policy) -> dict[str, File]:
    """peft's own layout, which peft, vLLM and the hub read. Adapters are small: peft gets all of them at once."""
    named = get_peft_model_state_dict(policy.model, state_dict=weights)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in named.items()}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in prefixed.items()]
    adapter = policy.model.peft_config["default"]
    assert isinstance(adapter, PeftConfig), "`add_adapter` puts peft's own there"
    settings = adapter.to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    settings |= {"inference_mode": True, "base_model_name_or_path": policy.recipe.model.path}
    text = json.dumps({key: value for key, value in settings.items() if _plain(value)}, indent=1)
    return {
        "adapter_model.safetensors": write_file(aside / "adapter_model.safetensors", entries, iter(prefixed.items())),
        "adapter_config.json": write_hashed(aside / "adapter_config.json", text.encode()),
    }


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
