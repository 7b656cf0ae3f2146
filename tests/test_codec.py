"""What goes through the wire comes out equal; what is no message never gets in."""

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec
from protocol.messages import Ack, Beat, Lease, Pulse, Stop
from tests.groups import make_group


def test_a_group_survives_the_way():
    group = make_group(3, rewards=[0.5, -1.0], reference=True)
    assert codec.decode_up(codec.encode(group)) == group


@pytest.mark.parametrize(
    "message",
    [Pulse(snapshot="s00000001.i0001", manifest_sha256="h"), Lease(split="eval", items=[(1, 2)]), Stop(final=True)],
)
def test_the_trainers_messages_survive_the_way(message):
    assert codec.decode_down(codec.encode(message)) == message


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_arrays_keep_type_and_values(dtype):
    array = np.arange(5).astype(dtype)
    out = codec.unpack(codec.pack(array))
    assert out.dtype == dtype and (out == array).all()


def test_an_array_of_another_type_or_shape_is_refused():
    with pytest.raises(TypeError, match="expected"):
        codec.pack(np.zeros(3))
    with pytest.raises(TypeError, match="expected"):
        codec.pack(np.zeros((2, 2), np.float32))


@pytest.mark.parametrize("data", [b"", b"x", b"\0\0\0f", b"abcH", b"\0" * 7 + b"i"])
def test_bytes_that_are_no_array_are_malformed(data):
    with pytest.raises(codec.Malformed):
        codec.unpack(data)


def test_the_narrowest_token_type_that_holds_the_vocabulary_is_used():
    assert codec.token_array([1, 2], 1 << 16).dtype == np.uint16
    assert codec.token_array([1, 2], (1 << 16) + 1).dtype == np.int32


def test_a_message_of_the_wrong_direction_is_malformed():
    with pytest.raises(codec.Malformed):
        codec.decode_down(codec.encode(Beat(session="a", snapshot=None, want=0, held=[], progress=0)))
    with pytest.raises(codec.Malformed):
        codec.decode_up(codec.encode(Ack(split="train", group_id=0, status="full")))


@pytest.mark.parametrize(
    "value",
    [
        {"type": "bye", "session": "a", "surprise": 1},
        {"type": "bye", "session": 3},
        {"type": "bye", "session": "a" * 300},
        {"type": "failure", "session": "a", "split": "train", "group_id": -1, "why": ""},
        {"type": "eval"},
        [[]] * 1000,
        None,
    ],
)
def test_unknown_fields_wrong_types_and_sizes_are_malformed(value):
    with pytest.raises(codec.Malformed):
        codec.decode_up(msgspec.msgpack.encode(value))


@pytest.mark.fault("F6")
@pytest.mark.parametrize(
    "bomb", [b"\x91" * 1_000_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf" + b"\xff" * 4]
)
def test_bombs_are_malformed_at_once(bomb):
    with pytest.raises(codec.Malformed):
        codec.decode_up(bomb)


@given(st.binary(max_size=300))
def test_no_bytes_do_worse_than_malformed(data):
    with contextlib.suppress(codec.Malformed):
        codec.decode_up(data)


@given(st.data())
def test_a_damaged_group_is_malformed_or_another_group(data):
    frame = bytearray(codec.encode(make_group(1)))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(codec.Malformed):
        codec.decode_up(bytes(frame))
