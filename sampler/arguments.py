"""What vLLM is started with: the recipe in its words."""

from pathlib import Path

from policy.canary import LENGTH
from policy.model import adapted
from protocol.recipe import Recipe

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told to be ready for."""
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The model computes in the scheduler's process, as on one GPU. By itself vLLM gives it another one on CPUs, to set its
OpenMP variables there (`environments` does), and each of the two spins on a core while the other works."""


def engine_arguments(recipe: Recipe, directory: Path, gpu: bool, seed: int) -> dict:
    """vLLM's settings. Log-probs are processed (temperature included), as the trainer computes them."""
    sampler, sampling, lora = recipe.sampler, recipe.sampling, recipe.lora
    arguments = {
        "model": str(directory),
        "dtype": recipe.model.dtype,
        "seed": seed,
        "max_model_len": max(2 * LENGTH, recipe.data.max_prompt_tokens + sampling.max_tokens),
        "max_num_seqs": sampler.max_running,
        "tensor_parallel_size": sampler.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": not sampler.compile,
        "enable_prefix_caching": True,
        "worker_extension_cls": "sampler.worker.SnapshotWorker",
        "disable_log_stats": False,
        "trust_remote_code": False,
        "generation_config": "auto",
    }
    if gpu:
        arguments["gpu_memory_utilization"] = sampler.gpu_memory
    else:  # the CPU backend takes blocks of 32 tokens and multiples; its default is too long to share short prompts
        arguments |= {"kv_cache_memory_bytes": int(sampler.cpu_kv_cache_gb * 2**30), "block_size": 32}
        if sampler.tensor_parallel == 1:
            arguments["distributed_executor_backend"] = IN_PROCESS
    if lora.rank:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": next(size for size in LORA_RANKS if size >= lora.rank),
            "max_loras": 1,
            # Else it wraps the output layer of Llama and Qwen3 too, and dies of two prompts' log-probs in one step.
            "lora_target_modules": adapted(directory, lora),
        }
    return arguments
