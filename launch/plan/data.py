"""`python -m launch data check RECIPE`: a data set as the sampler will see it, before anything is trained."""

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from launch.plan.lengths import all_prompts, doubts, lengths, refusals
from launch.plan.shape import described
from launch.plan.verdict import Verdict
from protocol.cli import CONTROL
from protocol.errors import UserError
from protocol.recipe import Recipe
from protocol.resolve import load

if TYPE_CHECKING:
    from sampler.prompts import Prompt

WIDTH = 118
Sources = Sequence[tuple[str, "list[Prompt]"]]
"""Training first."""


class Check(Verdict):
    """Of the sources of one recipe, with its model's tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        from policy.model import load_tokenizer

        super().__init__()
        self.recipe = recipe
        self.directory, _ = described(recipe.model)
        self.tokenizer = load_tokenizer(self.directory)

    def rows(self, source: str, limit: int) -> "list[Prompt]":
        """The prompts of a source, [] where they cannot be made."""
        try:
            prompts = all_prompts(source, limit, self.recipe.data, self.tokenizer)
        except UserError as error:
            self.refused.append(str(error))
            return []
        self.say("data", f"{source}: {len(prompts)} rows with the columns {', '.join(prompts[0].columns)}")
        return prompts

    def lengths(self, prompts: "Sources") -> None:
        """Of the prompts of each source, and of the solutions in `answer`: what completions must have room for."""
        data, most = self.recipe.data, self.recipe.sampling.max_tokens
        context = _context(self.directory)
        found = [(source, lengths([len(one.ids) for one in rows], data.max_prompt_tokens)) for source, rows in prompts]
        for (source, rows), (_, size) in zip(prompts, found, strict=True):
            self.say("prompts", f"{source}: {size.words()}; at most {data.max_prompt_tokens} allowed")
            texts = [prompt.columns["answer"] for prompt in rows if isinstance(prompt.columns.get("answer"), str)]
            if not texts:
                continue
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            solutions = lengths([*map(len, ids)], most)
            self.say("answers", f"{source}: {solutions.words()}; completions have at most {most}")
            if solutions.too_long > len(ids) // 20:
                self.doubtful.append(
                    f"{source}: {solutions.too_long} of {len(ids)} answers are longer than sampling.max_tokens = "
                    f"{most}, where completions are cut; {solutions.most_of} has room for 95 % of them"
                )
        self.refused += refusals(found, self.recipe, context)
        self.doubtful += doubts(found, self.recipe)

    def answers(self, source: str, prompts: "Sequence[Prompt]") -> None:
        """Whether the reward `gsm8k` finds a number in each row."""
        from sampler.rewards.answers import gold

        if all(reward.function != "gsm8k" or "answer" in reward.options for reward in self.recipe.reward):
            return
        if "answer" not in prompts[0].columns:
            self.refused.append(f"{source}: reward gsm8k needs the column 'answer'")
            return
        bare = [index for index, prompt in enumerate(prompts) if gold(str(prompt.columns["answer"])) is None]
        if bare:
            self.doubtful.append(
                f"{source}: {len(bare)} of {len(prompts)} answers hold no number, so the reward gsm8k does not apply; "
                f"the first is row {bare[0]} (from 0): {str(prompts[bare[0]].columns['answer'])!r:.60}"
            )

    def repeats(self, prompts: "Sources") -> None:
        """The same tokens twice within a source, or in both."""
        for source, rows in prompts:
            counts = Counter(prompt.ids.tobytes() for prompt in rows)
            twice = len(rows) - len(counts)
            if twice:
                first = next(index for index, prompt in enumerate(rows) if counts[prompt.ids.tobytes()] > 1)
                self.doubtful.append(f"{source}: {twice} prompts are repetitions, the first of row {first} (from 0)")
        if len(prompts) == 2 and self.recipe.data.train != self.recipe.data.eval:  # else it is said anyway
            (train, rows), (held_out, others) = prompts
            known = {prompt.ids.tobytes() for prompt in rows}
            both = [index for index, prompt in enumerate(others) if prompt.ids.tobytes() in known]
            if both:
                self.doubtful.append(
                    f"{len(both)} of {len(others)} prompts of {held_out} are in {train} too, the first is row "
                    f"{both[0]} (from 0): held-out accuracy would count what was trained"
                )

    def demonstrations(self, prompts: "Sequence[Prompt]") -> None:
        """Objective `sft`: whether each row becomes one."""
        from sampler.demonstrations import demonstrated
        from sampler.sampling import end_tokens

        recipe = self.recipe
        ends = end_tokens(recipe, self.directory, self.tokenizer)
        try:
            made = demonstrated(prompts, recipe.data, self.tokenizer, ends, recipe.sampling.max_tokens)
        except UserError as error:
            self.refused.append(str(error))
            return
        found = lengths([len(one.demonstration) for one in made if one.demonstration is not None], 0)
        self.say("learned", f"{found.words()}; at most {recipe.sampling.max_tokens} allowed")
        self.say("", f"the first: {made[0].demonstration_text!r}")

    def first(self, prompt: "Prompt") -> None:
        """What the model reads: the text, each token, and what ends its answer."""
        from sampler.sampling import closing_token, end_tokens

        self.say("prompt", f"the first, {len(prompt.ids)} tokens:")
        print(textwrap.indent(str(self.tokenizer.decode(prompt.ids.tolist())).translate(CONTROL), "    "))
        self.say("tokens", "id and text of each:")
        print(_wrapped([self._pair(token) for token in prompt.ids.tolist()]))
        ends, sampling = end_tokens(self.recipe, self.directory, self.tokenizer), self.recipe.sampling
        self.say(
            "ends",
            ", ".join([*map(self._pair, ends), *map(repr, sampling.stop + sampling.stop_after)]) or "only the limit",
        )
        closing = closing_token(self.tokenizer)
        if closing is not None and closing not in ends:
            self.doubtful.append(
                f"the chat template closes a turn with {self.tokenizer.decode([closing])!r}, which ends no completion: "
                f"set sampling.stop_token_ids = [{closing}]"
            )

    def _pair(self, token: int) -> str:
        return f"{token}:{self.tokenizer.decode([token])!r}"


def _wrapped(pairs: list[str]) -> str:
    """Lines that break between pairs, not at the space that many tokens begin with."""
    text = " ".join(pair.translate(CONTROL).replace(" ", "\xa0") for pair in pairs)
    lines = textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return lines.replace("\xa0", " ")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    check = Check(load(options.file, options.overrides))
    data = check.recipe.data
    sources = [(data.train, data.limit), (data.eval, data.eval_limit)]
    if options.data:
        sources = [(options.data, 0)]
        check.recipe = replace(check.recipe, data=replace(data, train=options.data, eval=""))
    prompts = [(source, rows) for source, limit in sources if source and (rows := check.rows(source, limit))]
    if prompts:
        check.lengths(prompts)
        for source, rows in prompts:
            check.answers(source, rows)
        check.repeats(prompts)
        source, rows = prompts[0]
        if check.recipe.objective.name == "sft" and source == check.recipe.data.train:
            check.demonstrations(rows)
        check.first(rows[0])
    return check.end("training takes this data")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser("launch data", description=__doc__)
    check = flags.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="rows, lengths, answers, repetitions, the first prompt with its token ids",
        epilog="Exit code: 0 training takes the data, 2 it refuses them.",
    )
    check.add_argument("file", type=Path, metavar="RECIPE", help="whose model, template and limits hold")
    check.add_argument("--data", metavar="SOURCE", help="look at these rows instead of data.train and data.eval")
    check.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    return flags


def _context(directory: Path) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory).max_position_embeddings
