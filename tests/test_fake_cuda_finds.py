"""The fake GPU finds what it should: what is wrong here on purpose is named with its place."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fake_cuda import GPU, FakeCuda, Fault

COPY, NUMBER = "aten._to_copy.default", "aten._local_scalar_dense.default"


def ones() -> Tensor:
    return torch.ones(3, device=GPU)


def adds_a_number_of_the_cpu() -> None:
    ones() + torch.tensor(1.0)


def compares_with_the_cpu() -> None:
    assert (ones() > torch.zeros(3)).any()


def takes_an_index_of_the_cpu() -> None:
    ones()[torch.tensor([0, 2])]


def makes_float64() -> None:
    torch.ones(3, device=GPU, dtype=torch.float64)


def turns_into_float64() -> None:
    ones().double()


def sends_float64() -> None:
    torch.from_numpy(np.ones(3)).to(GPU)


def hangs_on_values() -> None:
    ones().unique()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (adds_a_number_of_the_cpu, r"aten.add.Tensor mixes .* tensors \[\] of the CPU"),
        (compares_with_the_cpu, r"aten.gt.Tensor mixes .* tensors \[3\] of the CPU"),
        (takes_an_index_of_the_cpu, r"aten.index.Tensor mixes .* tensors \[2\] of the CPU"),
        (makes_float64, "aten.ones.default makes torch.float64 on the GPU"),
        (turns_into_float64, "aten._to_copy.default makes torch.float64 on the GPU"),
        (sends_float64, "aten._to_copy.default makes torch.float64 on the GPU"),
        (hangs_on_values, "the host waits: aten._unique2.default hangs on values"),
    ],
)
def test_what_a_gpu_would_refuse_or_do_slowly_is_named(wrong, said):
    line = wrong.__code__.co_firstlineno + 1
    place = f"^tests/test_fake_cuda_finds.py:{wrong.__name__}, line {line}: "
    with FakeCuda().entered(), pytest.raises(Fault, match=place + ".*" + said):
        wrong()


class Curious(torch.autograd.Function):
    """Asks for a number in the backward pass."""

    @staticmethod
    def forward(ctx, given: Tensor) -> Tensor:
        return given * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()


def test_a_wait_in_a_backward_pass_is_named():
    with FakeCuda().entered() as gpu:
        Curious.apply(ones().requires_grad_()).sum().backward()
    assert gpu.waits == {("tests/test_fake_cuda_finds.py:Curious.backward", NUMBER): 1}


def put_by_a_mask(target: Tensor) -> None:
    target[target > 0] = target


@pytest.mark.parametrize(
    ("asks", "operation", "count"),
    [
        (lambda one: one.sum().item(), NUMBER, 1),
        (lambda one: float(one.sum()), NUMBER, 1),
        (lambda one: int(one.sum()), NUMBER, 1),
        (lambda one: 1 if one.any() else 2, NUMBER, 1),
        (lambda one: one.tolist(), NUMBER, 3),
        (lambda one: one.cpu().numpy(), COPY, 1),
        (lambda one: one.to("cpu", torch.float64), COPY, 1),
        (lambda one: torch.empty(3).copy_(one), "aten.copy_.default", 1),
        (lambda one: one.nonzero(), "aten.nonzero.default", 1),
        (lambda one: one.masked_select(one > 0), "aten.masked_select.default", 1),
        (lambda one: one[one > 0], "aten.index.Tensor", 1),
        (put_by_a_mask, "aten.index_put_.default", 1),
        (lambda one: one.repeat_interleave(one.int()), "aten.repeat_interleave.Tensor", 1),
        (lambda one: torch.equal(one, one), "aten.equal.default", 1),
    ],
)
def test_each_way_to_wait_is_counted(asks, operation, count):
    with FakeCuda().entered() as gpu:
        asks(ones())
    place = f"tests/test_fake_cuda_finds.py:{asks.__name__}"
    assert gpu.waits == {(place, operation): count}


def test_a_tensor_without_a_gpu_is_an_ordinary_one():
    with FakeCuda().entered() as gpu:
        host = torch.arange(3, dtype=torch.float64)
        assert host[host > 0].sum().item() == 3.0
        assert torch.full((2,), 1.0, device=GPU).cpu().tolist() == [1.0, 1.0]
    assert sum(gpu.waits.values()) == 1
    assert not gpu.uploads


def puts_numbers(target: Tensor, index: Tensor) -> None:
    target[0] = 5.0
    target[target > 0] = 5.0
    assert torch.where(target > 0, 1.0, torch.nan).dtype == torch.float32


def puts_a_number_at_an_index(target: Tensor, index: Tensor) -> None:
    target[index] = 5.0


def sends_two_tensors(target: Tensor, index: Tensor) -> None:
    torch.tensor([1.0, 2.0], device=GPU)
    target.copy_(torch.zeros(3))


UPLOADS = [(puts_numbers, 0), (puts_a_number_at_an_index, 1), (sends_two_tensors, 2)]


@pytest.mark.parametrize(("does", "count"), UPLOADS)
def test_tensors_that_the_host_sends_are_counted(does, count):
    """Also the number that torch makes a tensor of."""
    with FakeCuda().entered() as gpu:
        target, index = ones(), torch.zeros(2, dtype=torch.int64, device=GPU)
        does(target, index)
    assert not gpu.waits
    place = f"tests/test_fake_cuda_finds.py:{does.__name__}"
    assert gpu.uploads == ({place: count} if count else {})
