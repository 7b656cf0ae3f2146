"""An engine without a trainer, with the prompts, rewards and checks of training: what evaluation and probe share."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from policy.model import locate, model_fingerprint, vocabulary_size
from protocol.errors import UserError
from protocol.messages import Split
from protocol.metrics import MetricsWriter
from protocol.process import STOP_SIGNALS
from protocol.snapshot import Sealed
from sampler.answer import Answerer
from sampler.candidate import Candidate, announced
from sampler.engine import Engine
from sampler.prompts import Prompt
from sampler.rewards.pool import RewardPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    engine: Engine
    rewards: RewardPool
    answerer: Answerer


def found(candidate: Candidate) -> Path:
    """The directory of the model that the engine starts with. Raises UserError; Corrupt for a damaged snapshot."""
    directory = locate(candidate.recipe.model)
    if candidate.sealed:
        refuse_other_base(candidate.sealed, candidate.recipe.model.path, directory)
        candidate.sealed.verified()
    return directory


def refuse_other_base(sealed: Sealed, model: str, directory: Path) -> None:
    """Weights of one architecture do not make sense inside another."""
    if sealed.manifest.model != model_fingerprint(directory):
        raise UserError(
            f"{sealed.manifest.id} was trained from another model than {model} (their config.json differ); name its "
            "run with --run, or its model with --set model.path="
        )


@contextlib.asynccontextmanager
async def alone(
    candidate: Candidate,
    directory: Path,
    split: Split,
    prompts: list[Prompt],
    out: Path | None,
    stop: Callable[[], object],
    pool: type[RewardPool] = RewardPool,
) -> AsyncIterator[Alone]:
    """Rewards first, then the engine with the candidate's weights. stop: called on a signal, once the engine runs.

    out: FILE.json, beside which every completion is written, or None. Raises UserError for a wrong reward function.
    """
    recipe, gpu = candidate.recipe, torch.cuda.is_available()
    async with contextlib.AsyncExitStack() as stack:
        memory = int(recipe.sampler.reward_memory_gb * 2**30)
        rewards = await stack.enter_async_context(pool(recipe.reward, recipe.sampler.reward_workers, memory))
        rewards.check_columns(prompts[0].columns)
        snapshots = candidate.sealed.path.parent if candidate.sealed else directory
        engine = Engine(recipe, directory, snapshots, gpu=gpu, seed=recipe.seed)
        await stack.enter_async_context(engine)
        for number in STOP_SIGNALS:  # only now: vLLM installs its own while it starts
            asyncio.get_running_loop().add_signal_handler(number, stop)
        if candidate.sealed:
            await engine.weights.load(announced(candidate.sealed))
        else:
            engine.weights.trust(candidate.name)
        rollouts = stack.enter_context(MetricsWriter(texts(out)))
        vocabulary = vocabulary_size(directory)
        answerer = Answerer(recipe, split, vocabulary, {split: prompts}, engine, rewards, None, rollouts)
        yield Alone(engine=engine, rewards=rewards, answerer=answerer)


def texts(out: Path | None) -> Path:
    """Where every completion is written: beside the result, in place of an older one's; or nowhere."""
    if not out:
        return Path(os.devnull)
    out.with_suffix(".jsonl").unlink(missing_ok=True)
    return out.with_suffix(".jsonl")
