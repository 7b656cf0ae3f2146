"""How much memory one rank and one sampler engine need at most, part by part. Arithmetic over a model's shape.

All numbers are bytes. What lives all the time is added up; of what comes and goes (the forward and backward pass, the
optimizer's step, writing a snapshot) only the largest counts. Compared with measured peaks in docs/planning.md.
"""

from launch.plan.shape import Shape
from protocol.memory import GIB
from protocol.recipe import Recipe
from trainer.arithmetic import row_tokens
from trainer.zero import bucket

Need = dict[str, float]
"""Bytes by part."""
BYTES = {"bfloat16": 2, "float32": 4}
NF4_BYTES = 0.5 + 4 / 64
"""Four bits and a float32 scale for each 64 weights."""

RANK_BASE = {"cpu": 0.57 * GIB, "gpu": 1.5 * GIB}
"""A rank without a model: Python, torch and DeepSpeed (measured); on a GPU CUDA's context and NCCL (a guess)."""
ENGINE_BASE = {"cpu": 2.25 * GIB, "gpu": 1.5 * GIB}
"""An engine's processes without a model (measured); on a GPU vLLM's context, graphs and workspaces (a guess)."""
SPARE = {"cpu": 1.5, "gpu": 1.1}
"""What comes and goes takes more than its size, because an allocator holds back what it got: on the CPU measured, where
it grows over the first steps; torch's own on a GPU is better at it (a guess)."""
REDUCED = 500_000_000
"""Gradients that DeepSpeed's engine puts side by side to exchange them, under ZeRO 0 and 1; larger tensors go by
themselves, without a copy."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters that ZeRO 3 keeps whole on a rank."""


SHARD_BYTES = 2 << 30
"""Of one file of a snapshot (trainer/publish.py)."""


def trained(shape: Shape, recipe: Recipe) -> int:
    """Parameters that have a gradient."""
    return shape.adapter(recipe.lora) if recipe.lora.rank else shape.parameters


def of_rank(shape: Shape, recipe: Recipe, prompt: int, kind: str) -> Need:
    """One rank of the trainer, for prompts of at most `prompt` tokens. kind: cpu or gpu."""
    tokens = row_tokens(recipe, prompt)
    passing = {
        "activations": SPARE[kind] * activations(shape, recipe, tokens, kind, prompt),
        "logits": SPARE[kind] * logits(shape, recipe, min(tokens, recipe.trainer.logits_chunk)),
    }
    aside = max(_step(shape, recipe, kind), _publish(shape, recipe) if kind == "cpu" else 0)
    return {
        "weights": _weights(shape, recipe),
        "gradients": _gradients(shape, recipe),
        "optimizer": _optimizer(shape, recipe),
        **passing,
        "more in step or snapshot": max(0.0, SPARE[kind] * aside - sum(passing.values())),
        "engine itself": RANK_BASE[kind],
    }


def _weights(shape: Shape, recipe: Recipe) -> float:
    """ZeRO 3 keeps a share, and what it gathers for use."""
    size, world = BYTES[recipe.model.dtype], recipe.trainer.gpus
    adapter = size * trained(shape, recipe) if recipe.lora.rank else 0
    if recipe.model.quantize == "nf4":
        return NF4_BYTES * shape.packed() + size * (shape.parameters - shape.packed()) + adapter
    whole = size * shape.parameters + adapter
    if recipe.trainer.zero_stage == 3 and world > 1:
        return whole / world + size * min(shape.parameters, LIVE)
    return whole


def _gradients(shape: Shape, recipe: Recipe) -> float:
    """Of the model's dtype from autograd, and float32 sums: whole under ZeRO 0 and 1, a rank's share under 2 and 3,
    where autograd's go through a bucket; the largest of them exists beside it."""
    count, size, stage = trained(shape, recipe), BYTES[recipe.model.dtype], recipe.trainer.zero_stage
    if stage == 0:
        return size * count
    if stage == 1 and size == 2:
        return (size + 4) * count
    largest = shape.largest(recipe.lora)
    backend = "nccl" if recipe.trainer.backend == "nccl" else "gloo"  # of `auto` the one that needs more
    buffers = 4 * bucket(recipe, backend, count, largest) + size * largest
    return buffers + (size * count if stage == 1 else 0) + 4 * count / recipe.trainer.gpus


def _optimizer(shape: Shape, recipe: Recipe) -> float:
    """AdamW's two moments in float32 and, but for ZeRO 0, a float32 copy of the weights; divided by the ranks
    (arXiv 1910.02054, section 5)."""
    count = trained(shape, recipe)
    return 8 * count if recipe.trainer.zero_stage == 0 else 12 * count / recipe.trainer.gpus


def activations(shape: Shape, recipe: Recipe, tokens: int, kind: str = "cpu", prompt: int = 0) -> float:
    """What autograd keeps of a forward pass: of all layers, or with checkpointing their inputs and one layer whole."""
    layer, mask = _layer(shape, recipe, tokens, kind, prompt)
    if recipe.trainer.gradient_checkpointing:
        return BYTES[recipe.model.dtype] * tokens * shape.hidden * shape.layers + layer + mask
    return shape.layers * layer + mask


def _layer(shape: Shape, recipe: Recipe, tokens: int, kind: str, prompt: int) -> tuple[float, float]:
    """Bytes of one layer, and of the mask that all layers share.

    Counted along transformers' Llama and Qwen layers, in values of the model's dtype for a token: the inputs of the
    linear layers, queries, keys and values, the attention's output twice, four of the feed-forward's width, and in
    both norms one value and one in float32. `sdpa` repeats keys and values for all heads; `varlen` has no mask, and
    the prompt's keys and values once more for each completion; without a GPU these in float32, and the attention
    itself.
    """
    size = BYTES[recipe.model.dtype]
    attention, mask = size * (3 * shape.query + 2 * shape.key), size * tokens**2
    if varlen(recipe, kind):
        longest = recipe.sampling.max_tokens
        seen, mask = (prompt + longest) / longest, 0
        attention = size * (shape.query + 2 * shape.key * (1 + seen))
        if kind == "cpu":
            attention = 4 * (shape.query + 2 * shape.key * seen + shape.heads * (prompt + longest))
    values = 2 * shape.hidden + 2 * shape.query + 4 * shape.inner
    return tokens * (size * values + attention + 2 * (size + 4) * shape.hidden), mask


def varlen(recipe: Recipe, kind: str) -> bool:
    """Whether a rank will compute attention so, as far as settings tell (policy/kernels.py)."""
    chosen, dtype = recipe.trainer.attention, recipe.model.dtype
    return chosen == "varlen" or (chosen == "auto" and (kind == "cpu" or dtype == "bfloat16"))


def logits(shape: Shape, recipe: Recipe, positions: int) -> float:
    """Three float32 tables over the vocabulary; and the output layer's gradient, where it is trained."""
    gradient = 0 if recipe.lora.rank else BYTES[recipe.model.dtype] * shape.vocabulary * shape.hidden
    return 12 * positions * shape.vocabulary + gradient


def _step(shape: Shape, recipe: Recipe, kind: str) -> float:
    """The copy that torch's AdamW makes of the second moment; none on CPUs (fused). Or those of gradients, if more."""
    share = recipe.trainer.gpus if recipe.trainer.zero_stage else 1
    moments = 0 if kind == "cpu" else 4 * trained(shape, recipe) / share
    return max(moments, _exchange(shape, recipe) if recipe.trainer.gpus > 1 else 0)


def _exchange(shape: Shape, recipe: Recipe) -> float:
    """Float32 copies of gradients that are exchanged together; under ZeRO 1 in bfloat16 large models need none, because
    all their sums are one tensor."""
    count, stage, largest = trained(shape, recipe), recipe.trainer.zero_stage, shape.largest(recipe.lora)
    if stage == 0:
        return 4 * min(count, REDUCED + largest)
    if stage == 1 and recipe.model.dtype == "bfloat16":
        return 4 * count if count <= REDUCED else 0
    return 4 * largest


def _publish(shape: Shape, recipe: Recipe) -> float:
    """Host memory: a shard three times, as tensors, as bytes of each, and as the bytes of the file."""
    return 3 * min(BYTES[recipe.model.dtype] * trained(shape, recipe), SHARD_BYTES)


def of_host(shape: Shape, recipe: Recipe) -> float:
    """Of the machine with GPUs, for all ranks and engines together: each loads the model on the CPU first."""
    model = BYTES[recipe.model.dtype] * shape.parameters
    ranks = recipe.trainer.gpus * (3 * GIB + model + _pinned(shape, recipe)) + _publish(shape, recipe)
    return ranks + recipe.sampler.gpus * (6 * GIB + 2 * model)


def _pinned(shape: Shape, recipe: Recipe) -> float:
    """What gloo copies CUDA tensors through, of one rank. torch keeps it, in powers of two: up to twice the size."""
    if recipe.trainer.backend != "gloo" or recipe.trainer.gpus == 1:
        return 0
    count, stage = trained(shape, recipe), recipe.trainer.zero_stage
    gradients = 4 * (count if stage <= 1 else max(bucket(recipe, "gloo", count, 0), shape.largest(recipe.lora)))
    weights = {0: 0, 3: shape.vocabulary * shape.hidden}.get(stage, count)
    return 2 * (gradients + BYTES[recipe.model.dtype] * weights)


def completion_bytes(shape: Shape, recipe: Recipe, tokens: int) -> float:
    """KV cache of so many tokens on one GPU: a key and a value in each layer."""
    return 2 * shape.layers * shape.key * BYTES[recipe.model.dtype] * tokens / recipe.sampler.tensor_parallel


def has_reference(recipe: Recipe) -> bool:
    return recipe.objective.kl_beta > 0 and not recipe.lora.rank


def of_engine(shape: Shape, recipe: Recipe, prompt: int, device: float | None) -> Need:
    """One sampler engine: on a GPU of `device` bytes, each of its GPUs; on a CPU (None) all its processes.

    vLLM takes its share of a GPU whole, and what is left in it beside the weights is KV cache.
    """
    size, width = BYTES[recipe.model.dtype], recipe.sampler.tensor_parallel
    model = size * shape.parameters
    base, weights = ENGINE_BASE["cpu" if device is None else "gpu"], model / width
    if recipe.lora.rank:
        weights += size * trained(shape, recipe) / width
    parts = {"weights": weights, "engine itself": base}
    if device is None:
        parts["KV cache"] = recipe.sampler.cpu_kv_cache_gb * GIB
        parts["more in step or snapshot"] = size * trained(shape, recipe)  # read and verified beside the old weights
    else:
        parts["KV cache"] = recipe.sampler.gpu_memory * device - base - weights
    if has_reference(recipe):
        parts["reference"] = model + _reference(shape, recipe, prompt, "cpu" if device is None else "gpu")
    return parts


def _reference(shape: Shape, recipe: Recipe, prompt: int, kind: str) -> float:
    """One layer and the logits of one group."""
    completions = recipe.sampling.group_size * recipe.sampling.max_tokens
    tokens = min(recipe.trainer.tokens_per_micro_batch, prompt + completions)
    scored = min(recipe.trainer.logits_chunk, tokens)
    return sum(_layer(shape, recipe, tokens, kind, prompt)) + 12 * scored * shape.vocabulary
