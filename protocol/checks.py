"""Settings that contradict each other, or that the mathematics or an engine cannot do: refused before a model loads."""

import ipaddress
import math
import re
import socket

import msgspec

from protocol.errors import UserError
from protocol.recipe import Objective, Recipe

GROUPWISE = ("group", "mean", "rloo", "batch")
"""Advantages that are 0 in a group whose rewards are all equal."""
FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Settings of `sampling` that change the distribution, where they do not."""


def check(recipe: Recipe) -> None:
    """Raises UserError, one line for the first contradiction."""
    if endless := _not_finite(msgspec.to_builtins(recipe)):
        raise UserError(f"{endless} is not finite; every number of a recipe must be")
    _check_places(recipe)
    _check_weights(recipe)
    (_check_demonstrations if recipe.objective.name == "sft" else _check_groups)(recipe)
    _check_objective(recipe)
    _check_sampling(recipe)
    _check_evaluation(recipe)


def _check_places(recipe: Recipe) -> None:
    """Where things run, listen and are kept."""
    sampler, network = recipe.sampler, recipe.network
    if sampler.gpus % sampler.tensor_parallel:
        raise UserError(
            f"sampler.gpus = {sampler.gpus} is no multiple of sampler.tensor_parallel = {sampler.tensor_parallel}"
        )
    if _is_everywhere(network.bind):
        raise UserError(f"network.bind = {network.bind!r} listens everywhere; name one address of this machine")
    if network.beat_s >= network.dead_s:
        raise UserError(f"network.beat_s = {network.beat_s} must be below network.dead_s = {network.dead_s}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", recipe.name):
        raise UserError(f"name = {recipe.name!r} names a directory: use letters, digits, '.', '_' and '-'")


def _check_weights(recipe: Recipe) -> None:
    """What DeepSpeed and vLLM can do with them."""
    trainer = recipe.trainer
    if recipe.model.dtype == "bfloat16" and trainer.zero_stage == 0:
        raise UserError(
            "trainer.zero_stage = 0 with model.dtype = 'bfloat16' is not exact in DeepSpeed (it takes one Adam step "
            "at start); use zero_stage = 1 or dtype = 'float32'"
        )
    if recipe.model.quantize != "none" and (not recipe.lora.rank or trainer.zero_stage == 3):
        raise UserError(
            f"model.quantize = {recipe.model.quantize!r} trains adapters beside a frozen base: set lora.rank, and "
            "trainer.zero_stage below 3, which cannot divide packed weights"
        )
    if recipe.lora.rank > 512:
        raise UserError(f"lora.rank = {recipe.lora.rank}: vLLM serves adapters up to rank 512")


def _check_demonstrations(recipe: Recipe) -> None:
    objective, sampling = recipe.objective, recipe.sampling
    if sampling.group_size != 1 or objective.kl_beta or not recipe.data.demonstration:
        raise UserError(
            "objective.name = 'sft' learns from demonstrations: set data.demonstration, sampling.group_size = 1 "
            "and objective.kl_beta = 0"
        )
    if sampling.temperature != 1:
        raise UserError("objective.name = 'sft' learns at temperature 1: remove sampling.temperature")
    plain = Objective(name="sft", kl_beta=0.0)
    useless = [name for name in plain.__struct_fields__ if getattr(objective, name) != getattr(plain, name)]
    if useless:
        raise UserError(f"objective.{useless[0]} has no use with objective.name = 'sft'; remove it")
    if recipe.trainer.refill:
        raise UserError("trainer.refill has no use with objective.name = 'sft', which has no groups; set refill = 0")


def _check_groups(recipe: Recipe) -> None:
    """What compares completions needs something to compare."""
    if recipe.sampling.group_size == 1:
        raise UserError("sampling.group_size = 1 has no group to compare with; use 2 or more")
    if recipe.trainer.refill and recipe.objective.advantage_name not in GROUPWISE:
        raise UserError(
            f"trainer.refill drops groups whose rewards are all equal, but with objective.advantage = "
            f"{recipe.objective.advantage_name!r} they may teach something; set refill = 0"
        )


def _check_objective(recipe: Recipe) -> None:
    """What the loss cannot be right with."""
    objective = recipe.objective
    if not recipe.reward:
        raise UserError("the recipe has no [[reward]]; name at least one function")
    if objective.dual_clip and objective.name == "cispo":
        raise UserError(
            "objective.dual_clip has no use with objective.name = 'cispo', whose clip_high bounds all ratios"
        )
    if 0 < objective.dual_clip <= 1:
        raise UserError(f"objective.dual_clip = {objective.dual_clip} must be above 1, or 0 for none")
    if objective.correction_floor and not objective.correction.endswith("mask"):
        raise UserError(f"objective.correction_floor has no use with objective.correction = {objective.correction!r}")
    narrow = objective.name == "gspo" and None in (objective.clip_low, objective.clip_high)
    if narrow and recipe.model.dtype == "bfloat16" and not objective.recompute_old_logprobs:
        raise UserError(
            "objective.name = 'gspo' clips at 3e-4, which is less than two engines' rounding in bfloat16: set "
            "objective.recompute_old_logprobs = true, or objective.clip_low and clip_high (0.02 for example)"
        )


def _check_sampling(recipe: Recipe) -> None:
    """That the policy that samples is the one that is trained, and where completions end."""
    objective, sampling = recipe.objective, recipe.sampling
    filtered = [name for name, off in FILTERS.items() if getattr(sampling, name) != off]
    if filtered and not (objective.recompute_old_logprobs and objective.correction == "none"):
        raise UserError(
            f"sampling.{filtered[0]} = {getattr(sampling, filtered[0])} samples from another policy than the one that "
            f"is trained, and its log-probs bias every importance weight; leave it at {FILTERS[filtered[0]]}, or set "
            f"objective.recompute_old_logprobs = true and objective.correction = 'none' to train without them"
        )
    if min(sampling.temperature, recipe.eval.temperature or 1.0) < 0.01:
        raise UserError(
            "vLLM raises temperatures below 0.01 to 0.01; set 0.01 or more, or eval.temperature = 0 (greedy)"
        )
    if both := set(sampling.stop) & set(sampling.stop_after):
        raise UserError(f"{min(both)!r} is in sampling.stop and in sampling.stop_after; keep one of them")
    if "" in sampling.stop + sampling.stop_after:
        raise UserError('sampling.stop and sampling.stop_after cannot hold "": every text contains it')


def _check_evaluation(recipe: Recipe) -> None:
    if recipe.eval.samples > 1 and not recipe.eval.temperature:
        raise UserError(
            f"eval.samples = {recipe.eval.samples} at eval.temperature = 0 are {recipe.eval.samples} times the same; "
            "raise the temperature, or set samples = 1"
        )
    if recipe.eval.patience and not recipe.eval.every:
        raise UserError("eval.patience counts evaluations during training; set eval.every too")


def _is_everywhere(address: str) -> bool:
    """Whether a bind to `address` would listen on all addresses, in any spelling that a socket understands: `0`,
    `0x0` and `::ffff:0.0.0.0` do as well as `0.0.0.0`. Names are left to the Hub, which looks at what it got."""
    bare = address.strip().strip("[]").rstrip(".")
    if bare in ("", "*"):
        return True
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        try:
            return socket.inet_aton(bare) == bytes(4)
        except (OSError, ValueError):
            return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_unspecified


def _not_finite(value: object, name: str = "") -> str | None:
    """`table.key` of the first number that is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return name
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_not_finite(item, f"{name}.{key}".lstrip(".")) for key, item in items)
    return next((one for one in found if one), None)
