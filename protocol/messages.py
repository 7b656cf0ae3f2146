"""The protocol: every message between the trainer (ROUTER, binds) and its samplers (DEALER, connect).

One message is one frame of msgpack. The trainer owns an ordered list of prompt groups and leases their ids;
a sampler answers each lease with one Group. The id is the idempotency key: a group may be sent many times
and is trained once. Nothing here is kept by a sampler: all of it can be lost and is asked for again.

    sampler                                      trainer
    Hello  at start and after Who          ->    Welcome, or Rejection and no more
    Beat   every beat_s, sooner with news  ->    Pulse (which weights), Lease (which prompts), Stop
    Group  one answered lease, until acked ->    Ack, and Lease for the next
    Failure  a lease that cannot be answered ->  Ack
    Unreadable  the announced weights       ->   (the trainer looks at them itself)
    Bye    ends here; leases go to others        Who: say Hello first (the trainer was restarted)

A Pulse is level-triggered: it names the weights that samplers should use now, again and again, so that a lost
one costs nothing. Integers are checked by type, arrays by `codec.unpack`, sizes by the limits below.
Errors: a frame that does not decode is counted and dropped; a Group that makes no sense is acked `invalid`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

PROTOCOL = 2
"""Both sides must speak the same version; there is no negotiation."""

Text = Annotated[str, Meta(max_length=256)]
SnapshotId = Annotated[str, Meta(pattern=r"\As\d{8,20}\.i\d{4,20}\Z")]
"""`snapshot.snapshot_id` makes them. Nothing else can be one, so none leads out of a directory."""
MAX_WHY = 4096
Why = Annotated[str, Meta(max_length=MAX_WHY)]
Array = Annotated[bytes, Meta(max_length=32 << 20)]
"""A one-dimensional array as `codec.pack` wrote it."""
Count = Annotated[int, Meta(ge=0)]
MAX_ROWS = 10_000_000
"""Of a split; the trainer keeps the order of an epoch in memory."""
MAX_LEASES = 10_000
"""In one message."""
Split = Literal["train", "eval"]
"""Two lists of groups with their own ids; `eval` groups are scored and never trained."""
Finish = Literal["stop", "length"]
"""How a completion ended: by itself, or at `sampling.max_tokens`."""
Status = Literal["accepted", "duplicate", "stale", "invalid", "unknown", "full", "failed", "no_signal"]
"""What became of a group that a sampler sent."""


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=str.lower):
    pass


class Agreement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both sides must hold to be the same; compared field by field at the handshake."""

    protocol: int
    run_id: Text
    model: Text
    """Fingerprint of the model's configuration."""
    tokenizer: Text
    """Fingerprint of vocabulary, special tokens and chat template."""
    vocabulary: Count
    group_size: Count
    recipe: Text
    """`resolve.fingerprint`: of the settings that both sides must hold alike."""


class DataSet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows of a split and the fingerprint of their rendered prompts; the first sampler's counts for the run."""

    rows: Annotated[int, Meta(ge=0, le=MAX_ROWS)]
    fingerprint: Text


class Hello(Message, frozen=True):
    session: Text
    """Random, new for every sampler process."""
    agreement: Agreement
    train: DataSet
    eval: DataSet
    versions: dict[Text, Text] = {}
    """Of the libraries on the sampler's side, for the log."""


class Beat(Message, frozen=True):
    session: Text
    snapshot: SnapshotId | None
    """Loaded and verified; None before the first one."""
    want: Count
    """Completions that the engine could take on top of those it holds."""
    held: Annotated[list[tuple[Split, Count]], Meta(max_length=100_000)]
    """Leases being worked on or waiting for their ack; a lease missing here was lost."""
    progress: Count
    """Tokens sampled since the start; a frozen one means a stuck engine."""


class Span(Struct, frozen=True, array_like=True):
    """Tokens [start, end) were sampled with the weights of `snapshot`."""

    snapshot: SnapshotId
    start: Count
    end: Count


class Completion(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer. n = number of its tokens, the stop token included."""

    tokens: Array
    """[n] uint16, or int32 for vocabularies above 65536"""
    logprobs: Array
    """[n] float32: of the sampled tokens, under the weights and at the temperature that sampled them."""
    ref_logprobs: Array | None
    """[n] float32 under the reference at the same temperature; None where no reference is used."""
    finish: Finish
    spans: Annotated[list[Span], Meta(min_length=1, max_length=4096)]
    reward: float
    rewards: dict[Text, float | None]
    """By function, before weighting; None = not applicable."""
    answers: dict[Text, Text | None] = {}
    """Of a held-out prompt, by extractor: the final number as a fraction, None where there is none."""


class Group(Message, frozen=True):
    """One prompt, its completions, their rewards.

    Example: Group(session="f3a1", split="train", group_id=17, row=2931, prompt=<uint16 [61]>, completions=[8 of them])
    """

    session: Text
    split: Split
    group_id: Count
    row: Count
    prompt: Array
    """[m] token ids"""
    completions: Annotated[list[Completion], Meta(min_length=1, max_length=4096)]
    gold: Text | None = None
    """Of a held-out prompt: the right number, written like `answers`."""
    seconds: float = 0.0
    """From lease to result."""


class Failure(Message, frozen=True):
    session: Text
    split: Split
    group_id: Count
    why: Why
    number: Count = 0
    """Among the failures of its session, from 1: one that is sent again is no other try. 0: without a number."""


class Unreadable(Message, frozen=True):
    """The announced snapshot's bytes are not what was announced; the sampler goes on with the weights it has."""

    session: Text
    snapshot: SnapshotId
    why: Why


class Bye(Message, frozen=True):
    session: Text


class Welcome(Message, frozen=True):
    incarnation: Count


class Rejection(Message, frozen=True):
    why: Why


class Pulse(Message, frozen=True):
    snapshot: SnapshotId
    manifest_sha256: Text


class Lease(Message, frozen=True):
    """Groups to sample: (group id, row of the split)."""

    split: Split
    items: Annotated[list[tuple[Count, Count]], Meta(min_length=1, max_length=MAX_LEASES)]


class Ack(Message, frozen=True):
    split: Split
    group_id: Count
    status: Status
    why: Why = ""


class Who(Message, frozen=True):
    pass


class Stop(Message, frozen=True):
    final: bool
    """True: the run is complete, exit 0. False: the trainer restarts, wait for it."""


def without_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are all equal, so that no completion is better than another."""
    return all(reward == rewards[0] for reward in rewards)


Up = Hello | Beat | Group | Failure | Unreadable | Bye
Down = Welcome | Rejection | Pulse | Lease | Ack | Who | Stop
