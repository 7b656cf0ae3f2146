"""One engine and its session: puts the parts together and lets them run."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch

from policy.agreement import agree
from policy.kernels import refuse_kernels
from policy.model import DTYPES, load_tokenizer, locate
from protocol.cli import log_to_console
from protocol.errors import EngineDead, RunError
from protocol.keys import Keys, open_keys
from protocol.memory import device_gb, tree_gb
from protocol.messages import Agreement, DataSet, Split
from protocol.metrics import MetricsWriter
from protocol.process import STOP_SIGNALS, die_with_parent, visible_gpus
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from protocol.versions import versions
from sampler.answer import Answerer
from sampler.demonstrations import demonstrated
from sampler.engine import Engine
from sampler.link import Link
from sampler.loop import sample
from sampler.prompts import Prompt, load_prompts
from sampler.prompts import fingerprint as prompts_fingerprint
from sampler.reference import Reference
from sampler.rewards.pool import RewardPool
from sampler.sampling import end_tokens
from sampler.sampling import show as show_sampling
from sampler.session import Load, Session, Work

log = logging.getLogger(__name__)

REPORT_S = 10.0
"""Between two records in metrics/sampler-*.jsonl."""


def run(rundir: RunDir, recipe: Recipe, index: int, make_engine: Callable[..., Engine] = Engine) -> int:
    """The whole life of one engine. 0 when the run is complete or this sampler was asked to stop."""
    log_to_console(f"sampler.{index}")
    die_with_parent()
    rundir.make()
    keys, directory = open_keys(rundir.keys), locate(recipe.model)
    tokenizer = load_tokenizer(directory)
    prompts: dict[Split, list[Prompt]] = {
        "train": load_prompts(recipe.data.train, recipe.data.limit, recipe.data, tokenizer),
        "eval": load_prompts(recipe.data.eval, recipe.data.eval_limit, recipe.data, tokenizer)
        if recipe.data.eval
        else [],
    }
    ends = end_tokens(recipe, directory, tokenizer)
    if recipe.objective.name == "sft":
        longest = recipe.sampling.max_tokens
        prompts["train"] = demonstrated(prompts["train"], recipe.data, tokenizer, ends, longest)
    agreement = agree(keys.run_id, directory, tokenizer, recipe)
    show(prompts["train"][0], tokenizer)
    show_sampling(recipe, ends, tokenizer)
    try:
        asyncio.run(serve(rundir, recipe, keys, directory, agreement, prompts, index, make_engine))
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    return 0


async def serve(
    rundir: RunDir,
    recipe: Recipe,
    keys: Keys,
    directory: Path,
    agreement: Agreement,
    prompts: dict[Split, list[Prompt]],
    index: int,
    make_engine: Callable[..., Engine],
) -> None:
    """Everything that needs the event loop: the reward processes first, because a wrong one is the user's to mend."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    needs_reference = recipe.objective.kl_beta > 0 and not recipe.lora.rank
    if needs_reference:
        refuse_kernels(recipe.trainer, DTYPES[recipe.model.dtype], device)
    software = await asyncio.to_thread(versions)
    async with contextlib.AsyncExitStack() as stack:
        memory = int(recipe.sampler.reward_memory_gb * 2**30)
        rewards = await stack.enter_async_context(RewardPool(recipe.reward, recipe.sampler.reward_workers, memory))
        for split in prompts.values():
            if split:
                rewards.check_columns(split[0].columns)
        sets: dict[Split, DataSet] = {
            split: DataSet(rows=len(rows), fingerprint=prompts_fingerprint(rows)) for split, rows in prompts.items()
        }
        engine = make_engine(recipe, directory, rundir.snapshots, gpu=gpu, seed=recipe.seed + index)
        size = {"train": recipe.sampling.group_size, "eval": recipe.eval.samples}

        heartbeat = Heartbeat(recipe.network.lease_s)

        def load(held: set[Work]) -> Load:
            """Twice what the engine decodes at a time: it never runs dry between two leases."""
            heartbeat.feel(engine)
            free = max(2 * recipe.sampler.max_running, *size.values()) - sum(size[kind] for kind, _ in held)
            return Load(engine.weights.snapshot, max(0, free), engine.tokens)

        session = Session(secrets.token_hex(8), recipe.network, agreement, sets, load, software)
        trainer = Link(rundir, keys, recipe, session)
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, trainer.stop)
        await stack.enter_async_context(engine)
        for number in STOP_SIGNALS:  # vLLM installs its own while it starts
            asyncio.get_running_loop().add_signal_handler(number, trainer.stop)
        reference = Reference(recipe, directory, device) if needs_reference else None
        rollouts = stack.enter_context(MetricsWriter(rundir.rollouts / f"{session.name}.jsonl"))
        answerer = Answerer(recipe, session.name, agreement.vocabulary, prompts, engine, rewards, reference, rollouts)
        metrics = stack.enter_context(MetricsWriter(rundir.metrics / f"sampler-{session.name}.jsonl"))
        metrics.write({"kind": "start", "versions": software})
        reporting = asyncio.create_task(report(metrics, rollouts, engine, rewards, answerer))
        try:
            await sample(trainer, engine.weights, answerer)
        finally:
            reporting.cancel()
            metrics.write(figures(rollouts, engine, rewards, answerer))


class Heartbeat:
    """Ends a sampler whose engine is dead, or is asked for tokens and gives none: nobody else may be told so."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._tokens = patience_s, -1
        self._moved = self._felt = time.monotonic()

    def feel(self, engine: Engine) -> None:
        """Asked at every beat. Raises EngineDead."""
        now = time.monotonic()
        if engine.dead:
            raise EngineDead("vLLM died; its own message is above")
        slept, self._felt = now - self._felt > self._patience_s / 2, now  # this process, not its engine
        if engine.tokens != self._tokens or not engine.running or slept:
            self._tokens, self._moved = engine.tokens, now
        elif now - self._moved > self._patience_s:
            raise EngineDead(f"vLLM has {engine.running} requests and gave no token for {now - self._moved:.0f} s")


async def report(
    metrics: MetricsWriter, rollouts: MetricsWriter, engine: Engine, rewards: RewardPool, answerer: Answerer
) -> None:
    gpus = await asyncio.to_thread(visible_gpus)
    while True:
        await asyncio.sleep(REPORT_S)
        used = await asyncio.to_thread(device_gb, gpus)
        metrics.write(figures(rollouts, engine, rewards, answerer) | ({"memory/device_gb": used} if gpus else {}))


def figures(rollouts: MetricsWriter, engine: Engine, rewards: RewardPool, answerer: Answerer) -> dict[str, object]:
    """Counted since the start: tokens, seconds at work, groups, what became of each reward function's calls."""
    weights = engine.weights
    return {
        "tokens": engine.tokens,
        "busy_s": round(engine.busy_s, 3),
        "memory/tree_gb": round(tree_gb(), 3),
        "snapshot": weights.snapshot,
        "snapshots_unreadable": weights.unreadable,
        "records_lost": rollouts.lost,
        **answerer.counts,
        **rewards.counters(),
    }


def first_cause(group: BaseExceptionGroup) -> BaseException:
    """Of tasks that failed together, the first expected failure; the group itself where there is none."""
    ours, _ = group.split(RunError)
    cause: BaseException = ours or group
    while isinstance(cause, BaseExceptionGroup) and (ours or len(cause.exceptions) == 1):
        cause = cause.exceptions[0]
    return cause


def show(prompt: Prompt, tokenizer) -> None:
    """What the model will really see, so that a wrong template is found by reading."""
    log.info("first prompt (%d tokens):", len(prompt.ids))
    log.info("%r", tokenizer.decode(prompt.ids.tolist()))
    if prompt.demonstration is not None:
        log.info("its demonstration (%d tokens):", len(prompt.demonstration))
        log.info("%r", tokenizer.decode(prompt.demonstration.tolist()))
