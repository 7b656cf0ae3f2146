"""Which snapshot an engine computes with: read and verified, switched between two tokens, checked by its canary.

A snapshot that cannot be read leaves the old weights in use. One that was read but computes something else than the
trainer's canary says ends the sampler: nothing sampled with it may leave.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from policy.canary import TOLERANCE, mean_gap
from protocol.errors import WrongWeights
from protocol.messages import Pulse
from protocol.snapshot import Canary, Corrupt, Sealed, open_sealed

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a network filesystem may take to show a snapshot that was announced."""

Apply = Callable[[], Awaitable[object]]


class Computes(Protocol):
    """An engine as seen from here."""

    async def read(self, sealed: Sealed, sha256: str) -> Apply:
        """Verifies the files while it goes on sampling; what is left to be done while it pauses. Raises Corrupt."""
        ...

    async def switch(self, apply: Apply, snapshot: str) -> None:
        """Between two tokens; running requests keep theirs."""
        ...

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of tokens[1:] at temperature 1."""
        ...


class Weights:
    """`snapshot` is the id of the verified weights, None before the first. dtype: the engine's."""

    def __init__(self, engine: Computes, snapshots: Path, dtype: str) -> None:
        self._engine, self._snapshots, self._tolerance = engine, snapshots, TOLERANCE[dtype]
        self.snapshot: str | None = None
        self.unreadable = 0
        self._wanted: Pulse | None = None
        self._loading = asyncio.Lock()
        self._checked = asyncio.Event()
        self._canary: Canary | None = None
        self._found: list[list[float]] = []

    async def checked(self) -> None:
        """Waits until the weights that the engine computes with have passed their check."""
        await self._checked.wait()

    def trust(self, name: str) -> None:
        """The engine goes on with the weights that it was started with: a model that no trainer has announced."""
        self.snapshot = name
        self._checked.set()

    async def load(self, pulse: Pulse) -> None:
        """Switches to the announced snapshot; the newest wins when several wait.

        Raises Corrupt, and the old weights stay in use; WrongWeights, and there are no weights to go on with.
        """
        self._wanted = pulse
        async with self._loading:
            if self.snapshot == pulse.snapshot or self._wanted != pulse:
                return
            try:
                sealed = await asyncio.to_thread(self._open, pulse)
                apply = await self._engine.read(sealed, pulse.manifest_sha256)
            except Corrupt as error:
                if self._wanted == pulse:
                    self.unreadable += 1
                    log.error("%s: going on with %s", error, self.snapshot)
                    raise
                log.warning("%s; a newer one follows", error)
                return
            except asyncio.CancelledError:  # this sampler ends: the reading thread must not wait for a slow disk
                self._wanted = None
                raise
            self._checked.clear()
            await self._engine.switch(apply, pulse.snapshot)
            await self._check(sealed)
            self.snapshot = pulse.snapshot
            self._checked.set()

    # -- inside --------------------------------------------------------------------------------------------------

    def _open(self, pulse: Pulse) -> Sealed:
        """Its manifest alone: who parses a file reads it once, verified over the bytes that it parses."""
        path = self._snapshots / pulse.snapshot
        return open_sealed(path, pulse.manifest_sha256, None, PATIENCE_S, lambda: self._wanted == pulse)

    async def _check(self, sealed: Sealed) -> None:
        """Computes what the trainer computed with these weights on fixed texts."""
        name, canary = sealed.manifest.id, sealed.manifest.canary
        if canary is None:
            raise WrongWeights(f"{name} carries no canary log-probs, so nobody can tell whether it was loaded")
        found = list(await asyncio.gather(*(self._engine.score(tokens) for tokens in canary.tokens)))
        gap = mean_gap(canary.logprobs, found)
        if not gap <= self._tolerance:
            raise WrongWeights(
                f"{name} was loaded, but log-probs of fixed texts differ by {gap:.3f} nats on average "
                f"from the trainer's (at most {self._tolerance} expected): not sampling with it"
            )
        if self._found == found and self._canary and mean_gap(canary.logprobs, self._canary.logprobs) > 0.0:
            raise WrongWeights(f"{name} was loaded, but the engine still computes what it did before")
        self._found, self._canary = found, canary
        log.info("using %s (log-probs within %.4f nats of the trainer's)", name, gap)
