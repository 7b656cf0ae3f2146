"""Messages <-> msgpack bytes, arrays <-> typed little-endian bytes. The only file that names msgspec's msgpack.

Decoding is typed from the first byte: an unknown field, a wrong type, deep nesting or a giant declared length
is `Malformed` before anything is built. Memory of a decoded message is bounded by its frame.
"""

import msgspec
import numpy as np

from protocol.messages import PROTOCOL, Agreement, DataSet, Down, Group, Hello, Text, Up

MAX_FRAME = 64 << 20
"""Bytes; ZeroMQ disconnects a peer that sends more."""

_DTYPES = {ord("H"): np.dtype("<u2"), ord("i"): np.dtype("<i4"), ord("f"): np.dtype("<f4")}
_encoder = msgspec.msgpack.Encoder()
_up = msgspec.msgpack.Decoder(Up)
_down = msgspec.msgpack.Decoder(Down)
_groups = msgspec.msgpack.Decoder(list[Group])


class _Version(msgspec.Struct):
    protocol: int


class _Greeting(msgspec.Struct, tag="hello"):
    """What no version of the protocol may change about a Hello."""

    session: Text
    agreement: _Version


_greeting = msgspec.msgpack.Decoder(_Greeting)


class Malformed(Exception):
    """Bytes that are no message, or no array, of this protocol."""


def encode(message: Up | Down) -> bytes:
    return _encoder.encode(message)


def decode_up(frame: bytes) -> Up:
    """A sampler's message. Raises Malformed.

    A Hello of another version is read as far as that goes: it can then be refused by its version, and is not dropped.
    """
    try:
        return _decode(_up, frame)
    except Malformed:
        greeting = _decode(_greeting, frame) if b"hello" in frame else None
        if greeting is None or greeting.agreement.protocol == PROTOCOL:
            raise
    agreement = Agreement(
        protocol=greeting.agreement.protocol,
        run_id="",
        model="",
        tokenizer="",
        vocabulary=0,
        group_size=0,
        recipe="",
    )
    unknown = DataSet(rows=0, fingerprint="")
    return Hello(session=greeting.session, agreement=agreement, train=unknown, eval=unknown)


def decode_down(frame: bytes) -> Down:
    """The trainer's message. Raises Malformed."""
    return _decode(_down, frame)


def encode_groups(groups: list[Group]) -> bytes:
    """For the way from rank 0 to the other ranks; the same strict decoding waits there."""
    return _encoder.encode(groups)


def decode_groups(data: bytes) -> list[Group]:
    return _groups.decode(data)


def pack(array: np.ndarray) -> bytes:
    """[n] array of uint16, int32 or float32 -> its little-endian bytes and, last, one byte that names the type."""
    code = ord(array.dtype.char)
    if code not in _DTYPES or array.ndim != 1:
        raise TypeError(f"cannot pack {array.ndim}-dimensional {array.dtype}; expected [n] uint16, int32 or float32")
    return array.astype(_DTYPES[code], copy=False).tobytes() + bytes([code])


def unpack(data: bytes) -> np.ndarray:
    """The array that `pack` wrote, read-only, without a copy. Raises Malformed."""
    dtype = _DTYPES.get(data[-1]) if data else None
    if dtype is None or (len(data) - 1) % dtype.itemsize:
        raise Malformed(f"{len(data)} bytes are no packed array")
    return np.frombuffer(data, dtype, count=(len(data) - 1) // dtype.itemsize)


def unpack_joined(parts: list[bytes]) -> tuple[np.ndarray, list[int]]:
    """What `pack` wrote, as one array, and the length of each part: floats, or token ids. Raises Malformed.

    Much faster than one by one where parts are short.
    """
    codes = {part[-1:] for part in parts}
    if codes == {b"H", b"i"}:
        arrays = [unpack(part) for part in parts]
        return np.concatenate(arrays), [len(array) for array in arrays]
    dtype = _DTYPES.get(ord(codes.pop() or b"-")) if len(codes) == 1 else None
    if dtype is None or {len(part) % dtype.itemsize for part in parts} != {1 % dtype.itemsize}:
        raise Malformed(f"{len(parts)} byte strings are no packed arrays, or not of one type")
    joined = np.frombuffer(b"".join([part[:-1] for part in parts]), dtype)
    return joined, [len(part) // dtype.itemsize for part in parts]


def token_array(ids: list[int], vocabulary: int) -> np.ndarray:
    """Token ids in the narrowest type that holds the vocabulary."""
    return np.asarray(ids, np.uint16 if vocabulary <= 1 << 16 else np.int32)


def _decode(decoder: msgspec.msgpack.Decoder, frame: bytes):
    if len(frame) > MAX_FRAME:
        raise Malformed(f"frame of {len(frame)} bytes; the limit is {MAX_FRAME}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(str(error)) from None
