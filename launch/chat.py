"""Talks to a trained model with transformers, in the form in which it was trained."""

import argparse
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from protocol.errors import UserError
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import listed


@runtime_checkable
class Generates(Protocol):
    """A model of transformers that can go on with a text."""

    def generate(self, **settings: Any) -> Any: ...


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser("launch chat", description="Talks to the newest weights of a run, or to a model.")
    flags.add_argument("model", type=Path, help="run directory, snapshot or model directory")
    flags.add_argument("question", nargs="?", help="one question; without it, a conversation")
    options = flags.parse_args(arguments)
    return talk(options.model, options.question)


def talk(path: Path, question: str | None) -> int:
    """Answers one question, or each line from the terminal until an empty one."""
    model_directory, recipe = find(path)
    import torch
    from transformers import BatchEncoding, TextStreamer

    from policy.model import load_model, load_tokenizer, locate

    tokenizer = load_tokenizer(locate(recipe.model) if recipe else model_directory)
    if (model_directory / "adapter_config.json").exists():
        if recipe is None:
            raise UserError(f"{model_directory} is an adapter outside its run; name the run directory")
        model = load_model(locate(recipe.model), recipe.model.dtype)
        model.load_adapter(str(model_directory))
    else:
        model = load_model(model_directory, recipe.model.dtype if recipe else "bfloat16")
    assert isinstance(model, Generates), "every causal language model of transformers does"
    model.eval()
    limit = recipe.sampling.max_tokens if recipe else 512

    def answer(text: str) -> None:
        rendering = rendered(text, recipe)
        ids = tokenizer.apply_chat_template(
            rendering, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert isinstance(ids, BatchEncoding), "return_dict asks for one"
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            model.generate(**ids, max_new_tokens=limit, do_sample=False, use_cache=True, streamer=streamer)

    if question:
        answer(question)
    else:
        while line := ask():
            answer(line)
    return 0


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def find(path: Path) -> tuple[Path, Recipe | None]:
    """The best snapshot of a run, without one the newest, with its recipe, or a model directory. Raises UserError."""
    if (path / "recipe.toml").exists():
        snapshots = listed(path / "snapshots")
        if not snapshots:
            raise UserError(f"{path} has no snapshot yet; has its trainer started?")
        best = RunDir(path).best
        return best.resolve() if best.is_dir() else snapshots[-1], load(path / "recipe.toml")
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise UserError(f"{path} is neither a run directory nor a model directory")
    kept = path.resolve().parent.parent / "recipe.toml"
    return path, load(kept) if kept.exists() else None


def rendered(question: str, recipe: Recipe | None) -> list[dict[str, str]]:
    """The question inside the prompt that the model was trained with."""
    if recipe is None:
        return [{"role": "user", "content": question}]
    data = recipe.data
    system = [{"role": "system", "content": data.system}] if data.system else []
    user = re.sub(r"\{\w+\}", lambda _: question, data.template)
    return [*system, *data.prefix, {"role": "user", "content": user}]
