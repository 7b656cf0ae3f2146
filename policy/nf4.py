"""The base model of adapters in NF4, four bits a weight (QLoRA, arXiv 2305.14314, section 3 and appendix E).

Only the trainer gains from it, and vLLM serves no such weights. So a directory is made in which every linear weight is
rounded to what NF4 can hold, in the usual dtype. The sampler, a chat and an export load it like any other; the trainer
packs it into four bits, which rounds nothing a second time. All of them compute the same policy, to the last bit.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK = 64
"""Weights that share one scale, the largest of their absolute values."""
CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def round_weights(model: PreTrainedModel) -> None:
    """Every linear weight but the output layer's, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = rounded(module.weight.data)


def rounded(weight: Tensor) -> Tensor:
    """The nearest values that NF4 can hold; same shape and dtype. The number of weights is a multiple of BLOCK."""
    blocks = weight.float().view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / scale.clamp(min=1e-30), (CODE[1:] + CODE[:-1]) / 2)
    return (CODE[nearest] * scale).view_as(weight).to(weight.dtype)


def packing(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Without double quantization, which would round the scales again."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
    )


@runtime_checkable
class Repacks(Protocol):
    """A linear layer of bitsandbytes."""

    support_avx512bf16_for_cpu: bool


def keep_differentiable(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks a layer at its first use without a gradient, for good; the
    gradients that pass it later are wrong without a word (measured: by 100 %)."""
    for module in model.modules():
        if isinstance(module, Repacks):
            module.support_avx512bf16_for_cpu = False
