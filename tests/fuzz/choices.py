"""Bytes read as choices, so that a fuzzer of bytes reaches deep states: every input means a sequence of valid moves."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reads from the front; an input that is used up goes on with zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def below(self, limit: int) -> int:
        """0 <= result < limit, from one byte, or from two where one cannot reach that far."""
        return int.from_bytes(self.bytes(1 if limit <= 256 else 2), "little") % limit

    def seldom(self) -> bool:
        """About one time in eight; never when the input is used up."""
        return self.below(256) >= 224

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def bytes(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")

    def rest(self) -> bytes:
        return self.bytes(self.left)

    def damage(self, data: bytes) -> bytes:
        """Up to three bytes changed, cut away or put in."""
        result = bytearray(data)
        for _ in range(1 + self.below(3)):
            place = self.below(1 << 16) % (len(result) + 1)
            kind = self.below(4)
            if kind == 0:
                del result[place : place + 1 + self.below(8)]
            elif kind == 1:
                result[place:place] = self.bytes(self.below(9))
            else:
                result[place : place + 1] = self.bytes(1)
        return bytes(result)
