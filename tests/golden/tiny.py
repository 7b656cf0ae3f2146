"""A small recorded run, made on the spot, and what its replay must give: `replay.json` beside this file.

The groups are `tests.groups`', with the tiny model's own log-probs and some noise, so that ratios lie near 1. No hashes
of weights are kept: two machines with the same torch and the same model of CPU came to different last bits.
"""

import json
import os
import socket
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from protocol.codec import pack, unpack
from protocol.messages import Group
from protocol.metrics import read_metrics
from protocol.rundir import resolve_recipe
from tests import warm
from tests.groups import make_group
from tests.tiny import make_model
from trainer.stream import StreamWriter

FILE = Path(__file__).with_name("replay.json")
OBJECTIVES = ("dapo", "gspo")
STEPS, GROUPS, COMPLETIONS = 4, 4, 4
SETTINGS = [
    "model.dtype=float32",
    f"sampling.group_size={COMPLETIONS}",
    "objective.kl_beta=0.04",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=1",
    f"trainer.steps={STEPS}",
    "trainer.tokens_per_micro_batch=128",
    "trainer.threads=1",
    "trainer.gradient_checkpointing=false",
]


def record(directory: Path) -> Path:
    """A run directory as a run leaves it behind, as far as a replay reads it: recipe and stream."""
    model = make_model(directory / "model")
    rundir, _ = resolve_recipe(directory / "run", None, [*SETTINGS, f"model.path={model}"])
    scorer = AutoModelForCausalLM.from_pretrained(model).eval()
    stream = StreamWriter(rundir.stream, incarnation=1, on=True)
    for step in range(1, STEPS + 1):
        numbers = range(GROUPS * (step - 1), GROUPS * step)
        stream.keep(step, [_as_sampled(make_group(n, rewards=[0.0, 1.0, 0.5, 2.0]), scorer) for n in numbers])
    return rundir.path


def replay(run: Path, *words: str) -> list[dict]:
    """The lines that a replay of one rank, in a process of its own, leaves in replay.jsonl: begin, steps, end."""
    replayed(run, *words)
    return [{name: line[name] for name in line if name != "time_s"} for line in read_metrics(run / "replay.jsonl")]


def replayed(run: Path, *words: str) -> str:
    """The same; -> its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    done = warm.run(["-m", "trainer", "--run", str(run), *words], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def golden() -> dict:
    return json.loads(FILE.read_text())


def _as_sampled(group: Group, model: PreTrainedModel) -> Group:
    random = np.random.default_rng(group.group_id)
    prompt = unpack(group.prompt)
    completions = []
    for completion in group.completions:
        tokens = unpack(completion.tokens)
        own = _logprobs(model, prompt, tokens)
        noisy = own + random.normal(0, 0.05, len(own)).astype(np.float32)
        far = own + random.normal(0, 0.2, len(own)).astype(np.float32)
        parts = {"logprobs": pack(np.minimum(noisy, 0)), "ref_logprobs": pack(np.minimum(far, 0))}
        completions.append(msgspec.structs.replace(completion, **parts))
    return msgspec.structs.replace(group, completions=completions)


@torch.no_grad()
def _logprobs(model: PreTrainedModel, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[n] float32: of the n tokens after the prompt [m]."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
