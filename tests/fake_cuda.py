"""CUDA tensors without a GPU: torch's FakeTensors have shape, dtype and device, but no values.

`FakeCuda` looks at each operation of torch before it runs. It refuses what a GPU refuses or does
slowly:

    a tensor of the CPU in an operation with one of the GPU, also one without dimensions, which
    torch itself tolerates
    a float64 tensor on the GPU

It counts by their places in our code, `trainer/engine.py:Policy.update` for example:

    waits     operations that give the host a value of the GPU: the host waits until it is there
    uploads   tensors of the host that are copied to the GPU

Tensors of the CPU stay real and are computed as ever. What the host fetches from the GPU is a real
tensor, too, full of ones, because nobody knows the true values. A mask is true everywhere.

A CPU build of torch has no guard for CUDA devices and no streams, and without them neither an
index nor autograd works. Torch's C++ code asks a FakeTensor for its device by the operation
`prim.device`. Here the answer is `meta`, which needs neither, and what C++ code then makes on
`meta` is made on the GPU. Python code reads the attribute `device`, which is `cuda:0`. This has a
price: `x.to(device)` is an operation also where the tensor is there already.
"""

import contextlib
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
META = torch.device("meta")
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("policy", "protocol", "trainer", "tests")
DOUBLE = (torch.float64, torch.complex128)
aten = torch.ops.aten
PUTS = (aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)


class Fault(AssertionError):
    """Something that must not happen on a GPU. The message begins with the place in our code."""


class FakeCuda(FakeTensorMode):
    """While it is entered, `GPU` is a device whose tensors have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        """(place, operation) -> how often the host has waited for the GPU."""
        self.uploads: Counter[str] = Counter()
        """Place -> how many tensors of the host were copied to the GPU."""
        self.lines: defaultdict[str, set[int]] = defaultdict(set)
        """Place -> the lines in which that happened."""
        self._inside = False
        """Whether FakeTensorMode computes one operation by several others."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[Self]:
        is_cuda = property(lambda tensor: tensor.fake_device.type == "cuda")
        # With several threads autograd would compute in one that does not know this mode.
        alone = torch.autograd.set_multithreading_enabled(False)
        with mock.patch.object(FakeTensor, "is_cuda", is_cuda), alone, self:
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return META if on_gpu(args[0]) else args[0].device
        kwargs = dict(kwargs or {})
        asked_by_torch = kwargs.get("device") == META
        if asked_by_torch:
            kwargs["device"] = GPU
        if self._inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        if not any(map(on_gpu, tensors)) and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        self._inside = True
        try:
            found = self._looked_at(func, types, args, kwargs, tensors)
        finally:
            self._inside = False
        if asked_by_torch and func is aten.scalar_tensor.default:
            found.was_a_number = True
        return found

    def _looked_at(self, func, types, args, kwargs, tensors: list[Tensor]) -> object:
        copied = self._copied(func, types, args, kwargs)
        if copied is None:
            refuse_mixed(func, tensors)
            copied = self._computed(func, types, args, kwargs)
        refuse_double(func, copied)
        return copied

    def _copied(self, func, types, args, kwargs) -> Tensor | None:
        """A copy between the host and the GPU; None for all other operations."""
        if func is aten.copy_.default:
            target, source = args[:2]
            to_gpu = on_gpu(target)
        elif func is aten._to_copy.default:
            target, source = None, args[0]
            device = kwargs.get("device")
            to_gpu = on_gpu(source) if device is None else device.type == "cuda"
        else:
            return None
        if on_gpu(source) == to_gpu:
            return None
        if to_gpu:
            self._upload()
            if target is None:
                on_cpu = self.from_tensor(source.detach())
                return super().__torch_dispatch__(func, types, (on_cpu,), kwargs)
            return target
        self._wait(func)
        if target is None:
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return target.fill_(1)

    def _computed(self, func, types, args, kwargs) -> object:
        """What the operation gives. What hangs on values is made up, and counts as a wait."""
        if func in ANSWERS and not kwargs.get("output_size"):
            self._wait(func)
            with self:
                return ANSWERS[func](*args)
        if func is aten.index.Tensor and any(map(is_mask, args[1])):
            self._wait(func)
            with self:
                args = (args[0], as_numbers(args[1]))
        if func in PUTS:
            self._put(func, *args[:3])
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise Fault(f"{where()}: the host waits: {func} hangs on values") from None

    def _put(self, func, target: Tensor, indices: list[Tensor | None], values: Tensor) -> None:
        """`target[indices] = values` where an index is a tensor.

        Of a number torch makes a tensor of the CPU, which it then copies to the GPU. Only with a
        single mask it stays a number. Any other mask is turned into indices, and the host waits.
        """
        is_number = getattr(values, "was_a_number", False)
        if is_number and len(indices) == 1 and is_mask(indices[0]):
            return
        if any(map(is_mask, indices)):
            self._wait(func)
        if is_number:
            self._upload()

    def _wait(self, func) -> None:
        place, line = our_code()
        self.waits[place, str(func)] += 1
        self.lines[place].add(line)

    def _upload(self) -> None:
        place, line = our_code()
        self.uploads[place] += 1
        self.lines[place].add(line)


def on_gpu(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def refuse_mixed(func, tensors: list[Tensor]) -> None:
    """All tensors of one operation must be on the GPU."""
    strangers = [tensor for tensor in tensors if not on_gpu(tensor)]
    if strangers:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in strangers)
        raise Fault(f"{where()}: {func} mixes tensors of the GPU with tensors {shapes} of the CPU")


def refuse_double(func, found: object) -> None:
    for tensor in tree_leaves(found):
        if isinstance(tensor, Tensor) and on_gpu(tensor) and tensor.dtype in DOUBLE:
            raise Fault(f"{where()}: {func} makes {tensor.dtype} on the GPU")


def as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The same with numbers in the place of masks, which are taken to be true everywhere."""
    found = []
    for index in indices:
        if is_mask(index):
            found += [index.new_zeros(index.numel(), dtype=torch.int64)] * index.dim()
        else:
            found.append(index)
    return found


def one(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_zeros((tensor.numel(), tensor.dim()), dtype=torch.int64)


def masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_zeros(torch.broadcast_shapes(tensor.shape, mask.shape).numel())


ANSWERS = {
    aten._local_scalar_dense.default: one,
    aten.equal.default: lambda tensor, other: True,
    aten.nonzero.default: nonzero,
    aten.masked_select.default: masked_select,
    aten.repeat_interleave.Tensor: torch.zeros_like,  # without output_size: each is repeated once
}
"""Operations whose result, or its shape, hangs on values, and what is answered."""


def our_code() -> tuple[str, int]:
    """The innermost function of ours that is being executed, and the line."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        file = our_file(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_code.co_qualname.split('.<locals>.<')[0]}", frame.f_lineno
        frame = frame.f_back
    return "no code of ours", 0


def where() -> str:
    place, line = our_code()
    return f"{place}, line {line}"


@functools.cache
def our_file(name: str) -> str | None:
    path = Path(name).resolve()
    if not path.is_relative_to(ROOT) or path == Path(__file__).resolve():
        return None
    file = path.relative_to(ROOT)
    return str(file) if file.parts[0] in ROOMS else None
