"""The proofs of test_engine.py on vLLM's Model Runner V2, which is what every GPU runs.

vLLM for CPUs takes its older runner, because Triton cannot compile for CPUs. Here Triton's
interpreter executes the kernels of the newer runner. On GPUs vLLM also schedules a step before the
tokens of the last step are known (asynchronous scheduling). It turns that off on CPUs, and one of
the two engines here has it turned on again. Compiled kernels and CUDA graphs remain unproven here.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from policy.canary import canary_sequences
from policy.model import load_tokenizer
from protocol.errors import WrongWeights
from protocol.snapshot import snapshot_id
from sampler.engine import Sampled
from tests.running_engine import PROMPT, Running, logprobs, publish, trainers_model
from tests.tiny import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="test_engine.py runs it on a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

OVERLAY = Path(__file__).parent / "model_runner_v2"
TEMPERATURE = 0.7
SMALL = [
    f"sampling.temperature={TEMPERATURE}",
    "sampling.max_tokens=32",
    "sampling.group_size=3",
    "sampler.max_running=4",
    "sampler.cpu_kv_cache_gb=0.01",
]
"""Each step of the engine takes the interpreter about 0.15 seconds."""


@contextlib.contextmanager
def started(
    directory: Path,
    *overrides: str,
    asynchronous: bool,
    model: Path | None = None,
) -> Iterator[Running]:
    """Starts an engine on Model Runner V2 and ends it.

    While the engine runs, this process and those that it starts take Triton for usable.
    The engine writes its log into `directory / "engine.log"`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("PYTHONPATH", str(OVERLAY), prepend=os.pathsep)
        patch.setenv("VLLM_LOGGING_CONFIG_PATH", str(log_into(directory)))
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        if asynchronous:
            schedule_asynchronously(patch)
        running = Running(directory, *SMALL, *overrides, model=model)
        try:
            yield running
        finally:
            running.close()


def log_into(directory: Path) -> Path:
    """Writes a file with the settings of Python's logging that vLLM is to use."""
    handler = {"class": "logging.FileHandler", "filename": str(directory / "engine.log")}
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "DEBUG", "propagate": False}},
    }
    path = directory / "logging.json"
    path.write_text(json.dumps(settings))
    return path


def schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    """Changes the platform's settings, which say that CPUs have no asynchronous scheduling."""
    adapt = current_platform.check_and_update_config

    def adapt_and_allow(config) -> None:
        adapt(config)
        config.scheduler_config.async_scheduling = True

    platform = type(current_platform)
    patch.setattr(platform, "check_and_update_config", staticmethod(adapt_and_allow))


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def running(tmp_path_factory, asynchronous) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("engine"), asynchronous=asynchronous) as result:
        result.call(result.engine.weights.load(publish(result.model, result.snapshots, 0)))
        yield result


def differently_trained(running: Running, seed: int) -> Path:
    return make_model(running.model.parent / f"other-{seed}", seed=seed)


def largest_gap(model: Path, sampled: list[Sampled]) -> float:
    """The largest difference between the log-probs of the engine and those of the trainer."""
    expected = logprobs(model, PROMPT, [one.tokens for one in sampled], temperature=TEMPERATURE)
    found = np.concatenate([one.logprobs for one in sampled])
    return abs(found - np.concatenate(expected)).max()


def test_the_engine_uses_the_runner_and_the_scheduling_of_a_gpu(running, asynchronous):
    """Without this the other tests could pass on vLLM's older runner and prove nothing new."""
    log = (running.model.parent / "engine.log").read_text()
    assert "Using V2 Model Runner" in log
    assert ("Batch queue is enabled with size 2" in log) == asynchronous


def test_sampled_logprobs_are_the_trainers_at_the_sampling_temperature(running):
    sampled = running.call(running.engine.generate(PROMPT, "train"))
    assert len(sampled) == 3 and all(len(one.tokens) for one in sampled)
    assert largest_gap(running.model, sampled) < 1e-4


def test_weights_change_under_a_running_request_and_each_token_knows_its_own(running):
    """With asynchronous scheduling a step is under way when the weights are to change."""
    other = differently_trained(running, 1)
    newer = publish(other, running.snapshots, 1)

    async def both() -> list[Sampled]:
        counted = running.engine.tokens
        generating = asyncio.create_task(running.engine.generate(PROMPT, "train"))
        while running.engine.tokens < counted + 9:
            await asyncio.sleep(0.005)
        await running.engine.weights.load(newer)
        return await generating

    mixed = [one for one in running.call(both()) if len(one.spans) == 2]
    assert mixed, "no request was running when the weights changed"
    for one in mixed:
        first, second = one.spans
        assert (first.snapshot, second.snapshot) == (snapshot_id(0, 1), snapshot_id(1, 1))
        assert first.start == 0 and first.end == second.start and second.end == len(one.tokens)
        old = logprobs(running.model, PROMPT, [one.tokens], temperature=TEMPERATURE)[0]
        new = continued(running.model, other, one.tokens, second.start)
        np.testing.assert_allclose(one.logprobs[: first.end], old[: first.end], atol=1e-4)
        np.testing.assert_allclose(one.logprobs[second.start :], new, atol=1e-4)
        assert abs(one.logprobs[second.start :] - old[second.start :]).max() > 1e-2


def continued(old: Path, new: Path, tokens: np.ndarray, start: int) -> np.ndarray:
    """Log-probs of tokens[start:] with the new weights.

    They attend to the keys and values that the old weights have cached.
    """
    row = torch.tensor([[*PROMPT, *tokens]])
    cached = len(PROMPT) + start - 1
    with torch.no_grad():
        cache = trainers_model(old, torch.float32)(row[:, :cached]).past_key_values
        model = trainers_model(new, torch.float32)
        logits = model(row[:, cached:-1], past_key_values=cache).logits[0]
    known = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return known.gather(1, row[0, cached + 1 :, None])[:, 0].numpy()


@pytest.mark.fault("G12")
@pytest.mark.parametrize(
    "without",
    ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"],
)
def test_a_tensor_that_was_skipped_is_noticed(running, without):
    """The files are as announced and vLLM loads them without a word."""
    step = 20 + len(without)
    pulse = publish(differently_trained(running, step), running.snapshots, step, without=without)
    with pytest.raises(WrongWeights, match="differ by"):
        running.call(running.engine.weights.load(pulse))


@pytest.mark.fault("G12")
def test_weights_that_compute_something_else_than_the_trainers_are_refused(running):
    lie = publish(running.model, running.snapshots, 7, canary_of=differently_trained(running, 2))
    with pytest.raises(WrongWeights, match="differ by"):
        running.call(running.engine.weights.load(lie))
    assert running.engine.weights.snapshot != lie.snapshot


def test_the_next_good_snapshot_is_used_again(running):
    """This test comes last with this engine. The tied output layer follows the weights, too."""
    third = differently_trained(running, 3)
    running.call(running.engine.weights.load(publish(third, running.snapshots, 8)))
    sampled = running.call(running.engine.generate(PROMPT, "train"))
    assert largest_gap(third, sampled) < 1e-4


def test_a_llama_with_adapters_scores_several_prompts_in_one_step(tmp_path):
    """Its scheduling is asynchronous, as on a GPU."""
    llama = make_model(tmp_path / "llama", llama=True)
    prompts = canary_sequences(load_tokenizer(llama))

    async def together(running: Running) -> list[list[float]]:
        return await asyncio.gather(*(running.engine.score(tokens) for tokens in prompts))

    with started(tmp_path, "lora.rank=4", asynchronous=True, model=llama) as running:
        found = running.call(together(running))
    for tokens, scores in zip(prompts, found, strict=True):
        expected = logprobs(llama, tokens[:1], [tokens[1:]])[0]
        np.testing.assert_allclose(scores, expected, atol=1e-4)
