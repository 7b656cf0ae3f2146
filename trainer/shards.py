"""Tensors -> .safetensors files, one tensor at a time: nobody needs to hold a file's worth of them.

The format is safetensors' own (huggingface.co/docs/safetensors): the length of a header (8 bytes, little-endian), the
header in JSON with name, dtype, shape and place of each tensor, then their bytes without gaps. Names and shapes are
known before the tensors are, so header, number of files and index are, too.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.disk import write_new
from protocol.errors import Diverged
from protocol.snapshot import File, write_hashed

SHARD_BYTES = 2 << 30
CHUNK_BYTES = 8 << 20
"""Checked, hashed and written together."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]], limit: int = SHARD_BYTES
) -> dict[str, File]:
    """Files of at most `limit` bytes of tensors each (a larger tensor has its own), and an index of several.

    tensors: on the CPU, in the order of the entries, each used before the next is asked for. entries: those of wider
    dtypes first, so that each tensor begins at a multiple of its element. Raises Diverged for one that is not finite,
    ValueError for one that is not as announced, OSError.
    """
    shards = plan(entries, limit)
    single = len(shards) == 1
    names = ["model.safetensors"] if single else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    files = {name: write_file(directory / name, shard, tensors) for name, shard in zip(names, shards, strict=True)}
    if single:
        return files
    index = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    name = "model.safetensors.index.json"
    return files | {name: write_hashed(directory / name, text.encode())}


def plan(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """The entries of each file, in their order."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]]) -> File:
    """One .safetensors file; takes as many tensors as there are entries. Raises as `write_shards`."""
    digest, size = hashlib.sha256(), 0

    def hashed(hasher: Executor) -> Iterator[bytes | memoryview]:
        nonlocal size
        for chunk in _chunks(entries, tensors):
            hashing = hasher.submit(digest.update, chunk)
            size += len(chunk)
            yield chunk  # written meanwhile
            hashing.result()
            del chunk  # else its tensor would live on while the next one is gathered

    with ThreadPoolExecutor(1) as hasher:
        write_new(path, hashed(hasher))
    return File(size, digest.hexdigest())


def header(entries: Iterable[Entry]) -> bytes:
    """The file's beginning, filled up with spaces so that the tensors begin at a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        table[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    yield header(entries)
    for entry in entries:
        name, tensor = next(tensors)
        if (name, tensor.dtype, tuple(tensor.shape)) != (entry.name, entry.dtype, entry.shape):
            raise ValueError(f"{entry} was announced, {name} {tensor.dtype} {tuple(tensor.shape)} came")
        for part in tensor.contiguous().flatten().split(CHUNK_BYTES // tensor.dtype.itemsize):
            if not finite(part):
                raise Diverged(
                    f"{name} holds values that are not finite: nothing is published; lower the learning rate"
                )
            yield part.view(torch.uint8).numpy().data
        del tensor, part  # else it would live on while the next one is gathered


def finite(tensor: Tensor) -> bool:
    """Whether all values are. One that is not spoils the sum, which is ten times faster than looking at each; a sum
    that is too large for its type proves nothing."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
