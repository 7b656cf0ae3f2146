"""The engines of `benchmarks.sampler`, each in a process of its own: bare `vllm.LLM`, and the sampler's own parts.

Bare vLLM is what it makes of itself, but for what the sampler's recipe sets: model, dtype, seed, longest sequence,
sequences at once, size of the KV cache, its blocks of 32 tokens (without a GPU), prefix caching, compilation, number of
threads, sampling. Each measurement answers other prompts, so that none finds another's in the prefix cache.
"""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.child import WIRE_ROWS, answer, private_output
from policy.agreement import agree
from policy.model import load_tokenizer, locate
from protocol.keys import open_keys
from protocol.messages import DataSet, Pulse
from protocol.metrics import MetricsWriter
from protocol.process import die_with_parent
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id
from sampler.answer import Answerer
from sampler.arguments import engine_arguments
from sampler.engine import Engine, sampling_parameters
from sampler.link import Link
from sampler.loop import sample
from sampler.prompts import Prompt, fingerprint, load_prompts
from sampler.reference import Reference
from sampler.rewards.pool import RewardPool
from sampler.sampling import end_tokens, settings
from sampler.session import Load, Session

OURS = {"worker_extension_cls", "logprobs_mode", "disable_log_stats"}
"""Arguments that `vllm.LLM` has no use for: the second costs time in each step, also without log-probs, and so does the
third, which counts."""
WITHOUT = {"bare": OURS | {"distributed_executor_backend"}, "in-process": OURS}


def sampling(recipe: Recipe, directory: Path, fixed: bool) -> tuple[dict, list[int]]:
    """Settings in vLLM's words, and the tokens that end a completion. fixed: nothing but `sampling.max_tokens` does."""
    found = settings(recipe, "train")
    if fixed:
        return found | {"ignore_eos": True, "stop": []}, []
    return found, end_tokens(recipe, directory, load_tokenizer(directory))


def plain(recipe: Recipe, directory: Path, fixed: bool) -> SamplingParams:
    """As the recipe samples, without log-probs."""
    found, ends = sampling(recipe, directory, fixed)
    return SamplingParams(**found, stop_token_ids=ends, output_kind=RequestOutputKind.FINAL_ONLY)


class MeasuredEngine(Engine):
    """Also samples without log-probs, and if asked to the full length."""

    def __init__(self, recipe: Recipe, directory: Path, *, fixed: bool) -> None:
        super().__init__(recipe, directory, directory, gpu=torch.cuda.is_available(), seed=recipe.seed)
        self._parameters["train"] = sampling_parameters(*sampling(recipe, directory, fixed))
        self._plain = plain(recipe, directory, fixed)

    async def without_logprobs(self, prompt: Prompt) -> int:
        """Through AsyncLLM and no further. -> tokens."""
        output = await self._request(prompt.ids.tolist(), self._plain)
        return sum(len(one.token_ids) for one in output.outputs)

    async def with_logprobs(self, prompt: Prompt) -> int:
        return sum(len(one.tokens) for one in await self.generate(prompt.ids, "train"))


class Unchanged:
    """Takes every notice of new weights for one of the weights that the engine has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def load(self, pulse: Pulse) -> None:
        await self._engine.switch(lambda: asyncio.sleep(0), pulse.snapshot)
        self._engine.weights.trust(pulse.snapshot)


class Sampler:
    """The sampler's parts around one engine; `measure` runs one variant."""

    def __init__(self, recipe: Recipe, directory: Path, run: Path, fixed: bool) -> None:
        self._recipe, self._rundir, self._directory = recipe, RunDir(run), directory
        self._tokenizer = load_tokenizer(directory)
        prompts = load_prompts(recipe.data.train, recipe.data.limit, recipe.data, self._tokenizer)
        self._prompts, self._leased = prompts[:-WIRE_ROWS], prompts[-WIRE_ROWS:]
        self._engine = MeasuredEngine(recipe, directory, fixed=fixed)
        self._variants: dict[str, Callable[[int], Awaitable[int]]] = {}

    async def serve(self, out) -> None:
        recipe = self._recipe
        async with RewardPool(recipe.reward, recipe.sampler.reward_workers) as rewards, self._engine:
            self._engine.weights.trust(snapshot_id(0, 1))
            with MetricsWriter(self._rundir.rollouts / "rollouts.jsonl") as rollouts:
                session = self._session()

                def answerer(reference: Reference | None, prompts: list[Prompt]) -> Answerer:
                    vocabulary = self._agreement.vocabulary
                    sets = {"train": prompts}
                    return Answerer(recipe, session.name, vocabulary, sets, self._engine, rewards, reference, rollouts)

                rewarded = answerer(None, self._prompts)
                device = "cuda" if torch.cuda.is_available() else "cpu"
                referenced = answerer(Reference(recipe, self._directory, device), self._prompts)
                self._variants = {
                    "AsyncLLM": lambda row: self._engine.without_logprobs(self._prompts[row]),
                    "log-probs": lambda row: self._engine.with_logprobs(self._prompts[row]),
                    "rewards": lambda row: _answered(rewarded, row),
                    "reference": lambda row: _answered(referenced, row),
                }
                trainer = Link(self._rundir, open_keys(self._rundir.keys), recipe, session)
                leased = sample(trainer, Unchanged(self._engine), answerer(None, self._leased))
                wire = asyncio.create_task(leased)
                await self._take_turns(out)
                trainer.stop()
                await wire

    async def _take_turns(self, out) -> None:
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            answer(out, await self._measure(**request) if request else {"rows": len(self._prompts)})

    async def _measure(self, variant: str, first: int, count: int) -> dict[str, float]:
        start = time.perf_counter()
        tokens = await asyncio.gather(*(self._variants[variant](first + row) for row in range(count)))
        return {"tokens": sum(tokens), "seconds": time.perf_counter() - start}

    def _session(self) -> Session:
        keys = open_keys(self._rundir.keys)
        self._agreement = agree(keys.run_id, self._directory, self._tokenizer, self._recipe)
        group, most = self._recipe.sampling.group_size, 2 * self._recipe.sampler.max_running

        def wanted(held: set) -> Load:
            return Load(self._engine.weights.snapshot, max(0, most - group * len(held)), self._engine.tokens)

        sets = {"train": DataSet(rows=len(self._leased), fingerprint=fingerprint(self._leased))}
        sets["eval"] = DataSet(rows=0, fingerprint=fingerprint([]))
        return Session(secrets.token_hex(8), self._recipe.network, self._agreement, sets, wanted, {})


async def _answered(answerer: Answerer, row: int) -> int:
    group = await answerer.answer("train", row, row)
    return sum(span.end - span.start for completion in group.completions for span in completion.spans)


def bare_arguments(kind: str, recipe: Recipe, directory: Path) -> dict:
    """Of `vllm.LLM`. kind: see WITHOUT."""
    arguments = engine_arguments(recipe, directory, torch.cuda.is_available(), recipe.seed)
    return {name: value for name, value in arguments.items() if name not in WITHOUT[kind]}


def bare(kind: str, recipe: Recipe, directory: Path, fixed: bool, out) -> None:
    """`vllm.LLM`, given all prompts at once."""
    prompts = load_prompts(recipe.data.train, recipe.data.limit, recipe.data, load_tokenizer(directory))
    llm = LLM(**bare_arguments(kind, recipe, directory))
    parameters = plain(recipe, directory, fixed)

    def take(request: dict) -> dict[str, float]:
        rows = prompts[request["first"] : request["first"] + request["count"]]
        start = time.perf_counter()
        found = llm.generate([{"prompt_token_ids": row.ids.tolist()} for row in rows], parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"tokens": sum(len(one.token_ids) for output in found for one in output.outputs), "seconds": seconds}

    for line in sys.stdin:
        request = json.loads(line)
        answer(out, take(request) if request else {"rows": len(prompts)})


def main() -> None:
    out = private_output()
    die_with_parent()
    wanted = json.loads(sys.argv[1])
    recipe = load(Path(wanted["recipe"]), [])
    directory = locate(recipe.model)
    if wanted["kind"] in WITHOUT:
        bare(wanted["kind"], recipe, directory, wanted["fixed"], out)
    else:
        asyncio.run(Sampler(recipe, directory, Path(wanted["run"]), wanted["fixed"]).serve(out))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("a part of another benchmark: python -m benchmarks.sampler")
    main()
