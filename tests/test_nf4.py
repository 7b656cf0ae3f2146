"""The trainer's four bits and the directory that samplers load are the same numbers."""

import numpy as np
import pytest
import torch

from policy.canary import canary_sequences
from policy.logprobs import TokenLogprobs, pack
from policy.model import add_adapter, load_model, load_tokenizer, locate
from policy.nf4 import rounded
from protocol.errors import UserError
from protocol.recipe import Lora, Model
from protocol.resolve import load
from tests.test_policy import run
from tests.tiny import make_model

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_the_librarys_and_packing_rounds_nothing_more(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(192, 64) * 0.03).to(dtype)
    weight[0] = 0
    assert torch.equal(rounded(weight), unpacked(weight)) and not torch.equal(rounded(weight), weight)
    assert torch.equal(rounded(rounded(weight)), rounded(weight))
    assert torch.equal(unpacked(rounded(weight)), rounded(weight))


def unpacked(weight):
    return bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4"))


def test_log_probs_and_gradients_are_those_of_the_rounded_model(tiny, tmp_path, monkeypatch):
    """Also after log-probs were computed without a gradient, where bitsandbytes packs once more."""
    monkeypatch.setenv("VESPER_CACHE", str(tmp_path))
    directory = locate(Model(path=str(tiny), quantize="nf4"))
    sequences = [np.array(tokens) for tokens in canary_sequences(load_tokenizer(directory))]
    found = {}
    for quantize in ("none", "nf4"):
        torch.manual_seed(0)
        model = load_model(directory, "bfloat16", quantize=quantize)
        add_adapter(model, Lora(rank=4))
        trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
        for name in sorted(trainable):
            torch.nn.init.normal_(trainable[name], std=0.02)
        scorer, packed = TokenLogprobs(model, 1.0, 64), pack([(one[:1], [one[1:]]) for one in sequences])
        with torch.no_grad():
            scorer.eval()(packed)
        logprobs, _ = scorer.train()(packed)
        logprobs.sum().backward()
        found[quantize] = [logprobs.detach(), *(trainable[name].grad for name in sorted(trainable))]
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def test_four_bits_are_for_adapters_that_no_zero_3_divides():
    for wrong in (["lora.rank=0"], ["lora.rank=4", "trainer.zero_stage=3"]):
        with pytest.raises(UserError, match=r"model\.quantize"):
            load(None, ["model.quantize=nf4", *wrong])


@pytest.mark.slow
@pytest.mark.long
def test_a_resumed_run_on_four_bits_goes_on_exactly_as_the_uninterrupted_one(tiny, tmp_path):
    options = ["model.dtype=bfloat16", "model.quantize=nf4", "lora.rank=4", "trainer.zero_stage=2"]
    whole = run(tiny, tmp_path / "whole", *options, world=2, steps=4)
    run(tiny, tmp_path / "cut", *options, world=2, steps=2)
    assert run(tiny, tmp_path / "cut", *options, world=2, steps=4, incarnation=2) == whole[2:]
    assert whole[0]["kl"] == 0.0 and whole[3]["kl"] > 0.0
