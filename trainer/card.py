"""The model card of an exported snapshot: where it comes from and how to ask it."""

from pathlib import Path

from protocol.evaluation import Evaluation, summary
from protocol.recipe import Recipe
from protocol.snapshot import Manifest
from trainer.verify import Verified

CARD = """\
---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [{objective}]
---

# {run}, step {step}

| | |
|---|---|
| base model | {model} |
| trained | {trained} |
| run | {run}, step {step}, snapshot {snapshot} |
| objective | {objective}, KL weight {kl} |
| data | {data} |
| rewards | {rewards} |
| weights | {tensors} tensors, {size:.2f} GB, {dtype} |
{accuracy}| check | log-probs of fixed texts within {gap:.4f} nats of the trainer's on average |

`vllm serve DIR` and `AutoModelForCausalLM.from_pretrained(DIR)` load this directory. The prompts that it was trained
with are rendered with its chat template: {system}, user message `{template}`.
"""


def model_card(manifest: Manifest, recipe: Recipe, verified: Verified, evaluation: Evaluation | None) -> str:
    """Markdown with the front matter that the hub reads; of local files it gives names and no paths."""
    model, objective = recipe.model, recipe.objective
    local = is_local(model.path)
    revision = f" at {model.revision}" if model.revision else ""
    system = f"system message `{' '.join(recipe.data.system.split())}`" if recipe.data.system else "no system message"
    return CARD.format(
        base="" if local else f"base_model: {model.path}\n",
        model=public(model.path) + revision,
        trained=f"adapters of rank {recipe.lora.rank}, merged" if manifest.kind == "adapter" else "all weights",
        run=recipe.name,
        step=manifest.step,
        snapshot=manifest.id,
        objective=objective.name,
        kl=f"{objective.kl_beta:g}",
        data=public(recipe.data.train),
        rewards=", ".join(f"{public(reward.function)} ({reward.weight:g})" for reward in recipe.reward),
        tensors=verified.tensors,
        size=verified.size / 1e9,
        dtype=recipe.model.dtype,
        accuracy=accuracy_row(evaluation) if evaluation else "",
        gap=verified.gap,
        system=system,
        template=recipe.data.template,
    )


def accuracy_row(evaluation: Evaluation) -> str:
    figures = summary(evaluation)
    interval, temperature = f"[{figures['low']:.3f}, {figures['high']:.3f}] (95 %)", evaluation.sampling.temperature
    prompts = f"{figures['n']} prompts of {public(evaluation.data)}"
    return f"| held-out accuracy | {figures['accuracy']:.3f} {interval}, {prompts}, temperature {temperature:g} |\n"


def is_local(path: str) -> bool:
    """Whether a setting names a file or directory, and no hub id or built-in name."""
    return path.startswith(("/", "~", ".")) or "/" not in path or Path(path).exists()


def public(path: str) -> str:
    return Path(path).name if is_local(path) else path
