"""An engine in a process of its own, which is asked for one measurement after the other and idle in between."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

from protocol.process import die_with_parent, end, members

WIRE_ROWS = 512
"""The last prompts are the trainer's to lease, the others are for variants without one."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Child:
    """`python -m benchmarks.MODULE` with settings as JSON; requests and answers are one line of JSON each.

    Its standard error, and all that libraries print, goes to `log`. Use with `with`: nothing of it stays.
    """

    def __init__(self, module: str, settings: Mapping[str, object], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", json.dumps(dict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                bufsize=0,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def ask(self, timeout_s: float = 600.0, **request: object) -> dict:
        """Raises SystemExit with the log's path if it ends, or gives no answer."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            line = b""
            if select.select([self._process.stdout], [], [], timeout_s)[0]:
                line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise SystemExit(f"an engine's process ended, or gave no answer for {timeout_s:.0f} s: see {self._log}")
        return json.loads(line)

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: of its first process, in which Python serves the engine; of all that it started."""
        by_process = {pid: _cpu_s(pid) for pid in members(self._process.pid)}
        return by_process.get(self._process.pid, 0.0), sum(by_process.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process, 20.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def answer(out: IO[str], found: Mapping[str, object]) -> None:
    """The child's side of `ask`."""
    out.write(json.dumps(found) + "\n")
    out.flush()


def private_output() -> IO[str]:
    """Standard output for answers alone: whatever libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def tidy_when_stopped() -> None:
    """SIGTERM ends this process as Ctrl-C does: through every `with`, so that no child and no directory stays."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def roof(work, seconds: float = 0.5) -> float:
    """Calls of `work` a second, the best of three."""
    best = 0.0
    for _ in range(3):
        start, calls = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            work()
            calls += 1
        best = max(best, calls / passed)
    return best


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


if __name__ == "__main__":
    raise SystemExit("a part of other benchmarks: python -m benchmarks.sampler, python -m benchmarks.weights")
