"""The load of `benchmarks.hub`, `wire` and `scale`: groups of random tokens, clients that make them in no time."""

import asyncio
import functools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protocol import codec
from protocol.channel import Uplink
from protocol.keys import Keys, open_keys
from protocol.messages import Agreement, Beat, Completion, DataSet, Group, Lease, Pulse, Span
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id
from sampler.link import Link
from sampler.session import Load, Session, Work

SETS = {"train": DataSet(rows=1000, fingerprint="x"), "eval": DataSet(rows=0, fingerprint="x")}


class Size(NamedTuple):
    """Of the groups. prompt and length (of each completion) in tokens; reference: with its log-probs."""

    completions: int = 8
    prompt: int = 256
    length: int = 512
    vocabulary: int = 151_936
    reference: bool = False

    @property
    def facts(self) -> dict[str, int]:
        return {"completions": self.completions, "length": self.length}

    @property
    def tokens(self) -> int:
        """Of all completions of a group."""
        return self.completions * self.length

    @property
    def id_bytes(self) -> int:
        return codec.token_array([], self.vocabulary).itemsize

    @property
    def floor(self) -> float:
        """Bytes of the arrays alone for each completion token; the prompt is sent once a group."""
        return self.id_bytes + 4 + 4 * self.reference + self.id_bytes * self.prompt / self.tokens


def make_recipe(size: Size, per_step: int = 64, steps: int = 1_000_000) -> Recipe:
    return load(None, [
        f"sampling.group_size={size.completions}", f"sampling.max_tokens={size.length}",
        f"objective.kl_beta={0.04 * size.reference}", f"trainer.prompts_per_step={per_step}",
        f"trainer.steps={steps}", "network.beat_s=1.0",
    ])  # fmt: skip


@functools.cache
def arrays(size: Size) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The prompt's token ids, and of each completion: token ids, log-probs and, if asked for, the reference's."""
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return codec.token_array(random.integers(0, size.vocabulary, count), size.vocabulary)

    def numbers() -> np.ndarray:
        return (-random.random(size.length) - 1e-3).astype(np.float32)

    kinds = 2 if size.reference else 1
    return ids(size.prompt), [[ids(size.length), *(numbers() for _ in range(kinds))] for _ in range(size.completions)]


def make_group(size: Size, snapshot: str = "", session: str = "", group_id: int = 0, row: int = 0) -> Group:
    """Packed anew each time, as samplers do. snapshot "": the first one."""
    prompt, completions = arrays(size)
    spans = [Span(snapshot or snapshot_id(0, 1), 0, size.length)]
    made = []
    for number, (tokens, *logprobs) in enumerate(completions):
        own, *reference = map(codec.pack, logprobs)
        made.append(Completion(
            tokens=codec.pack(tokens), logprobs=own, ref_logprobs=reference[0] if reference else None,
            finish="length", spans=spans, reward=float(number % 2), rewards={"gsm8k": 0.5, "format": 0.5},
        ))  # fmt: skip
    return Group(
        session=session, split="train", group_id=group_id, row=row, prompt=codec.pack(prompt), completions=made
    )


def agreed(keys: Keys, recipe: Recipe, size: Size) -> Agreement:
    same = {"model": "m", "tokenizer": "t", "recipe": "r", "vocabulary": size.vocabulary}
    return Agreement(protocol=2, run_id=keys.run_id, group_size=recipe.sampling.group_size, **same)


def make_session(name: str, keys: Keys, recipe: Recipe, size: Size, used: list[str], want: int) -> Session:
    """used: the weights that it says it has loaded. want: groups that it takes at the same time."""

    def report(held: set[Work]) -> Load:
        return Load(used[0], max(0, (want - len(held)) * size.completions), int(time.monotonic() * 1e3))

    return Session(name, recipe.network, agreed(keys, recipe, size), SETS, report, {})


async def answer_all(
    rundir: RunDir, recipe: Recipe, size: Size, number: int, want: int, times: dict[str, float]
) -> int:
    """A sampler that loads weights and samples in no time, over the real link. times: when each group was begun, by
    id. -> groups that were sent."""
    keys, used = open_keys(rundir.keys), [snapshot_id(0, 1)]
    session = make_session(f"client{number}", keys, recipe, size, used, want)
    link = Link(rundir, keys, recipe, session)
    async for message in link.messages():
        if isinstance(message, Pulse):
            used[0] = message.snapshot
            link.loaded()
        elif isinstance(message, Lease):
            for group_id, row in message.items:
                times[str(group_id)] = time.monotonic()
                link.answer(make_group(size, used[0], session.name, group_id, row))
    return len(times)


async def beats(rundir: RunDir, recipe: Recipe, size: Size, out: Path) -> None:
    """How long the answer to a beat takes, 20 times a second. Writes seconds, one a line."""
    keys = open_keys(rundir.keys)
    while (endpoint := rundir.read_endpoint()) is None:
        await asyncio.sleep(0.1)
    session = make_session("beats", keys, recipe, size, [snapshot_id(0, 1)], 0)
    uplink = Uplink(keys, endpoint.address)
    with out.open("w", buffering=1) as file:
        while await uplink.receive(0.1) is None:
            await uplink.send(session._hello)
        while True:
            await asyncio.sleep(0.05)
            while await uplink.receive(0.0):  # pulses that were pushed, not asked for
                pass
            start = time.perf_counter()
            await uplink.send(Beat(session="beats", snapshot=None, want=0, held=[], progress=0))
            while not isinstance(await uplink.receive(5.0), Pulse):
                pass
            file.write(f"{time.perf_counter() - start}\n")


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
