"""The load that `benchmarks.hub` puts on a hub: groups of random tokens, clients that need no time to make them."""

import asyncio
import time
from pathlib import Path

import msgspec
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

VOCABULARY = 151_936
PROMPT = 256
SETS = {"train": DataSet(rows=100_000, fingerprint="x"), "eval": DataSet(rows=0, fingerprint="x")}
SIZES = {"8 x 512": (8, 512), "16 x 4096": (16, 4096)}
"""Completions of a group, tokens of a completion."""


def make_recipe(size: str, reference: bool) -> Recipe:
    count, tokens = SIZES[size]
    settings = [
        f"sampling.group_size={count}",
        f"sampling.max_tokens={tokens}",
        f"objective.kl_beta={0.04 * reference}",
    ]
    return load(None, [*settings, "trainer.prompts_per_step=64", "trainer.steps=1000000", "network.beat_s=1.0"])


def make_group(size: str, reference: bool) -> Group:
    count, length = SIZES[size]
    random = np.random.default_rng(0)

    def numbers() -> bytes:
        return codec.pack((-random.random(length) - 1e-3).astype(np.float32))

    def completion() -> Completion:
        return Completion(
            tokens=codec.pack(random.integers(0, VOCABULARY, length).astype(np.int32)),
            logprobs=numbers(),
            ref_logprobs=numbers() if reference else None,
            finish="length",
            spans=[Span(snapshot_id(0, 1), 0, length)],
            reward=float(random.random()),
            rewards={"gsm8k": 0.5, "format": 0.5},
        )

    prompt = codec.pack(random.integers(0, VOCABULARY, PROMPT).astype(np.int32))
    completions = [completion() for _ in range(count)]
    return Group(session="", split="train", group_id=0, row=0, prompt=prompt, completions=completions)


def agreed(keys: Keys, recipe: Recipe) -> Agreement:
    same = {"model": "m", "tokenizer": "t", "recipe": "r", "vocabulary": VOCABULARY}
    return Agreement(protocol=2, run_id=keys.run_id, group_size=recipe.sampling.group_size, **same)


async def answer_all(rundir: RunDir, recipe: Recipe, group: Group, number: int, want: int) -> None:
    """A sampler that loads weights and samples in no time."""
    keys, used = open_keys(rundir.keys), [snapshot_id(0, 1)]

    def report(held: set[Work]) -> Load:
        return Load(used[0], max(0, (want - len(held)) * len(group.completions)), int(time.monotonic() * 1e3))

    session = Session(f"client{number}", recipe.network, agreed(keys, recipe), SETS, report, {})
    link = Link(rundir, keys, recipe, session)
    completions = group.completions
    async for message in link.messages():
        if isinstance(message, Pulse):
            used[0] = message.snapshot
            spans = [Span(used[0], 0, completions[0].spans[0].end)]
            completions = [msgspec.structs.replace(one, spans=spans) for one in completions]
            link.loaded()
        elif isinstance(message, Lease):
            for group_id, row in message.items:
                own = {"session": session.name, "group_id": group_id, "row": row}
                link.answer(msgspec.structs.replace(group, completions=completions, **own))


async def beats(rundir: RunDir, recipe: Recipe, out: Path) -> None:
    """How long the answer to a beat takes, 20 times a second. Writes seconds, one a line."""
    keys = open_keys(rundir.keys)
    while (endpoint := rundir.read_endpoint()) is None:
        await asyncio.sleep(0.1)
    session = Session("beats", recipe.network, agreed(keys, recipe), SETS, lambda _: Load(None, 0, 0), {})
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
