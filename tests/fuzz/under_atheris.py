"""The process that atheris owns: TARGET INPUTS SECONDS CORPUS [libFuzzer options]. `engines.by_atheris` starts it."""

import atexit
import logging
import os
import sys
import time

import atheris

with atheris.instrument_imports(include=["protocol", "sampler", "trainer", "tests.fuzz"]):
    from tests.fuzz import targets

targets.LIMIT_S *= 10
"""Instrumented code is slow; `--engine random` measures."""


class Counted:
    """Ends the process by itself: libFuzzer's own limits would skip Python's clean-up, and take an exit for a crash."""

    def __init__(self, name: str, inputs: int, seconds: float) -> None:
        self._function, self._inputs, self._seconds = targets.TARGETS[name], inputs, seconds
        self._done, self._began = 0, time.monotonic()

    def __call__(self, data: bytes) -> None:
        spent = time.monotonic() - self._began
        if (self._inputs and self._done >= self._inputs) or (self._seconds and spent >= self._seconds):
            self.say()
            atexit._run_exitfuncs()
            os._exit(0)
        self._done += 1
        try:
            self._function(data)
        except BaseException:
            self.say()
            raise

    def say(self) -> None:
        print(f"\nfuzzed {self._done} {time.monotonic() - self._began}", flush=True)


logging.disable(logging.CRITICAL)
target, inputs, seconds, *options = sys.argv[1:]
atheris.Setup([sys.argv[0], *options], Counted(target, int(inputs), float(seconds)))
atheris.Fuzz()
