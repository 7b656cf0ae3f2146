"""Real vLLM: its log-probs are the trainer's, weights change under running requests, wrong weights never sample."""

import asyncio
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from policy.canary import canary_sequences
from policy.model import load_tokenizer
from protocol.errors import WrongWeights
from protocol.messages import Pulse
from protocol.snapshot import Corrupt, snapshot_id
from tests.running_engine import PROMPT, Running, logprobs, publish
from tests.tiny import make_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    result = Running(tmp_path_factory.mktemp("engine"))
    result.call(result.engine.weights.load(publish(result.model, result.snapshots, 0)))
    yield result
    result.close()


def differently_trained(running: Running, seed: int) -> Path:
    return make_model(running.model.parent / f"other-{seed}", seed=seed)


def test_sampled_logprobs_are_the_trainers_at_the_sampling_temperature(running):
    sampled = running.call(running.engine.generate(PROMPT, "train"))
    expected = logprobs(running.model, PROMPT, [one.tokens for one in sampled], temperature=0.7)
    gaps = np.concatenate([abs(one.logprobs - other) for one, other in zip(sampled, expected, strict=True)])
    assert gaps.mean() < 1e-5 and gaps.max() < 1e-3
    assert {one.finish for one in sampled} <= {"stop", "length"} and all(len(one.tokens) for one in sampled)
    specials = load_tokenizer(running.model).all_special_ids
    assert [one.specials for one in sampled] == [sum(t in specials for t in one.tokens[:-1]) for one in sampled]


def test_one_process_schedules_and_computes(running):
    """On CPUs vLLM by itself starts two, and each spins on a core while the other works."""
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    assert any("EngineCore" in name for name in names) and not any("Worker" in name for name in names)


def test_only_the_time_with_requests_counts_as_busy(running):
    async def scored() -> None:
        await running.engine.score(PROMPT.tolist())

    running.call(scored())
    before = running.engine.busy_s
    assert before > 0
    time.sleep(0.2)
    assert running.engine.busy_s == before  # idle
    running.call(scored())
    assert running.engine.busy_s > before


def test_weights_change_under_a_running_request_and_each_token_knows_its_own(running):
    newer = publish(differently_trained(running, 1), running.snapshots, 1)

    async def both():
        generating = asyncio.create_task(running.engine.generate(PROMPT, "train"))
        while running.engine.tokens < counted + 40:
            await asyncio.sleep(0.005)
        await running.engine.weights.load(newer)
        return await generating

    counted = running.engine.tokens
    sampled = running.call(both())
    mixed = [one for one in sampled if len(one.spans) == 2]
    assert mixed, "no request was running when the weights changed"
    for one in mixed:
        first, second = one.spans
        assert (first.snapshot, second.snapshot) == (snapshot_id(0, 1), snapshot_id(1, 1))
        assert first.start == 0 and first.end == second.start and second.end == len(one.tokens)
        old = logprobs(running.model, PROMPT, [one.tokens], temperature=0.7)[0]
        assert abs(one.logprobs[: first.end] - old[: first.end]).max() < 1e-3
        assert abs(one.logprobs[second.start :] - old[second.start :]).max() > 1e-2


def test_a_damaged_snapshot_is_never_sampled_with(running, monkeypatch):
    """Ancestor defects 2 and 10: a failed load was printed, or not even that, and old weights went on."""
    monkeypatch.setattr("sampler.weights.PATIENCE_S", 0.0)
    before = running.engine.weights.snapshot
    pulse = publish(running.model, running.snapshots, 5)
    file = running.snapshots / pulse.snapshot / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(Corrupt, match="not the sealed"):
        running.call(running.engine.weights.load(pulse))
    assert running.engine.weights.snapshot == before


def test_the_engine_goes_on_sampling_while_it_waits_for_a_slow_disk(running):
    """The worker reads in a thread of its own, as patiently as the sampler."""
    pulse = publish(differently_trained(running, 4), running.snapshots, 4)
    file = running.snapshots / pulse.snapshot / "model.safetensors"
    hidden = file.rename(running.snapshots / "hidden")

    async def meanwhile() -> None:
        loading = asyncio.create_task(running.engine.weights.load(pulse))
        sampled = await running.engine.generate(PROMPT, "train")
        assert len(sampled) and not loading.done() and running.engine.weights.snapshot != pulse.snapshot
        hidden.rename(file)
        await loading

    running.call(meanwhile())
    assert running.engine.weights.snapshot == pulse.snapshot


def test_a_manifest_that_was_not_announced_is_refused(running, monkeypatch):
    monkeypatch.setattr("sampler.weights.PATIENCE_S", 0.0)
    publish(running.model, running.snapshots, 6)
    with pytest.raises(Corrupt):
        running.call(running.engine.weights.load(Pulse(snapshot=snapshot_id(6, 1), manifest_sha256="0" * 64)))


@pytest.mark.fault("G12")
@pytest.mark.parametrize(
    "without", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_that_was_skipped_is_noticed(running, without):
    """The files are as announced and vLLM loads them without a word."""
    model = make_model(running.model.parent / f"skipped-{without}", seed=20 + len(without))
    if without == "model.norm.weight":  # made of ones: another seed does not change it
        tensors = load_file(model / "model.safetensors")
        save_file(tensors | {without: tensors[without] * 1.5}, model / "model.safetensors", metadata={"format": "pt"})
    step = 20 + len(without)
    with pytest.raises(WrongWeights, match="differ by"):
        running.call(running.engine.weights.load(publish(model, running.snapshots, step, without=without)))


@pytest.mark.fault("G12")
def test_weights_that_compute_something_else_than_the_trainers_are_refused(running):
    """A skipped tensor, an adapter that was not applied: loads perfectly, samples nonsense."""
    lie = publish(running.model, running.snapshots, 7, canary_of=differently_trained(running, 2))
    with pytest.raises(WrongWeights, match="differ by"):
        running.call(running.engine.weights.load(lie))
    assert running.engine.weights.snapshot != lie.snapshot


def test_the_next_good_snapshot_is_used_again(running):
    """The last one: also the tied output layer follows, which the CPU backend keeps packed."""
    third = differently_trained(running, 3)
    running.call(running.engine.weights.load(publish(third, running.snapshots, 8)))
    sampled = running.call(running.engine.generate(PROMPT, "train"))
    expected = logprobs(third, PROMPT, [one.tokens for one in sampled], temperature=0.7)
    assert max(abs(one.logprobs - other).max() for one, other in zip(sampled, expected, strict=True)) < 1e-3


@pytest.mark.long
def test_adapters_of_a_llama_leave_its_output_layer_alone(tmp_path):
    """vLLM would wrap it too, and die of the log-probs of two prompts in one step."""
    llama = make_model(tmp_path / "llama", llama=True)
    running = Running(tmp_path, "lora.rank=4", model=llama)
    try:
        prompts = canary_sequences(load_tokenizer(llama))

        async def together():
            return await asyncio.gather(*(running.engine.score(tokens) for tokens in prompts))

        for tokens, found in zip(prompts, running.call(together()), strict=True):
            expected = logprobs(llama, tokens[:1], [tokens[1:]])[0]
            np.testing.assert_allclose(found, expected, atol=1e-3)
    finally:
        running.close()
