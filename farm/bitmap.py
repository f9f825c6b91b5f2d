"""A set of small numbers as bits: which of a job's shards are done, an eighth of a byte each."""

from typing import Self

import numpy as np
from numpy.typing import NDArray


class Bitmap:
    """`size` bits, all clear at first. `count` of them are set."""

    __slots__ = ("_bits", "count", "size")

    def __init__(self, size: int):
        self.size = size
        self.count = 0
        self._bits = bytearray(-(-size // 8))

    @classmethod
    def of(cls, flags: NDArray[np.bool_]) -> Self:
        """Make one from an array of truth values."""
        made = cls(len(flags))
        made._bits = bytearray(np.packbits(flags, bitorder="little").tobytes())
        made.count = int(flags.sum())
        return made

    def copy(self) -> Self:
        """Return another with the same bits."""
        made = type(self)(self.size)
        made._bits = bytearray(self._bits)
        made.count = self.count
        return made

    def __getitem__(self, place: int) -> bool:
        if not 0 <= place < self.size:
            raise IndexError(f"bit {place} of {self.size}")
        return bool(self._bits[place >> 3] >> (place & 7) & 1)

    def set(self, place: int) -> bool:
        """Set one bit; False where it was set already."""
        if self[place]:
            return False
        self._bits[place >> 3] |= 1 << (place & 7)
        self.count += 1
        return True

    @property
    def full(self) -> bool:
        """Whether every bit is set."""
        return self.count == self.size

    def next_clear(self, start: int) -> int:
        """Return the first clear bit from `start` on, or `size` where there is none."""
        place = start
        while place < self.size and place & 7:
            if not self[place]:
                return place
            place += 1
        if place >= self.size:
            return self.size
        ahead = np.frombuffer(self._bits, dtype=np.uint8, offset=place >> 3)
        step = 64
        for at in _chunks(len(ahead), step):
            clear = np.flatnonzero(ahead[at] != 0xFF)
            if len(clear):
                byte = at.start + int(clear[0])
                bits = int(ahead[byte])
                first = next(bit for bit in range(8) if not bits >> bit & 1)
                return min(int(place + byte * 8 + first), self.size)
        return self.size

    def beyond(self, other: "Bitmap") -> list[int]:
        """Return the places that are set here and not in another of the same size."""
        mine, theirs = (np.frombuffer(one._bits, dtype=np.uint8) for one in (self, other))
        return list(np.flatnonzero(np.unpackbits(mine & ~theirs, count=self.size, bitorder="little")).tolist())

    def flags(self) -> NDArray[np.bool_]:
        """Return the truth values as an array."""
        bits = np.frombuffer(self._bits, dtype=np.uint8)
        return np.unpackbits(bits, count=self.size, bitorder="little").astype(np.bool_)


def _chunks(length: int, first: int) -> list[slice]:
    """Slices of growing size, so that a near bit costs little and a far one not much more."""
    slices, at, size = [], 0, first
    while at < length:
        slices.append(slice(at, min(at + size, length)))
        at, size = at + size, size * 8
    return slices
