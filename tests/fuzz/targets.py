"""What is fuzzed. A target is a plain function of bytes that raises only where a property is violated.

The first byte chooses between raw bytes and moves built from them (`choices.Choices`). SEEDS are valid inputs to
start mutations from. Nothing here remembers anything between two inputs, so a crasher is one file.
"""

import atexit
import contextlib
import functools
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from protocol.errors import UserError
from protocol.resolve import dump, load
from protocol.snapshot import NAME, Corrupt, File, Manifest, Sealed, open_sealed, seal, staging, write_hashed
from sampler.rewards import builtin
from sampler.rewards.answers import final_answer, gold, number
from tests.fuzz import wire
from tests.fuzz.choices import Choices
from tests.fuzz.history import SESSIONS, History

RAW = 0
"""First byte of an input whose rest is the thing itself."""


def decoder(data: bytes) -> None:
    """Raw frames and damaged messages, through the decoder into a desk that has granted leases, and back."""
    choices = Choices(data)
    kind = choices.below(4)
    if kind == RAW:
        wire.Session().hear(choices.rest())
    elif kind == 1:
        wire.told(choices.rest())
    elif kind == 2:
        wire.told(choices.damage(wire.down(choices)))
    else:
        wire.play(choices)


def ledger(data: bytes) -> None:
    """Any order of what samplers, the clock, the trainer and crashes do to a ledger."""
    choices, history = Choices(data), History()
    while choices.left:
        _move(history, choices)
        history.check()
    history.drain()


def snapshot(data: bytes) -> None:
    """A sealed directory on a hostile disk: the sealed bytes or Corrupt; never a name that leads elsewhere."""
    choices = Choices(data)
    kind = choices.below(4)
    path, sha256, sealed = _sealed()
    if kind == RAW:
        _read_all(path, *_write(path, "manifest.json", choices.rest()))
    elif kind == 1:
        _read_all(path, *_write(path, "manifest.json", _manifest(choices)))
    else:
        name = "manifest.json" if kind == 2 else "model.safetensors"
        damaged = choices.damage(sealed[name])
        _write(path, name, damaged)
        try:
            found = open_sealed(path, sha256).read("model.safetensors")
            assert found == WEIGHTS and damaged == sealed[name], "damage was not noticed"
        except Corrupt:
            assert damaged != sealed[name], "sealed bytes were refused"
        _write(path, name, sealed[name])


def recipe(data: bytes) -> None:
    """TOML and `--set`: a recipe that survives the way back, or UserError in one line."""
    choices = Choices(data)
    text, overrides = "", []
    if choices.below(4) == RAW:
        text = choices.rest()
    else:
        overrides = [_override(choices) for _ in range(1 + choices.below(3))]
    try:
        loaded = load(Text(text) if text else None, overrides)
    except UserError as error:
        assert str(error)
        return
    assert load(Text(dump(loaded).encode())) == loaded
    assert all(math.isfinite(value) for value in (loaded.optimizer.learning_rate, loaded.network.beat_s)), "not finite"
    assert loaded.network.bind not in WILDCARDS, "listens everywhere"


def answers(data: bytes) -> None:
    """Answers and built-in rewards of hostile text: no error, no hang, and finite or None."""
    text = _text(Choices(data))
    for function in (final_answer, gold, number):
        _within(LIMIT_S, function, text)
    _within(3 * LIMIT_S, _rewards, text)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (decoder, ledger, snapshot, recipe, answers)
}

# -- ledger ------------------------------------------------------------------------------------------------------


def _move(history: History, choices: Choices) -> None:
    move = choices.below(16)
    session = SESSIONS[choices.below(3)]
    group_id = history.book.done_below + choices.below(9) - 1
    version = history.published[-1 - choices.below(3) % len(history.published)]
    match move:
        case 0 | 1 | 2:
            history.grant(session, version, 1 + choices.below(4))
        case 3 | 4 | 5:
            history.offer(max(0, group_id), version, right_row=not choices.seldom())
        case 6:
            history.fail(session, group_id)
        case 7:
            history.beat(session, {group_id, group_id + 1}, moved=choices.seldom())
        case 8:
            history.now += choices.below(30)
            history.expire()
        case 9:
            history.drop(session)
        case 10 | 11:
            history.take()
        case 12:
            history.commit()
        case 13:
            history.checkpoint()
        case 14:
            history.restore()
        case 15:
            history.set_aside() if choices.seldom() else history.publish()


# -- snapshot ----------------------------------------------------------------------------------------------------

WEIGHTS = bytes(range(256))
PARTS = ("model.safetensors", "ds", "..", ".", "", "/", "etc/passwd", "a" * 64, "a" * 65, "a\n", "\0", ".hidden", "a b")


@functools.cache
def _sealed() -> tuple[Path, str, dict[str, bytes]]:
    """A sealed directory in memory, its hash, and its files as they were sealed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parent = Path(tempfile.mkdtemp(prefix="vesper-fuzz-", dir=memory))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    name = "s00000001.i0001"
    with staging(parent, name) as aside:
        files = {"model.safetensors": write_hashed(aside / "model.safetensors", WEIGHTS)}
        sha256 = seal(aside, parent / name, _describe(files))
    return parent / name, sha256, {path.name: path.read_bytes() for path in (parent / name).iterdir()}


def _describe(files: dict[str, File]) -> Manifest:
    name = "s00000001.i0001"
    return Manifest(kind="full", run_id="r", id=name, parent=None, step=1, incarnation=1, model="m", files=files)


def _manifest(choices: Choices) -> bytes:
    """By a writer who knows the format; the hash will be right."""
    files = {}
    for _ in range(1 + choices.below(3)):
        name = choices.pick("/ ").strip().join(choices.pick(PARTS) for _ in range(1 + choices.below(3)))
        files[name] = File(choices.pick((0, 256, -1, 1 << 63)), choices.pick(("", "0" * 64, "x" * 1000)))
    return msgspec.json.encode(_describe(files))


def _write(path: Path, name: str, data: bytes) -> tuple[str]:
    with open(path / name, "wb") as file:
        file.write(data)
    return (hashlib.sha256(data).hexdigest(),)


def _read_all(path: Path, sha256: str) -> None:
    """Of a manifest whose hash is right, whoever wrote it."""
    _, _, sealed = _sealed()
    with contextlib.suppress(Corrupt):
        directory: Sealed = open_sealed(path, sha256)
        for name, file in directory.manifest.files.items():
            assert all(NAME.fullmatch(part) for part in name.split("/")), f"{name!r} leads elsewhere"
            assert Path(os.path.normpath(path / name)).is_relative_to(path), f"{name!r} leads elsewhere"
            with contextlib.suppress(Corrupt):
                found = directory.read(name)
                assert (len(found), hashlib.sha256(found).hexdigest()) == (file.size, file.sha256)
    _write(path, "manifest.json", sealed["manifest.json"])


# -- recipe ------------------------------------------------------------------------------------------------------

KEYS = (
    *("name", "seed", "reward", "network.bind", "network.beat_s", "trainer.steps", "trainer.zero_stage", "lora.rank"),
    *("optimizer.learning_rate", "optimizer.betas", "sampling.stop", "data.prefix", "data.system", "model.path"),
    *("", ".", "model", "trainer.stepz", "a.b.c", "seed.x", "reward.function", "network.bind.x", "name "),
)
VALUES = (
    *(
        "1",
        "-1",
        "0",
        "nan",
        "inf",
        "1e308",
        "9" * 20,
        "9" * 5000,
        "true",
        '""',
        "''",
        "[]",
        "{}",
        "[[]]",
        "2020-01-01",
    ),
    *("[" * 2000, "{a=" * 500, '["a"]', '{function="gsm8k"}', '[{function="f"}]', '"\\u0000"', '"\\ud800"', "0.0.0.0"),
    *(
        "0",
        "0x0",
        "::",
        "[::]",
        "::0",
        "*",
        "localhost",
        "127.0.0.1",
        "a\nb = 2",
        '"""',
        "0.9",
        "[0.9, 0.999]",
        "bfloat16",
    ),
)
WILDCARDS = ("", "0", "0x0", "0.0.0.0", "::", "[::]", "::0", "*")


class Text:
    """What `load` needs of a path; no file is written for each input."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_text(self) -> str:
        return self._data.decode()


def _override(choices: Choices) -> str:
    value = choices.pick(VALUES)
    override = f"{choices.pick(KEYS)}={value}"
    if choices.seldom():
        override = choices.damage(override.encode()).decode(errors="replace")
    return override


# -- answers -----------------------------------------------------------------------------------------------------

PIECES = (
    *("####", "#### ", "\\boxed{", "\\boxed {", "}", "{", "\\{", "\\}", "<answer>", "</answer>", "<think>", "</think>"),
    *(
        "\\frac{",
        "\\dfrac{1}{2}",
        "}{",
        "\\text{",
        "\\text{a}",
        "{,}",
        "~",
        "\\,",
        "\\$",
        "\\%",
        "$",
        "\u20ac",
        "-",
        "+",
    ),
    *(
        "1",
        "0",
        "1,",
        "1,000",
        ".5",
        "3.14",
        "/",
        "1/0",
        "%",
        " ",
        "\n",
        "\t",
        "a",
        "apples",
        "^{2}",
        "\u2212",
        "\u0660",
    ),
    *("9" * 200, " " * 50, "1" * 50, "a" * 50, "', ", "(", ")", "*", "_", "`", "\0", "\u202e", "\ud7ff"),
)
LONGEST_TEXT = 32 << 10
LIMIT_S = 0.050
"""For one function and one such text."""


def _text(choices: Choices) -> str:
    kind = choices.below(64)
    if kind < 16:
        return choices.rest().decode(errors="replace")[:LONGEST_TEXT]
    longest = LONGEST_TEXT if choices.below(256) == 255 else 1024
    text = ""
    while choices.left and len(text) < longest:
        text += choices.pick(PIECES)
    return (text * (longest // max(1, len(text))) if kind < 24 else text)[:longest]


def _rewards(text: str) -> None:
    options = {"prompts": ["p", "p"], "completions": [text, [{"role": "assistant", "content": text}]]}
    values = builtin.gsm8k(**options, answer=["#### 5", text]) + builtin.format_think_answer(**options)
    assert len(values) == 4 and all(value is None or math.isfinite(value) for value in values)


def _within(limit_s: float, function: Callable[[str], object], text: str) -> None:
    """Its own time, not that of others on the machine; and again, because even that can be disturbed."""
    for _ in range(4):
        began = time.thread_time()
        function(text)
        spent = time.thread_time() - began
        if spent < limit_s:
            return
    raise AssertionError(f"{function.__name__} took {spent:.3f} s for {len(text)} characters")


SEEDS: dict[str, list[bytes]] = {
    "decoder": [bytes([RAW]) + frame for frame in wire.UP]
    + [b"\1" + frame for frame in wire.DOWN]
    + [b"\3" + bytes(24)],
    "ledger": [bytes([0, 0, 0, 0, 3, 3, 0, 1, 0, 0, 3, 0, 2, 0, 0, 10, 0, 0, 0, 12, 0, 0, 0, 14, 0, 0, 0])],
    "snapshot": [
        bytes([RAW]) + msgspec.json.encode(_describe({"ds/a": File(1, "x"), "b": File(256, "y")})),
        b"\2",
        b"\3",
    ],
    "recipe": [bytes([RAW]) + path.read_bytes() for path in sorted(Path("recipes").glob("*.toml"))],
    "answers": [
        b"\0<think>1+1</think><answer>\\boxed{-$1,080.50}</answer>",
        b"\0so #### 3/4\n",
        b"\x20" + bytes(range(40)),
    ],
}
