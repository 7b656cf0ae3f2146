"""How others write a group, and bytes that nobody looks into, over the same sockets, for `benchmarks.wire`."""

import json
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from benchmarks.hub_load import Size, arrays, make_group
from benchmarks.processes import spent_since, thread_seconds
from protocol import codec
from protocol.channel import DOMAIN
from protocol.keys import Keys


@dataclass(frozen=True)
class Format:
    """encode makes the frame of one group, decode what its reader works with."""

    encode: Callable[[], bytes]
    decode: Callable[[bytes], object]
    encrypted: bool = True


def formats(size: Size) -> dict[str, Format]:
    """pickle: a whole episode a completion, as grpo_reproduce sends it. msgpack: lists of numbers, as prime-rl. JSON
    lines: with the text, as PipelineRL. Texts are made up: four letters a token."""
    frame = codec.encode(make_group(size))
    packer, unpacker = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder()
    return {
        "raw, CURVE": Format(lambda: frame, len),
        "raw, plain": Format(lambda: frame, len, encrypted=False),
        "pickle": Format(lambda: pickle.dumps(episodes(size)), pickle.loads),  # our own child's
        "msgpack lists": Format(lambda: packer.encode(lists(size)), unpacker.decode),
        "JSON lines": Format(lambda: lines(size), lambda data: [json.loads(line) for line in data.splitlines()]),
    }


def episodes(size: Size) -> list[dict[str, object]]:
    """With prompt and completion joined once more, and log-probs over both."""
    prompt, completions = arrays(size)
    asked, found = prompt.tolist(), []
    for tokens, logprobs, *reference in completions:
        padded = [np.concatenate([np.zeros(size.prompt, np.float32), part]) for part in (logprobs, *reference)]
        found.append({
            "prompt": "word" * size.prompt, "prompt_tokens": [f"t{token}" for token in asked], "prompt_ids": asked,
            "ids": tokens.tolist(), "whole_ids": asked + tokens.tolist(), "text": "word" * size.length,
            "logprobs": padded, "reward": 0.5,
        })  # fmt: skip
    return found


def lists(size: Size) -> list[dict[str, object]]:
    """The prompt with each completion, and masks, temperatures and advantages a token."""
    prompt, completions = arrays(size)
    asked, ones = prompt.tolist(), [1.0] * size.length
    return [
        {"prompt_ids": asked, "prompt_mask": [False] * size.prompt, "ids": tokens.tolist(),
         "mask": [True] * size.length, "temperatures": ones, "advantages": ones,
         "logprobs": [part.tolist() for part in parts], "reward": 0.5}
        for tokens, *parts in completions
    ]  # fmt: skip


def lines(size: Size) -> bytes:
    prompt, completions = arrays(size)
    asked = prompt.tolist()
    rows = [
        {"input_ids": asked + tokens.tolist(), "labels": [-100] * size.prompt + tokens.tolist(), "reward": 0.5,
         "logprobs": [part.tolist() for part in parts], "text": "word" * (size.prompt + size.length)}
        for tokens, *parts in completions
    ]  # fmt: skip
    return b"\n".join(json.dumps(row).encode() for row in rows)


def send_all(form: Format, keys: Keys, address: str, number: int, groups: int, window: int) -> dict[str, object]:
    """One client: `groups` frames, at most `window` of them unanswered."""
    with dealer(keys, address, number, form.encrypted) as socket:
        sent: dict[str, float] = {}
        socket.send(b"")  # the handshake is not counted
        socket.recv()
        before = thread_seconds()
        for index in range(groups):
            if index >= window:
                socket.recv()
            sent[f"{number}/{index}"] = time.monotonic()
            socket.send(form.encode())
        for _ in range(min(window, groups)):
            socket.recv()
        return {"times": sent, "frames": groups} | spent_since(before)


def receive_all(form: Format, keys: Keys, port: int, clients: int, groups: int) -> dict[str, object]:
    """The other end: reads each frame, then answers it with an empty one."""
    context = zmq.Context()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain=DOMAIN, location=str(keys.clients))
    socket = context.socket(zmq.ROUTER)
    if form.encrypted:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.hub_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.hub_public)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
    socket.bind(f"tcp://127.0.0.1:{port}")
    peers = [socket.recv_multipart()[0] for _ in range(clients)]
    times, counts, before = {}, dict.fromkeys(peers, 0), thread_seconds()
    for peer in peers:
        socket.send_multipart([peer, b""])
    for _ in range(clients * groups):
        peer, frame = socket.recv_multipart()
        form.decode(frame)
        times[f"{peer.decode()}/{counts[peer]}"] = time.monotonic()
        counts[peer] += 1
        socket.send_multipart([peer, b""])
    used = spent_since(before)
    socket.close(1000)
    authenticator.stop()
    context.term()
    return {"times": times, "frames": len(times), "trained": len(times), "dropped": {}} | used


@contextmanager
def dealer(keys: Keys, address: str, number: int, encrypted: bool = True) -> Iterator[zmq.Socket]:
    """A client's socket; its sends and receives block."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, str(number).encode())
    if encrypted:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.hub_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.sampler_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.sampler_public)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.wire")
