"""Weights are written tensor by tensor, as the files that safetensors itself would write, and never held whole."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from protocol.errors import Diverged
from protocol.snapshot import hash_file
from tests.tiny import make_model
from trainer.shards import Entry, header, plan, write_file, write_shards


def some() -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes, wide ones first; with an odd number of narrow elements, and none."""
    torch.manual_seed(0)
    return {
        "long": torch.arange(7),
        "wide": torch.randn(11, 5),
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(6, 4).T,
        "narrow": torch.randn(3, 3).bfloat16(),
        "none": torch.zeros(0, 4).bfloat16(),
        "half": torch.randn(9).half(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bits": torch.tensor([True, False, True]),
    }


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        and torch.equal(one[name], other[name]) for name in one
    )  # fmt: skip


def test_a_file_holds_what_safetensors_own_writer_writes(tmp_path):
    tensors = some()
    file = write_file(tmp_path / "ours.safetensors", entries(tensors), iter(tensors.items()))
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert same(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs"))
    with safe_open(tmp_path / "ours.safetensors", "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in tensors)
    assert file == hash_file(tmp_path / "ours.safetensors")


def test_tensors_begin_at_multiples_of_their_elements():
    text = header(entries(some()))
    assert len(text) % 8 == 0 and int.from_bytes(text[:8], "little") == len(text) - 8
    table = json.loads(text[8:])
    for name, tensor in some().items():
        assert table[name]["data_offsets"][0] % tensor.element_size() == 0


@pytest.mark.parametrize(("limit", "files"), [(1 << 30, 1), (200_000, 2), (1, 26)])
def test_a_model_directory_of_any_number_of_files_is_loaded(tmp_path, limit, files):
    """By transformers, and its files are named and described as its own."""
    source = make_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    target = tmp_path / "target"
    target.mkdir()
    written = write_shards(target, entries(weights), iter(weights.items()), limit)
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    again = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
    assert same(weights, {name: parameter.detach() for name, parameter in again.items()})
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) == files and written == {p.name: hash_file(p) for p in target.glob("model*")}
    if files > 1:
        assert shards[0].name == f"model-00001-of-{files:05d}.safetensors"
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        assert {name: index["weight_map"][name] for name in weights} == index["weight_map"]


def test_a_file_is_full_before_the_next_one_begins():
    table = [Entry(name, torch.float32, (size,)) for name, size in zip("abcde", (10, 20, 100, 5, 5), strict=True)]
    assert [[entry.name for entry in shard] for shard in plan(table, 160)] == [["a", "b"], ["c"], ["d", "e"]]


def test_only_one_tensor_is_alive_at_a_time(tmp_path):
    """Tensors are made one by one and counted as long as anything refers to them."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def made():
        nonlocal most
        for number in range(20):
            tensor = torch.full((100,), float(number))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{number}", tensor
            del tensor

    table = [Entry(f"t{number}", torch.float32, (100,)) for number in range(20)]
    write_shards(tmp_path, table, made(), limit=2000)
    assert len(alive) == 20 and most == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_the_rest_can_still_be_taken(tmp_path, bad):
    """The other ranks gather with us to the last tensor."""
    tensors = some()
    tensors["scalar"] = torch.tensor(bad)
    weights = iter(tensors.items())
    with pytest.raises(Diverged, match="scalar holds values that are not finite"):
        write_shards(tmp_path, entries(tensors), weights)
    assert [name for name, _ in weights] == list(tensors)[3:]


def test_a_full_disk_leaves_the_rest_to_be_taken(tmp_path, monkeypatch):
    tensors = {f"t{number}": torch.zeros(100) for number in range(10)}
    weights = iter(tensors.items())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("protocol.disk.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shards(tmp_path, entries(tensors), weights, limit=1200)
    assert [name for name, _ in weights] == list(tensors)[3:]


def test_other_tensors_than_announced_are_refused(tmp_path):
    tensors = some()
    with pytest.raises(ValueError, match=r"long.* was announced"):
        write_file(Path(tmp_path / "x"), entries(tensors), iter([("long", torch.zeros(7))]))
