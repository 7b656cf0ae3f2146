"""An engine that tests run: its event loop, snapshots as the trainer writes them, and the trainer's log-probs."""

import asyncio
import functools
import shutil
import threading
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from policy.canary import canary_sequences
from policy.logprobs import TokenLogprobs, pack
from policy.model import load_tokenizer, model_fingerprint
from protocol.messages import Pulse
from protocol.resolve import load
from protocol.snapshot import Canary, Manifest, hash_file, seal, snapshot_id, staging
from sampler.engine import Engine
from tests.tiny import make_model

PROMPT = np.frombuffer(b"What is two plus two?", np.uint8).astype(np.int32)


def publish(
    model_directory: Path, snapshots: Path, step: int, canary_of: Path | None = None, without: str | None = None
) -> Pulse:
    """A full snapshot as the trainer writes it; `canary_of` lets it lie about the weights, `without` skips a tensor."""
    name = snapshot_id(step, 1)
    tokens = canary_sequences(load_tokenizer(model_directory))
    scores = [logprobs(canary_of or model_directory, row[:1], [row[1:]])[0].tolist() for row in tokens]
    with staging(snapshots, name) as aside:
        shutil.copytree(model_directory, aside, dirs_exist_ok=True)
        if without:
            tensors = load_file(aside / "model.safetensors")
            del tensors[without]
            save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        manifest = Manifest(
            kind="full",
            run_id="r",
            id=name,
            parent=None,
            step=step,
            incarnation=1,
            model=model_fingerprint(model_directory),
            canary=Canary(tokens=tokens, logprobs=scores),
            files={path.name: hash_file(path) for path in aside.iterdir()},
        )
        return Pulse(snapshot=name, manifest_sha256=seal(aside, snapshots / name, manifest))


@functools.lru_cache(maxsize=1)
def trainers_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")


def logprobs(directory: Path, prompt, completions, dtype=torch.float32, temperature: float = 1.0) -> list[np.ndarray]:
    """The trainer's computation."""
    model = trainers_model(directory, dtype)
    completions = [np.asarray(completion) for completion in completions]
    with torch.no_grad():
        found, _ = TokenLogprobs(model, temperature, 64)(pack([(np.asarray(prompt), completions)]))
    return [part.numpy() for part in found.split([len(completion) for completion in completions])]


class Running:
    """An engine on an event loop of its own thread, so that tests can stay plain functions."""

    def __init__(self, directory: Path, *overrides: str, model: Path | None = None) -> None:
        self.model, self.snapshots = model or make_model(directory / "model"), directory / "snapshots"
        self.snapshots.mkdir()
        recipe = load(
            None,
            [
                f"model.path={self.model}",
                "model.dtype=float32",
                "data.max_prompt_tokens=64",
                "sampling.max_tokens=200",
                "sampling.temperature=0.7",
                "sampler.max_running=16",
                "sampler.compile=false",
                "sampler.cpu_kv_cache_gb=0.1",
                *overrides,
            ],
        )
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.engine = Engine(recipe, self.model, self.snapshots, gpu=False, seed=1)
        self.call(self.engine.__aenter__())

    def call(self, coroutine, timeout_s: float = 600):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.call(self.engine.__aexit__())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
