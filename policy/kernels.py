"""Which kernels compute a model: FlashAttention and Liger's where they are and work, torch's own everywhere else.

FlashAttention is looked at on this machine: `varlen` attention must come to what `sdpa` comes to, forward and
backward, on a few made-up tokens, before a model is computed with it. Liger's kernels are taken as they are.
"""

import importlib.util

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from policy.attention import Segments, varlen
from protocol.errors import UserError
from protocol.recipe import TrainerTable

Device = torch.device | str
TOLERANCE = 0.02
"""Relative difference (2-norm) of two kernels in bfloat16, which keeps 8 bits; what is computed wrongly has about 1."""
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""The output layer and the loss stay our own, in float32 and in blocks of the vocabulary."""


def refuse_kernels(trainer: TrainerTable, dtype: torch.dtype, device: Device) -> None:
    """What can be known before a model is loaded. dtype: of its weights; device: where it will be. Raises UserError."""
    if trainer.liger == "on" and not _has_liger():
        raise UserError("trainer.liger = 'on' needs liger-kernel; pip install liger-kernel, or use 'auto'")
    problem = dtype_problem(dtype, torch.device(device))
    if trainer.attention == "varlen" and problem:
        raise _no_varlen(problem)


def equip(model: PreTrainedModel, trainer: TrainerTable, device: Device) -> tuple[str, str]:
    """Puts Liger's kernels into the model, in place. -> its attention (`sdpa` or `varlen`), and all that in words.

    device: where the model will be, whatever it is on now. Raises UserError where what the recipe wants cannot be had.
    """
    refuse_kernels(trainer, model.dtype, device)
    attention, reason = choose_attention(trainer.attention, model, device)
    return attention, f"attention {attention} ({reason}), liger {fuse(trainer.liger, model, device)}"


def choose_attention(wanted: str, model: PreTrainedModel, device: Device) -> tuple[str, str]:
    """`sdpa` or `varlen`, and why, in words. wanted: `trainer.attention`. Raises UserError where it cannot be had."""
    if wanted == "sdpa":
        return "sdpa", "as trainer.attention says"
    problem = varlen_problem(model, torch.device(device))
    if wanted == "varlen" and problem:
        raise _no_varlen(problem)
    if problem:
        return "sdpa", problem
    return "varlen", "in plain torch: no GPU" if torch.device(device).type == "cpu" else "FlashAttention is like sdpa"


def varlen_problem(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why this model cannot be computed with `varlen` attention on this device; None where it can."""
    if not model._can_set_attn_implementation():
        return "transformers has one attention for these models"
    if any(getattr(model.config, name, None) for name in ("attention_dropout", "attn_pdrop")):
        return "the model has dropout in its attention"
    if getattr(model.config, "attn_logit_softcapping", None):
        return "the model caps its attention scores"
    if device.type == "cpu":
        return None
    if problem := dtype_problem(model.dtype, device):
        return problem
    try:
        gap = kernel_gap(model.config, device, model.dtype)
    except torch.OutOfMemoryError:  # says nothing about FlashAttention
        raise
    except (RuntimeError, NotImplementedError) as error:
        return f"FlashAttention fails on this GPU: {str(error).splitlines()[0]}"
    return None if gap < TOLERANCE else f"FlashAttention and sdpa differ by {gap:.2g} on this GPU"


def dtype_problem(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashAttention cannot compute with this dtype; None where it can, and without a GPU, which has none."""
    if device.type == "cpu" or dtype == torch.bfloat16:
        return None
    return f"FlashAttention takes bfloat16, and the model is {str(dtype).removeprefix('torch.')}"


def _no_varlen(problem: str) -> UserError:
    return UserError(f"trainer.attention = 'varlen' does not work here: {problem}; use 'auto' or 'sdpa'")


class _Layer(nn.Module):
    """What an attention function asks of the layer that calls it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def kernel_gap(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference of `varlen` and `sdpa` in one layer's output and gradients."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    prompt, tokens = np.arange(40), 66  # completions of 25 tokens and of 1
    seen = [(40, prompt), (25, np.arange(65)), (1, np.append(prompt, 65))]
    segments, random = Segments.of(seen).to(device), torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    layer = _Layer(heads // groups)
    inputs = [numbers(1, count, tokens, width).requires_grad_() for count in (heads, groups, groups)]
    outer = numbers(1, tokens, heads, width)
    queries, keys, values = inputs
    masked, _ = sdpa_attention_forward(layer, queries, keys, values, segments.mask(tokens, dtype))
    short, _ = varlen(layer, queries, keys, values, None, segments)
    expected = [masked, *torch.autograd.grad(masked, inputs, outer)]
    found = [short, *torch.autograd.grad(short, inputs, outer)]
    return max(_relative(one, other) for one, other in zip(found, expected, strict=True))


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().float().norm() / other.detach().float().norm())


def fuse(wanted: str, model: PreTrainedModel, device: Device) -> str:
    """Puts Liger's norms, rotary embedding and feed-forward into a model, in place. -> what came of it, in words.

    wanted: `trainer.liger`. The rotary embedding is replaced for all models of this kind in the process.
    """
    if wanted == "off":
        return "off, as trainer.liger says"
    if wanted == "auto" and torch.device(device).type == "cpu":
        return "off: no GPU"
    if not _has_liger():
        return "off: liger-kernel is not installed"
    apply_liger_kernel(model, LIGER)
    known = any("forward" in vars(module) for module in model.modules())
    return "on" if known else f"off: it does not know {model.config.model_type} models"


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
