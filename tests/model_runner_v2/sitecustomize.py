"""Lets vLLM's Model Runner V2 compute on a CPU, where Triton's interpreter executes its kernels.

Every Python that finds this directory on PYTHONPATH runs this file when it starts.
vLLM for CPUs uses Triton only if Triton has a backend with the name "cpu".
The interpreter needs no backend, so this one is empty. TRITON_INTERPRET=1 turns the interpreter on.
Triton reads that variable when it is imported, so it belongs into the environment.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import triton.backends


class Interpreter:
    @staticmethod
    def is_active() -> bool:
        return True


def run_the_hidden_file() -> None:
    """Python runs only the first sitecustomize.py of its path: this one hides the machine's own."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Interpreter)
run_the_hidden_file()
