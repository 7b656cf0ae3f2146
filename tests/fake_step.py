"""The trainer's loop on a fake GPU, and what stands in for parts that need a real one or others.

`train`, `Policy`, `Record`, the loss and all that they call are the real ones. In the place of
DeepSpeed's engine, of the ranks' meeting, and of what talks to samplers and disks there are the
small classes below.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from policy import kernels
from policy.logprobs import Packed
from protocol.messages import Group
from protocol.metrics import MetricsWriter
from protocol.recipe import Recipe
from protocol.resolve import load
from tests.fake_cuda import GPU, FakeCuda
from tests.groups import make_group
from trainer.engine import Policy
from trainer.loop import train
from trainer.notes import Notes
from trainer.ranks import Ranks
from trainer.record import Record


class OneRank(Ranks):
    """A rank alone, on the fake GPU. Its start looks for no GPU and tries no backend."""

    def __init__(self) -> None:
        self.rank, self.world, self.device, self.backend = 0, 1, GPU, "nccl"
        store = dist.HashStore()
        self.notes, self.peers = Notes(store, 0, ["rank 0"]), ["rank 0"]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._control = dist.group.WORLD


class PlainEngine:
    """In the place of DeepSpeed's engine: what `Policy` asks of it, in plain torch, without ZeRO.

    DeepSpeed adds the gradients up in float32, here they keep the dtype of the model.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, make_schedule, clip: float) -> None:
        self.module, self.optimizer = model, optimizer
        self.schedule, self.largest_norm = make_schedule(optimizer), clip

    def move(self) -> None:
        """To the fake GPU: each parameter once, whoever shares it. The optimizer gets the new ones.

        `module.to` would keep the parameters and exchange what is in them, and FakeTensors do not
        allow that.
        """
        moved: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in self.module.parameters():
            moved[parameter] = nn.Parameter(parameter.detach().to(GPU), parameter.requires_grad)
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = moved[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(GPU)
        for group in self.optimizer.param_groups:
            group["params"] = [moved[parameter] for parameter in group["params"]]

    def __call__(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return self.module(packed)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Nothing is exchanged with other ranks."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.largest_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> Tensor:
        return self.norm

    def get_lr(self) -> list[float]:
        return self.schedule.get_last_lr()


def initialize(*, model, model_parameters, optimizer, lr_scheduler, config) -> list[PlainEngine]:
    """In the place of `deepspeed.initialize`."""
    return [PlainEngine(model, optimizer, lr_scheduler, config["gradient_clipping"])]


class Inbox:
    """Has the groups of each step; after the last one it asks the loop to stop."""

    waited_s = 0.0

    def __init__(self, steps: list[list[Group]]) -> None:
        self._steps = list(steps)

    def take(self, count: int) -> list[Group] | None:
        return self._steps.pop(0) if self._steps else None

    def commit(self, pulse: None, steps_done: int) -> None:
        pass

    def counts(self) -> dict[str, float]:
        return {"sampler/tokens": 0.0}


class Store:
    """Fetches the weights and writes nothing."""

    spent_s = 0.0
    lost = 0

    def publish(self, policy: Policy) -> None:
        for _, weight in policy.weights():
            assert weight.device.type == "cpu"

    def keep(self, step: int, groups: list[Group]) -> None:
        pass

    def checkpoint(self, policy: Policy, inbox: Inbox) -> None:
        pass

    def quarantine(self, policy: Policy, groups: list[Group], inbox: Inbox) -> None:
        raise AssertionError("a step was skipped")


class Exams:
    """Notes after each step how often the host has waited, and how many tensors it has sent."""

    over = False

    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu, self.lines = gpu, gpu.lines
        self.waits: list[Counter[tuple[str, str]]] = []
        self.uploads: list[Counter[str]] = []

    def look(self, policy: Policy) -> None:
        self.waits.append(Counter(self._gpu.waits))
        self.uploads.append(Counter(self._gpu.uploads))
        self._gpu.waits.clear()
        self._gpu.uploads.clear()


def without_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Puts stand-ins where our code, or torch's, would need a real GPU."""
    patch.setattr(deepspeed, "init_distributed", lambda **_: None)
    patch.setattr(deepspeed, "initialize", initialize)
    # Compares the numbers of two kernels, and a fake GPU has no numbers.
    patch.setattr(kernels, "kernel_gap", lambda *_: 0.0)
    # AdamW computes all parameters together if it knows their type, as it does on a GPU.
    optimizers = importlib.import_module("torch.optim.optimizer")
    patch.setattr(optimizers, "_foreach_supported_types", [torch.Tensor, nn.Parameter, FakeTensor])


def recipe(model: Path, *overrides: str) -> Recipe:
    small = ["trainer.steps=2", "trainer.tokens_per_micro_batch=60", "trainer.liger=off"]
    return load(None, [f"model.path={model}", *small, *overrides])


@contextlib.contextmanager
def on_gpu(policy: Policy) -> Iterator[FakeCuda]:
    """The policy on the fake GPU. It was made before: a model is loaded on the CPU in any case."""
    gpu = FakeCuda()
    with gpu.entered():
        policy._engine.move()
        gpu.uploads.clear()
        yield gpu


def run(of: Recipe, ranks: OneRank, directory: Path, steps: list[list[Group]]) -> Exams:
    """The real loop over these steps. Its record is `trainer.jsonl` in the directory."""
    policy, store = Policy(of, Path(of.model.path), ranks), Store()
    with MetricsWriter(directory / "trainer.jsonl") as writer, on_gpu(policy) as gpu:
        exams = Exams(gpu)
        train(policy, Inbox(steps), store, exams, Record(writer, ranks, store), of)
    assert len(exams.waits) == len(steps)
    return exams


def groups(step: int, count: int, reference: bool = True) -> list[Group]:
    """Made-up groups of four completions each."""
    found = []
    for number in range(5 * step, 5 * step + count):
        found.append(make_group(number, rewards=[0.0, 1.0, 0.5, 2.0], reference=reference))
    return found
