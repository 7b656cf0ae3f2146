"""`tests/policy_run.py` with every collective counted: its last line has calls and bytes of first tensors by name.

python -m tests.collectives SETTINGS.json
"""

import collections
import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tests.policy_run


class Trace(TorchDispatchMode):
    """Of torch.distributed's operations: of an all-gather the first tensor is the whole result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] += 1
            self.bytes[name] += sum(one.nbytes for one in tensors)
        return func(*args, **kwargs or {})


if __name__ == "__main__":
    tests.policy_run.safe_get_full_grad = lambda parameter: None  # it exchanges gradients once more, for tests alone
    with Trace() as trace:
        tests.policy_run.main(json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.write(json.dumps({"calls": trace.calls, "bytes": trace.bytes}) + "\n")
