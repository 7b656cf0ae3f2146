"""Whatever computes attention and norms, log-probs and gradients are the same; and what does not work is not used."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, FalconConfig, MistralConfig, Phi3Config

from policy import attention, kernels
from policy.attention import Segments, varlen
from policy.kernels import choose_attention, equip, fuse, kernel_gap
from policy.logprobs import Packed, TokenLogprobs, pack
from policy.model import load_model
from protocol.errors import UserError
from protocol.recipe import TrainerTable
from protocol.resolve import load
from tests.test_policy import run
from tests.tiny import make_model
from trainer.engine import Policy

CPU = torch.device("cpu")
ROW = [(4, [3, 1, 7]), (1, [1]), (9, [2, 2, 20, 5])]
"""Tokens of prompts, and of their completions."""


def packed(row=ROW) -> Packed:
    random = np.random.default_rng(0)
    return pack([(random.integers(0, 300, m), [random.integers(0, 300, n) for n in parts]) for m, parts in row])


@pytest.fixture(scope="module", params=["qwen", "llama"])
def model(request, tmp_path_factory):
    directory = make_model(tmp_path_factory.mktemp("tiny"), llama=request.param == "llama")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def scored(model, way: str, row: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and all parameters' gradients of a sum over log-probs and entropies."""
    model.zero_grad()
    logprobs, entropies = TokenLogprobs(model, 0.9, 7, way)(row)
    (logprobs.sum() + entropies.sum()).backward()
    return logprobs.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_varlen_is_sdpa_forward_and_backward(model, checkpointing):
    row = packed()
    expected, gradient = scored(model.train(), "sdpa", row)
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        found, other = scored(model, "varlen", row)
    finally:
        model.gradient_checkpointing_disable()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("piece", [1, 3])
def test_without_a_gpu_long_segments_come_in_pieces(model, monkeypatch, piece):
    expected, gradient = scored(model, "sdpa", packed())
    monkeypatch.setattr(attention, "PIECE", piece)
    found, other = scored(model, "varlen", packed())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()


TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_values_may_be_narrower_than_keys():
    """As in DeepSeek's latent attention."""
    width = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 4}
    config = DeepseekV2Config(**TINY, **width, intermediate_size=64, first_k_dense_replace=2, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected, gradient = scored(model, "sdpa", packed())
    found, other = scored(model, "varlen", packed())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()


def test_a_model_whose_attention_cannot_be_chosen_keeps_its_own():
    """transformers says so in a warning alone, and such a model would see no prompt."""
    model = AutoModelForCausalLM.from_config(FalconConfig(**TINY), dtype=torch.float32)
    assert choose_attention("auto", model, CPU) == ("sdpa", "transformers has one attention for these models")
    with pytest.raises(UserError, match="falcon models cannot be computed with varlen"):
        TokenLogprobs(model, 1.0, 7, "varlen")


def test_a_completion_sees_its_prompt_and_itself_and_nothing_that_comes_later():
    """Token by token, against the definition."""
    owner = [(root, part) for root, (m, parts) in enumerate(ROW) for part, n in enumerate([m, *parts])
             for _ in range(n if part == 0 else n - 1)]  # fmt: skip
    sees = [[i >= j and a[0] == b[0] and b[1] in (0, a[1]) for j, b in enumerate(owner)] for i, a in enumerate(owner)]
    for dtype in (torch.float32, torch.bfloat16):
        mask = packed().segments.mask(len(owner), dtype)
        assert mask.shape == (1, 1, len(owner), len(owner)) and mask.stride(2) % 16 == 0
        assert torch.equal(mask[0, 0] == 0, torch.tensor(sees))
        assert (mask[0, 0][~torch.tensor(sees)] == torch.finfo(dtype).min).all()


def test_varlen_has_the_pairs_that_see_each_other_and_no_more():
    segments = packed().segments
    assert segments.queries.tolist() == [0, 4, 6, 12, 13, 22, 23, 24, 43, 47]  # completions of one token have none
    assert segments.keys.diff().tolist() == [4, 6, 10, 1, 9, 10, 10, 28, 13]
    assert segments.longest == (19, 28)
    assert segments.seen[10:20].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


def test_all_layers_share_one_mask(model):
    """A bool mask would become one of the layer's own in each, kept for the backward pass."""
    row = packed()
    tokens, masks, kept = row.input_ids.shape[1], set(), []

    def keep(tensor):
        kept.append(tensor)  # else its address is used again
        if tensor.shape[-2:] == (tokens, tokens):
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TokenLogprobs(model.train(), 1.0, 7)(row)
    assert len(masks) == 1


def test_what_the_recipe_wants_is_what_it_gets_or_a_reason(model):
    assert choose_attention("sdpa", model, "cuda") == ("sdpa", "as trainer.attention says")
    assert choose_attention("auto", model, CPU) == ("varlen", "in plain torch: no GPU")
    assert choose_attention("varlen", model, CPU)[0] == "varlen"
    assert choose_attention("auto", model, "cuda") == (
        "sdpa",
        "FlashAttention takes bfloat16, and the model is float32",
    )
    with pytest.raises(UserError, match=r"trainer.attention = 'varlen' does not work here: .* use 'auto' or 'sdpa'"):
        choose_attention("varlen", model, "cuda")
    assert equip(model, TrainerTable(), CPU) == (
        "varlen",
        "attention varlen (in plain torch: no GPU), liger off: no GPU",
    )


def test_what_a_machine_cannot_have_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    """There is no model in the directory."""
    ranks = SimpleNamespace(device=torch.device("cuda"))
    asked = ["model.dtype=float32", "trainer.attention=varlen"]
    with pytest.raises(UserError, match=r"'varlen' does not work here: FlashAttention takes bfloat16, .* is float32"):
        Policy(load(None, asked), tmp_path, ranks)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install liger-kernel"):
        Policy(load(None, ["trainer.liger=on"]), tmp_path, ranks)


def test_a_gpu_without_memory_says_so_and_is_not_computed_without_flash_attention(model, monkeypatch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    monkeypatch.setattr(kernels, "kernel_gap", raising(RuntimeError("no kernel image")))
    assert choose_attention("auto", half, "cuda") == ("sdpa", "FlashAttention fails on this GPU: no kernel image")
    monkeypatch.setattr(kernels, "kernel_gap", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        choose_attention("auto", half, "cuda")


def raising(error: Exception):
    def kernel_gap(*_: object) -> float:
        raise error

    return kernel_gap


SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("config", [MistralConfig, Phi3Config])
def test_a_model_that_sees_a_window_only_is_refused(tmp_path, config):
    """Its configuration names no kinds of layers: all have the window."""
    config(**SMALL, sliding_window=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="models with sliding_window are not supported"):
        load_model(tmp_path, "float32")
    whole = config(**SMALL, sliding_window=None)
    AutoModelForCausalLM.from_config(whole).save_pretrained(tmp_path)
    assert load_model(tmp_path, "float32")


def test_a_window_that_is_switched_off_is_none(tmp_path):
    file = make_model(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    del config["layer_types"]  # as in older files
    file.write_text(json.dumps(config | {"sliding_window": 64, "use_sliding_window": False}))
    assert load_model(tmp_path, "float32")
    file.write_text(json.dumps(config | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}))
    with pytest.raises(UserError, match="sliding_attention"):
        load_model(tmp_path, "float32")


def test_a_model_with_dropout_or_caps_in_its_attention_is_not_computed_wrongly(model, monkeypatch):
    monkeypatch.setattr(model.config, "attention_dropout", 0.1)
    with pytest.raises(UserError, match="dropout"):
        choose_attention("varlen", model, CPU)
    monkeypatch.setattr(model.config, "attention_dropout", 0.0)
    monkeypatch.setattr(model.config, "attn_logit_softcapping", 50.0, raising=False)
    assert choose_attention("auto", model, CPU) == ("sdpa", "the model caps its attention scores")
    with pytest.raises(NotImplementedError, match="softcap"):
        varlen(model, *[torch.zeros(1, 1, 1, 8)] * 3, None, packed([(1, [1])]).segments, softcap=50.0)


def test_a_kernel_that_aligns_its_causal_mask_elsewhere_is_found_out(model, monkeypatch):
    """What the check at the start of a run is for: it passes what is right and not this."""
    for dtype, largest in ((torch.float32, 1e-5), (torch.bfloat16, kernels.TOLERANCE)):
        assert kernel_gap(model.config, CPU, dtype) < largest
    right = attention._one_by_one

    def misaligned(queries, keys, values, segments: Segments, scaling):
        """As if every completion's own keys began where its prompt's begin."""
        shifted = [torch.arange(a, b).roll(1) for a, b in zip(segments.keys, segments.keys[1:], strict=False)]
        return right(queries, keys[torch.cat(shifted)], values[torch.cat(shifted)], segments, scaling)

    monkeypatch.setattr(attention, "_one_by_one", misaligned)
    assert kernel_gap(model.config, CPU, torch.float32) > 0.5


INTERPRETED = """
import numpy as np, sys, torch
import triton.language as tl
from triton.runtime import interpreter
from transformers import AutoModelForCausalLM
import liger_kernel.ops.rms_norm
from policy.kernels import fuse
from tests.test_kernels import packed, scored
# The interpreter hands numbers over as Python's, and lacks CUDA's own functions.
convert = interpreter._implicit_cvt
def number(value):
    if not isinstance(value, float):
        return convert(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = number
liger_kernel.ops.rms_norm.rsqrt = lambda value: tl.rsqrt(value)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).train()
row = packed([(4, [3, 5])])
expected, gradient = scored(model, "sdpa", row)
assert fuse("on", model, "cpu") == "on"
found, other = scored(model, "varlen", row)
torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
assert (other - gradient).norm() < 1e-5 * gradient.norm()
assert not torch.equal(found, expected)
print("same")
"""


def test_ligers_kernels_compute_the_same_model(model, tmp_path):
    """Triton interprets them; on a GPU nobody has run them yet."""
    pytest.importorskip("liger_kernel")
    model.save_pretrained(tmp_path)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


def test_liger_is_left_out_where_it_cannot_work(model, monkeypatch):
    assert fuse("off", model, "cuda") == "off, as trainer.liger says"
    assert fuse("auto", model, CPU) == "off: no GPU"
    monkeypatch.setattr(model.config, "model_type", "strange")
    if importlib.util.find_spec("liger_kernel"):
        assert fuse("on", model, CPU) == "off: it does not know strange models"
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert fuse("auto", model, "cuda") == "off: liger-kernel is not installed"


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_of_zero_3_with_checkpointing_make_the_same_update_by_varlen(tmp_path):
    """What sees what passes DeepSpeed's hooks and the second forward pass of checkpointed layers."""
    tiny = make_model(tmp_path / "tiny")
    expected = run(tiny, tmp_path / "sdpa", "trainer.attention=sdpa")
    options = ["trainer.attention=varlen", "trainer.zero_stage=3", "trainer.gradient_checkpointing=true"]
    found = run(tiny, tmp_path / "varlen", *options, "trainer.tokens_per_micro_batch=45", world=2)
    for one, other in zip(expected, found, strict=True):
        gap = np.linalg.norm(np.subtract(one["gradient"], other["gradient"])) / np.linalg.norm(one["gradient"])
        assert gap < 1e-5
        assert other["weights"] == pytest.approx(one["weights"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_the_benchmark_measures_every_variant_on_any_machine():
    command = [sys.executable, "-m", "benchmarks.rows", "--size", "tiny", "--tokens", "64", "--prompt", "8"]
    command += ["--completion", "12", "--group", "4", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "rows" and found["roof_tflops"] > 0
    assert {row["variant"] for row in found["rows"]} == {
        f"{way}, checkpointing {on}" for way in ("sdpa", "varlen") for on in ("on", "off")
    }
    assert all(row["tokens"] == 8 + 4 * 11 and row["tokens/s"] > 0 and 0 < row["mfu"] < 1 for row in found["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_flash_attention_gives_what_sdpa_gives(model):
    half = model.to(torch.bfloat16)
    assert choose_attention("varlen", half, "cuda")[0] == "varlen"
    row = packed().to("cuda")
    expected, gradient = scored(half.to("cuda"), "sdpa", row)
    found, other = scored(half, "varlen", row)
    assert (found - expected).abs().mean() < 0.05
    assert (other - gradient).float().norm() < 0.05 * gradient.float().norm()
