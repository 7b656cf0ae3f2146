"""Where inputs come from: a seeded random mutator (needs nothing, repeats itself), or atheris (follows coverage)."""

import contextlib
import hashlib
import logging
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
"""One directory a target: its crashers, which tests/test_fuzz.py replays for ever."""
LONGEST = 96
"""Bytes of an input that grew from nothing: about 16 moves."""


@dataclass(slots=True, kw_only=True)
class Report:
    target: str
    engine: str
    inputs: int = 0
    seconds: float = 0.0
    crashes: dict[str, Path] = field(default_factory=dict)
    """Where it was raised -> the first input that raised there."""

    def __str__(self) -> str:
        rate = self.inputs / max(self.seconds, 1e-9)
        figures = f"{self.inputs:>10} inputs  {rate:>9.0f} inputs/s  {len(self.crashes)} crashes"
        return f"{self.target:<10} {self.engine:<8} {figures}" + "".join(
            f"\n  {place}: {path}" for place, path in self.crashes.items()
        )


def by_random(target: str, *, inputs: int | None, seconds: float | None, seed: int, corpus: Path = CORPUS) -> Report:
    """Runs mutated seeds and random bytes until either limit; the same seed gives the same inputs."""
    from tests.fuzz.targets import SEEDS, TARGETS

    function, report = TARGETS[target], Report(target=target, engine="random")
    source = _mutations(SEEDS[target] + kept(target), random.Random(f"{target}/{seed}"))
    began = time.monotonic()
    with _quiet():
        while (inputs is None or report.inputs < inputs) and (seconds is None or time.monotonic() - began < seconds):
            data = next(source)
            report.inputs += 1
            if report.inputs % 500_000 == 0:
                print(f"{target}: {report.inputs:,} inputs", file=sys.__stderr__, flush=True)
            try:
                function(data)
            except Exception as error:  # whatever it is, it is what is looked for
                place = _place(error)
                if place not in report.crashes:
                    report.crashes[place] = _keep(corpus / target, data)
    report.seconds = time.monotonic() - began
    return report


def by_atheris(target: str, *, inputs: int | None, seconds: float | None, seed: int, corpus: Path = CORPUS) -> Report:
    """In a process of its own, which ends at its first crash."""
    from tests.fuzz.targets import SEEDS

    report = Report(target=target, engine="atheris")
    (corpus / target).mkdir(parents=True, exist_ok=True)
    before = set((corpus / target).iterdir())
    with tempfile.TemporaryDirectory() as seeds:
        for number, data in enumerate(SEEDS[target] + kept(target)):
            (Path(seeds) / str(number)).write_bytes(data)
        limits = [str(inputs or 0), str(seconds or 0)]
        command = [sys.executable, "-m", "tests.fuzz.under_atheris", target, *limits, seeds]
        options = [f"-seed={seed + 1}", f"-artifact_prefix={corpus / target}/", "-max_len=512", "-timeout=60"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, errors="replace", check=False)
    figures = [line.split() for line in done.stdout.splitlines() if line.startswith("fuzzed ")]
    if figures:
        report.inputs, report.seconds = int(figures[-1][1]), float(figures[-1][2])
    new = sorted(set((corpus / target).iterdir()) - before)
    report.crashes = {f"see the traceback of {path.name}": path for path in new}
    if done.returncode and not new:
        raise RuntimeError(f"atheris ended with {done.returncode}: {done.stderr[-2000:]}")
    return report


def has_atheris() -> bool:
    return find_spec("atheris") is not None


def kept(target: str) -> list[bytes]:
    """The regressions."""
    directory = CORPUS / target
    return [path.read_bytes() for path in sorted(directory.iterdir())] if directory.is_dir() else []


def _mutations(seeds: list[bytes], dice: random.Random) -> Iterator[bytes]:
    yield from seeds
    yield b""
    while True:
        if dice.random() < 0.5:
            yield dice.randbytes(int(dice.random() * LONGEST))
        else:
            yield _mutated(dice.choice(seeds), seeds, dice)


def _mutated(data: bytes, seeds: list[bytes], dice: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(1 << int(dice.random() * 4)):
        kind, place = dice.random(), int(dice.random() * (len(result) + 1))
        if kind < 0.5 and place < len(result):
            result[place] = dice.choice((result[place] ^ 1 << int(dice.random() * 8), int(dice.random() * 256)))
        elif kind < 0.65:
            del result[place : place + 1 + int(dice.random() * 16)]
        elif kind < 0.8:
            result[place:place] = dice.randbytes(1 + int(dice.random() * 8))
        elif kind < 0.9:
            result[place:place] = bytes([dice.choice(b'\0\xff\x91\xdd\xdf[{"')]) * (1 + int(dice.random() * 64))
        else:
            other = dice.choice(seeds)
            result[place:] = other[int(dice.random() * (len(other) + 1)) :]
    return bytes(result)


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"


def _keep(directory: Path, data: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hostile messages are logged by the thousand."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
