"""A step of the trainer on a fake GPU: each tensor is where it belongs, nobody waits needlessly.

`tests/fake_cuda.py` says how a machine without a GPU has one, and what it refuses and counts;
`tests/test_fake_cuda_finds.py` shows that it does. `tests/fake_step.py` runs the real loop on it.
No call of `torch.cuda` is replaced: the loop makes none where `torch.cuda.is_available()` is false.

What is not seen here: DeepSpeed's own waits and copies, NCCL, and the kernels of Liger and
bitsandbytes. `sdpa` attention is torch's plain formula here, because a CPU build has no fused
kernel to choose from. `varlen` attention is torch's own operation for FlashAttention, which knows
FakeTensors.
"""

import numpy as np
import pytest
import torch

from policy import attention
from policy.kernels import kernel_gap
from policy.logprobs import pack
from protocol.metrics import MetricsWriter, read_metrics
from tests.fake_cuda import GPU, FakeCuda
from tests.fake_step import OneRank, Store, groups, on_gpu, recipe, run, without_a_gpu
from tests.test_loss import LEARNED, OPTIONS, step
from tests.tiny import make_model
from trainer import loop
from trainer.engine import Policy
from trainer.figures import of_tokens
from trainer.loss import objective_loss
from trainer.record import Record

COPY, NUMBER = "aten._to_copy.default", "aten._local_scalar_dense.default"
WAITS = {
    ("trainer/engine.py:Policy.update", NUMBER): 1,  # the norm of the gradient
    ("trainer/record.py:Record.measured", COPY): 1,  # the figures of all tokens
}
"""(place, operation) -> how often the host waits in a step of any number of micro-batches."""
PUBLISHED = ("trainer/engine.py:Policy.weights", COPY)
"""The snapshot of a step: once for each tensor."""
UPLOADS = {
    "trainer/batch.py:MicroBatch.to": 7,
    "policy/logprobs.py:Packed.to": 4,
    "policy/attention.py:Segments.to": 3,
}
"""Place -> tensors that the host sends for each micro-batch."""
OBJECTIVES = {
    "grpo": [],
    "dr_grpo": [],
    "dapo": [],
    "gspo": ["objective.recompute_old_logprobs=true"],
    "cispo": [],
    "sft": ["objective.kl_beta=0", "sampling.group_size=1", "data.demonstration=x"],
}
"""With the settings that they ask for."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ranks():
    with OneRank() as rank:
        yield rank


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    without_a_gpu(monkeypatch)


def times(count: int, table: dict) -> dict:
    return {place: count * each for place, each in table.items()}


@pytest.mark.parametrize("way", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_for_its_norm_and_its_figures_alone(tiny, ranks, tmp_path, name, way):
    """The first step has three micro-batches, the second one."""
    of = recipe(tiny, f"objective.name={name}", f"trainer.attention={way}", *OBJECTIVES[name])
    reference = name != "sft"
    seen = run(of, ranks, tmp_path, [groups(0, 2, reference), groups(1, 1, reference)])
    uploads = UPLOADS if reference else UPLOADS | {"trainer/batch.py:MicroBatch.to": 6}
    assert seen.waits == [WAITS | {PUBLISHED: 26}] * 2, seen.lines
    assert seen.uploads == [times(3, uploads), uploads], seen.lines
    records = read_metrics(tmp_path / "trainer.jsonl")
    assert [record["step"] for record in records] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        (["trainer.gradient_checkpointing=false"], 26),
        (["trainer.zero_stage=0", "model.dtype=float32"], 26),  # the norm is our own
        (["lora.rank=4", "lora.dropout=0.1", "optimizer.learning_rate=1e-5"], 28),
        (["objective.entropy_bonus=0.1", "objective.correction=sequence_mask"], 26),
    ],
)
def test_other_settings_wait_no_oftener(tiny, ranks, tmp_path, settings, published):
    """With adapters the reference is one more forward pass, and the groups bring none."""
    adapters = "lora.rank=4" in settings
    seen = run(recipe(tiny, *settings), ranks, tmp_path, [groups(0, 2, reference=not adapters)])
    uploads = UPLOADS | {"trainer/batch.py:MicroBatch.to": 6} if adapters else UPLOADS
    assert seen.waits == [WAITS | {PUBLISHED: published}], seen.lines
    assert seen.uploads == [times(3, uploads)], seen.lines


@pytest.mark.parametrize("name", LEARNED)
def test_no_option_of_the_loss_waits(name):
    """Forward and backward."""
    for option, settings in OPTIONS.items():
        if (name, option) == ("cispo", "dual_clip"):
            continue  # refused
        _, micro, objective = step(name=name, **settings)
        with FakeCuda().entered() as gpu:
            micro = micro.to(GPU)
            logprobs = micro.sampler_logprobs.clone().requires_grad_()
            entropies = torch.ones_like(logprobs).requires_grad_()
            loss, figures = objective_loss(logprobs, entropies, micro, objective)
            loss.backward()
            assert not gpu.waits, option
            assert {found.dtype for found in figures.values()} == {torch.float32}, option
            assert all(found.is_cuda for found in figures.values()), option


def test_scores_are_fetched_at_once(tiny, ranks):
    policy = Policy(recipe(tiny), tiny, ranks)
    with on_gpu(policy) as gpu:
        found = policy.score(pack([(np.arange(3), [np.arange(4), np.arange(2)])]), 0.7)
    assert found.device.type == "cpu" and found.shape == (6,)
    assert gpu.waits == {("trainer/engine.py:Policy.score", COPY): 1}
    assert sum(gpu.uploads.values()) == 7


def test_the_look_at_flash_attention_has_all_tensors_on_the_gpu(tiny, ranks):
    """Forward and backward. Two norms are compared, and both are made up: 1 / 1."""
    policy = Policy(recipe(tiny), tiny, ranks)
    with FakeCuda().entered():
        assert kernel_gap(policy.model.config, GPU, torch.bfloat16) == 1.0


DTYPES = {
    torch.int64: "input_ids position_ids seen predictors targets completion",
    torch.int32: "queries keys",
    torch.float32: (
        "sampler_logprobs ref_logprobs advantages mask shares lengths logprobs entropies loss "
        "log_mismatch kept entropy clipped_low clipped_high kl length start"
    ),
    torch.bfloat16: "weights hidden attention_mask gradients",
}
"""What a step computes with, in a model of bfloat16."""


def test_dtypes_at_the_seams(tiny, ranks):
    policy = Policy(recipe(tiny), tiny, ranks)
    hidden = []

    def keep(module, given, output) -> None:
        hidden.append(output.last_hidden_state)

    policy.model.base_model.register_forward_hook(keep)
    with on_gpu(policy):
        micro = next(policy.accumulate(policy.batch(groups(0, 2)).micro_batches))
        logprobs, entropies = policy.logprobs(micro)
        loss, figures = objective_loss(logprobs, entropies, micro, policy.recipe.objective)
        policy.backward(loss)
        packed, segments = micro.packed, micro.packed.segments
        found = {name: getattr(micro, name) for name in micro.__dataclass_fields__}
        found |= {name: getattr(packed, name) for name in packed.__dataclass_fields__}
        found |= {name: getattr(segments, name) for name in ("queries", "keys", "seen")}
        found |= {"logprobs": logprobs, "entropies": entropies, **figures, "loss": loss}
        found |= {"hidden": hidden[0]}
        found["attention_mask"] = segments.mask(packed.input_ids.shape[1], policy.model.dtype)
        for parameter in policy.model.parameters():
            assert (parameter.dtype, parameter.grad.dtype) == (torch.bfloat16, torch.bfloat16)
            assert parameter.is_cuda and parameter.grad.is_cuda
        found |= {"weights": parameter, "gradients": parameter.grad}
    del found["packed"], found["segments"]
    assert {name: one.dtype for name, one in found.items()} == {
        name: dtype for dtype, names in DTYPES.items() for name in names.split()
    }
    assert all(one.is_cuda for one in found.values())


def test_flash_attention_gets_bfloat16_and_ends_in_int32(tiny, ranks, tmp_path, monkeypatch):
    given, real = set(), attention.varlen_attn

    def seen(*arguments, **settings):
        given.add(tuple(one.dtype for one in arguments[:5]))
        return real(*arguments, **settings)

    monkeypatch.setattr(attention, "varlen_attn", seen)
    run(recipe(tiny, "trainer.attention=varlen"), ranks, tmp_path, [groups(0, 1)])
    assert given == {(torch.bfloat16,) * 3 + (torch.int32,) * 2}


def test_one_wait_more_in_the_loop_is_named(tiny, ranks, tmp_path, monkeypatch):
    def curious(*arguments):
        loss, figures = objective_loss(*arguments)
        loss.item()
        return loss, figures

    monkeypatch.setattr(loop, "objective_loss", curious)
    [waits] = run(recipe(tiny), ranks, tmp_path, [groups(0, 2)]).waits
    place = f"tests/test_fake_cuda.py:{curious.__qualname__}"
    assert waits == WAITS | {PUBLISHED: 26, (place, NUMBER): 3}


def test_figures_that_wait_for_the_end_of_the_step_are_the_same_numbers(ranks, tmp_path):
    _, micro, objective = step(kl_beta=0.1, correction="sequence_mask")
    parts = []
    with MetricsWriter(tmp_path / "trainer.jsonl") as writer:
        record = Record(writer, ranks, Store())
        for shift in (0.0, 0.3):
            logprobs = micro.sampler_logprobs + shift
            _, figures = objective_loss(logprobs, -logprobs, micro, objective)
            record.add(figures)
            parts.append(figures)
        found = record.measured()
    whole = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
    assert found == of_tokens(whole)
