"""Puts the toy of tests/chaos in the engines' place, in every Python that finds this directory on PYTHONPATH.

The workers' command lines, processes and signals are the real ones. TOY_STEP_S: seconds that a step takes.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
import types

LAUNCHER = any(word.startswith("deepspeed.launcher") for word in sys.orig_argv)
STUBS = () if LAUNCHER else ("vllm", "deepspeed", "peft", "bitsandbytes")
"""Half of the time that a worker takes to start."""


class Nothing(types.ModuleType):
    """Has every name and submodule; none of them is used."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


class Toys(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name not in ("trainer.rank", "sampler.replica"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            put_toy(module)

        spec.loader.exec_module = exec_module
        return spec

    def create_module(self, spec):
        return Nothing(spec.name)

    def exec_module(self, module):
        return


def put_toy(module) -> None:
    """`make_policy`, `make_engine`: the last argument of run."""
    from tests.chaos.toy import ToyEngine, ToyPolicy

    class Slow(ToyPolicy):
        def update(self) -> bool:
            time.sleep(float(os.environ.get("TOY_STEP_S", 0)))
            return super().update()

    module.run.__defaults__ = (Slow if module.__name__ == "trainer.rank" else ToyEngine,)


sys.meta_path.insert(0, Toys())
