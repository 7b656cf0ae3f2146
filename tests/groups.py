"""Makes groups as a sampler would send them."""

import numpy as np

from protocol.codec import pack, token_array
from protocol.messages import Completion, Group, Span


def make_group(
    group_id: int,
    *,
    rewards: list[float] = (0.0, 1.0),
    lengths: list[int] | None = None,
    row: int | None = None,
    snapshot: str = "s00000000.i0001",
    vocabulary: int = 320,
    reference: bool = False,
    seed: int = 0,
    session: str = "one",
    split: str = "train",
) -> Group:
    random = np.random.default_rng([seed, group_id])
    lengths = lengths or [int(random.integers(1, 20)) for _ in rewards]
    prompt = random.integers(0, vocabulary, 5)
    return Group(
        session=session,
        split=split,
        group_id=group_id,
        row=group_id if row is None else row,
        prompt=pack(token_array(prompt.tolist(), vocabulary)),
        completions=[
            Completion(
                tokens=pack(token_array(random.integers(0, vocabulary, length).tolist(), vocabulary)),
                logprobs=pack(-random.random(length).astype(np.float32) - 4),
                ref_logprobs=pack(-random.random(length).astype(np.float32) - 4) if reference else None,
                finish="stop",
                spans=[Span(snapshot, 0, length)],
                reward=reward,
                rewards={"gsm8k": reward},
            )
            for length, reward in zip(lengths, rewards, strict=True)
        ],
    )
