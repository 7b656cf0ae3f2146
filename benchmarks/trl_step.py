"""TRL's GRPOTrainer on our recipe: one process that leaves one record a step.

    python -m benchmarks.trl_step recipe.toml records.jsonl --fixed
    python -m benchmarks.trl_step recipe.toml records.jsonl --vllm --patched

Model, prompts and their order, reward, lengths, group size, learning rate and dtype are the recipe's; a record has
`time_s` (epoch, at the end of the optimizer step), `step`, and figures named as in metrics/trainer.jsonl.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from protocol.metrics import MetricsWriter
from protocol.process import die_with_parent
from protocol.recipe import Recipe
from protocol.resolve import load


def main(arguments: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.trl_step", description=__doc__.splitlines()[0])
    flags.add_argument("recipe", type=Path)
    flags.add_argument("records", type=Path)
    flags.add_argument("--vllm", action="store_true", help="colocated vLLM, else transformers generate")
    flags.add_argument("--patched", action="store_true", help="with a weight update that vLLM's CPU backend survives")
    flags.add_argument("--fixed", action="store_true", help="all completions have sampling.max_tokens tokens")
    flags.add_argument("--uncorrected", action="store_true", help="no forward pass for the sampler's mismatch")
    flags.add_argument("--rows", type=int, default=8, help="completions in one forward pass")
    options = flags.parse_args(arguments)
    die_with_parent()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; else vLLM takes its share of all memory
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else training gets one core
    train(load(options.recipe), options)


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    """`trainer.steps` steps."""
    from datasets import Dataset  # engines, only now
    from trl import GRPOTrainer

    from benchmarks.vowels import vowels
    from policy.model import load_tokenizer, locate

    if options.patched:
        patch_weight_update()
    directory = locate(recipe.model)
    tokenizer = load_tokenizer(directory)
    with MetricsWriter(options.records) as writer:
        trainer = GRPOTrainer(
            model=str(directory),
            reward_funcs=vowels,
            args=configuration(recipe, options),
            train_dataset=Dataset.from_list(prompts(recipe, tokenizer)),
            processing_class=tokenizer,
            callbacks=[stamps(writer, trainer_rollouts(recipe))],
        )
        trainer.train()


def trainer_rollouts(recipe: Recipe) -> int:
    return recipe.trainer.prompts_per_step * recipe.sampling.group_size


def prompts(recipe: Recipe, tokenizer) -> list[dict]:
    """The messages of our prompts in the order in which our ledger hands them out."""
    from sampler.prompts import load_prompts
    from trainer.ledger import Ledger

    rows = load_prompts(recipe.data.train, recipe.data.limit, recipe.data, tokenizer)
    count = recipe.trainer.steps * recipe.trainer.prompts_per_step
    ledger = Ledger(rows=len(rows), per_step=count, max_staleness=0, lease_s=1.0, seed=recipe.seed)
    return [{"prompt": rows[ledger.row(group)].messages} for group in range(count)]


def configuration(recipe: Recipe, options: argparse.Namespace):
    """GRPOConfig: what the recipe says in TRL's words, and nothing on the side (no saving, no reports)."""
    from trl import GRPOConfig

    sampling, optimizer = recipe.sampling, recipe.optimizer
    bfloat16 = recipe.model.dtype == "bfloat16"
    ends = {"ignore_eos": True} if options.vllm else {"min_new_tokens": sampling.max_tokens}
    return GRPOConfig(
        output_dir=str(options.records.parent / "trl"),
        model_init_kwargs={"dtype": recipe.model.dtype},
        bf16=bfloat16,
        use_cpu=True,
        seed=recipe.seed,
        shuffle_dataset=False,
        num_generations=sampling.group_size,
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=trainer_rollouts(recipe) // options.rows,
        max_completion_length=sampling.max_tokens,
        temperature=sampling.temperature,
        generation_kwargs=ends if options.fixed else None,
        beta=recipe.objective.kl_beta,
        loss_type="dapo",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        gradient_checkpointing=recipe.trainer.gradient_checkpointing,
        use_vllm=options.vllm,
        vllm_mode="colocate",
        vllm_max_model_length=recipe.data.max_prompt_tokens + sampling.max_tokens,
        vllm_importance_sampling_correction=not options.uncorrected,
        max_steps=recipe.trainer.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def patch_weight_update() -> None:
    """Replaces the colocated branch of `VLLMGeneration.sync_weights` (TRL 1.16, generation/vllm_generation.py).

    There each parameter goes through the model's own `load_weights`. vLLM's CPU backend has packed the linear layers by
    then and dropped their weights, so TRL unmodified ends with "'Parameter' object has no attribute 'weight_loader'"
    before its first rollout. Here all go through `reload_weights` of vLLM's worker, which packs them again; the output
    layer, tied to the embedding, is not among them and is packed on top. Nothing else of TRL is touched.
    """
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def sync_weights(self) -> None:
        worker = self.llm.llm_engine.model_executor.driver_worker
        worker.reload_weights(weights_iterator=self._iter_named_params())
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
        self.llm.reset_prefix_cache()

    VLLMGeneration.sync_weights = sync_weights


def stamps(writer: MetricsWriter, rollouts: int):
    """A callback that writes a record when a step has ended, with what TRL logs of it."""
    from transformers import TrainerCallback

    class Stamps(TrainerCallback):
        ended = 0.0

        def on_step_end(self, args, state, control, **_) -> None:
            self.ended = time.time()

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if not logs or "completions/mean_length" not in logs:
                return  # the summary at the end
            writer.write({
                "kind": "step", "step": state.global_step, "time_s": self.ended,
                "completions/tokens": rollouts * logs["completions/mean_length"],
                "frac_reward_zero_std": logs["frac_reward_zero_std"], "reward_std": logs["reward_std"],
                "sampling/sampling_logp_difference/mean": logs.get("sampling/sampling_logp_difference/mean", 0.0),
            })  # fmt: skip

    return Stamps()


if __name__ == "__main__":
    main()
