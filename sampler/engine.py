"""The generator: vLLM, kept full, its weights swapped while it runs. The only file that imports vllm (with worker.py).

Requests are token ids and completions are token ids with the log-prob that each was sampled with. New weights are
loaded in place between two tokens: running requests keep their tokens and their KV cache, and every completion
says which tokens came from which snapshot.
"""

import asyncio
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from vllm import SamplingParams
from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.logger import DEFAULT_LOGGING_CONFIG
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from policy.model import load_tokenizer
from protocol.errors import EngineDead, UserError
from protocol.messages import Finish, Span, Split
from protocol.recipe import Recipe
from protocol.snapshot import Corrupt, Sealed
from sampler.arguments import engine_arguments
from sampler.sampling import end_tokens, settings
from sampler.shortage import shortage_explained
from sampler.weights import Apply, Weights
from sampler.worker import SAMPLER_PID

FIRST = -1
"""vLLM's priority of what is scored: no completion leaves before the canary, which others would keep waiting."""
READ_POLL_S = 0.02
"""Between two questions whether the worker has read a snapshot: each is answered between two tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One completion as it left the engine. n = tokens, those that ended it included."""

    tokens: np.ndarray  # [n] int64
    logprobs: np.ndarray  # [n] float32, at the sampling temperature
    text: str  # without special tokens and `sampling.stop`
    finish: Finish
    spans: list[Span]
    specials: int = 0  # special tokens before the last token


class Engine:
    """Use with `async with`. `weights` says which snapshot it uses; `tokens` counts what it has sampled."""

    def __init__(self, recipe: Recipe, directory: Path, snapshots: Path, *, gpu: bool, seed: int) -> None:
        """Raises UserError for settings that vLLM or the model cannot follow."""
        self._recipe, self._directory, self._gpu, self._seed = recipe, directory, gpu, seed
        tokenizer = load_tokenizer(directory)
        ends, self._specials = end_tokens(recipe, directory, tokenizer), tokenizer.all_special_ids
        self._parameters: dict[Split, SamplingParams] = {
            split: sampling_parameters(settings(recipe, split), ends) for split in ("train", "eval")
        }
        self.weights = Weights(self, snapshots, recipe.model.dtype)
        self.tokens = 0
        self.running = 0
        """Requests that vLLM has not answered yet."""
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._applied: str | None = None
        """Weights that the engine computes with; its prefix cache is kept apart by them."""
        self._adapter: LoRARequest | None = None

    async def __aenter__(self) -> Self:
        """Raises OutOfMemory."""
        os.environ[SAMPLER_PID] = str(os.getpid())
        arguments = engine_arguments(self._recipe, self._directory, self._gpu, self._seed)
        with shortage_explained(self._recipe, self._gpu, DEFAULT_LOGGING_CONFIG) as file:
            self._llm = await asyncio.to_thread(
                AsyncLLM.from_engine_args,
                AsyncEngineArgs(**arguments, scheduling_policy="priority", logging_config=_logging(file)),
                stat_loggers=[lambda config, index=0: _TokenCounter(self)],
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._llm.shutdown)

    @property
    def busy_s(self) -> float:
        """Seconds in which vLLM had something to do."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.running else 0.0)

    @property
    def dead(self) -> bool:
        """vLLM's process is gone. Requests then fail, but calls into its workers never come back."""
        return self._llm.errored

    async def generate(self, prompt: np.ndarray, split: Split) -> list[Sampled]:
        """The completions of one prompt [m], as many and as the recipe wants them for the split. Raises EngineDead.

        Returned only when the weights that sampled them have passed their check.
        """
        outputs = await self._request(prompt.tolist(), self._parameters[split])
        await self.weights.checked()
        return [_sampled(output, self._recipe.sampling.stop_after, self._specials) for output in outputs.outputs]

    async def read(self, sealed: Sealed, sha256: str) -> Apply:
        """Has the worker read it while it samples; what is left is to be done while the engine is paused."""
        if sealed.manifest.kind == "adapter":
            files = {name: await asyncio.to_thread(sealed.read, name) for name in sealed.manifest.files}
            return lambda: self._apply_adapter(files)
        await self._call("read_snapshot", (str(sealed.path), sha256, sealed.patience_s))
        try:
            while None in (problems := await self._call("snapshot_read", (sealed.wanted(),))):
                await asyncio.sleep(READ_POLL_S)
        except asyncio.CancelledError:  # this sampler ends: the reading threads must not wait for a slow disk
            await self._call("snapshot_read", (False,))
            raise
        if any(problems):
            await self._call("forget_snapshot")
            raise Corrupt(next(filter(None, problems)))
        return lambda: self._call("apply_snapshot")

    async def switch(self, apply: Apply, snapshot: str) -> None:
        """Between two tokens; running requests keep their KV cache."""
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            await apply()
            await self._llm.update_weight_version(snapshot)
            self._applied = snapshot
            await self._llm.resume_generation()
        except EngineDeadError as error:
            raise EngineDead(f"vLLM died while loading {snapshot}: {error}") from error

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of tokens[1:] at temperature 1."""
        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._request(list(tokens), parameters, priority=FIRST)
        entries = [entry for entry in output.prompt_logprobs or () if entry]  # the first token has none
        return [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]

    # -- inside --------------------------------------------------------------------------------------------------

    async def _request(self, tokens: list[int], parameters: SamplingParams, priority: int = 0) -> RequestOutput:
        prompt = TokensPrompt(prompt_token_ids=tokens)
        if self._applied is not None:
            prompt["cache_salt"] = self._applied
        self._busy_since = self._busy_since if self.running else time.monotonic()
        self.running += 1
        try:
            last: RequestOutput | None = None
            async for output in self._llm.generate(
                prompt,
                parameters,
                request_id=uuid.uuid4().hex,
                lora_request=self._adapter,
                priority=priority,
            ):
                last = output
        except EngineDeadError as error:
            raise EngineDead(f"vLLM died: {error}; its own message is above") from error
        finally:
            self.running -= 1
            self._busy_s += 0.0 if self.running else time.monotonic() - self._busy_since
        assert last is not None, "vLLM ends no request without an output"
        return last

    async def _call(self, method: str, arguments: tuple[str | float, ...] = ()) -> list:
        """Of the worker extension, in every worker."""
        try:
            return await self._llm.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise EngineDead(f"vLLM died in {method}: {error}") from error

    async def _apply_adapter(self, files: dict[str, bytes]) -> None:
        """vLLM reads an adapter from files: it gets a private copy of the verified bytes."""
        copy = Path(tempfile.mkdtemp(prefix="adapter-"))
        try:
            for name, data in files.items():
                (copy / name).write_bytes(data)
            await self._llm.add_lora(LoRARequest("policy", 1, str(copy), load_inplace=self._adapter is not None))
        finally:
            shutil.rmtree(copy)
        self._adapter = LoRARequest("policy", 1, str(copy))


class _TokenCounter(StatLoggerBase):
    """Counts sampled tokens as they come: the progress that a beat reports."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        if iteration_stats is not None:
            self._engine.tokens += iteration_stats.num_generation_tokens

    def log_engine_initialized(self) -> None:
        return


def _logging(file: Path) -> LoggingConfig:
    """By this file, where the user's environment does not say how."""
    usual = LoggingConfig()
    asked = usual.pylogging_config_file or not usual.configure_logging
    return usual if asked else replace(usual, pylogging_config_file=str(file))


def sampling_parameters(settings: dict, ends: list[int]) -> SamplingParams:
    """ends: ids of tokens that end a completion. Raises UserError where vLLM refuses or changes a setting."""
    try:
        parameters = SamplingParams(
            **settings, stop_token_ids=ends, logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
    except ValueError as error:
        raise UserError(f"vLLM refuses the recipe's tables sampling and eval: {' '.join(str(error).split())}") from None
    if parameters.temperature != settings["temperature"]:
        raise UserError(
            f"vLLM samples at temperature {parameters.temperature:g} where the recipe says "
            f"{settings['temperature']:g}; use at least {parameters.temperature:g}"
        )
    return parameters


def _sampled(output: CompletionOutput, stop_after: Sequence[str], specials: Sequence[int]) -> Sampled:
    """vLLM's text ends before the text that ended it, which may begin in the middle of a token."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion by {output.finish_reason!r}, expected 'stop' or 'length'")
    assert isinstance(output.logprobs, FlatLogprobs), "`sampling_parameters` asks for them"
    assert output.weight_versions is not None, "every final output has them"
    tokens = np.asarray(output.token_ids, np.int64)
    logprobs = np.asarray(output.logprobs.logprobs, np.float32)  # flat: one for each token, no others were asked for
    if output.logprobs.token_ids != list(output.token_ids):
        raise RuntimeError("vLLM's log-probs are those of other tokens than it sampled")
    spans = [Span(span.version, span.start, span.end) for span in output.weight_versions]
    reason = output.stop_reason
    return Sampled(
        tokens=tokens,
        logprobs=logprobs,
        text=output.text + (reason if isinstance(reason, str) and reason in stop_after else ""),
        finish=output.finish_reason,
        spans=spans,
        specials=int(np.isin(tokens[:-1], specials).sum()),
    )
