"""What a probe measured, beside the completions themselves: the file between `python -m sampler --probe` and whoever
reads it. Imports nothing heavy."""

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from protocol.disk import write_atomic
from protocol.errors import UserError


class Calls(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one reward function. `values` and `not_applicable` count completions, the others calls, one a group."""

    values: int
    not_applicable: int
    errors: int
    timeouts: int
    seconds: list[float]
    """Of each call that ended."""


class Probed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1] = 1
    model: str
    device: str
    data: str
    rows: int
    context: int | None
    """Tokens that the model was made for; None where its configuration does not say."""
    prompt: str
    """The first one as the model sees it, special tokens included."""
    prompt_lengths: tuple[int, int, int]
    """Tokens of the data set's prompts: median, 95th percentile, longest."""
    ends: dict[int, str]
    """Tokens that end a completion."""
    closing: str | None
    """The token with which the chat template closes a turn, where it is not among `ends`."""
    begun: int
    """Prompts given to the engine."""
    answered: int
    """Prompts with a reward."""
    failed: dict[int, str]
    """By row, why it has none."""
    seconds: float
    """From the first prompt on; loading the engine does not count."""
    tokens_per_s: float
    """Sampled, while the engine was kept full."""
    rewards: dict[str, Calls]
    stopped: bool
    """By a signal, before the time was over."""

    def write(self, path: Path) -> None:
        """As JSON, atomically. Raises StorageError."""
        write_atomic(path, msgspec.json.encode(self))


def read(path: Path) -> Probed:
    """Raises UserError for a file that is not there, or is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Probed)
    except OSError as error:
        raise UserError(f"cannot read the probe {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no probe, or damaged: {error}; probe again") from None
