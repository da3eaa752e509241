"""Unsigned integers of a given number of bits as bytes, little end first, and reading such bytes back with care."""

import numpy as np
from numpy.typing import NDArray


class CodingError(ValueError):
    """Data is no lossless coding of planes, is damaged, or belongs to another tensor; or a coding does not exist."""


def n_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` fields."""
    return (count * bits + 7) // 8


def pack(values: NDArray[np.integer], bits: int) -> bytes:
    """``values`` [n], each below 2^bits, as consecutive fields of ``bits`` bits (0 to 64), filled up to a byte with zeros."""
    if bits == 0:
        return b""
    own_bytes = np.ascontiguousarray(values, dtype="<u8").view(np.uint8).reshape(-1, 8)
    return np.packbits(np.unpackbits(own_bytes, axis=1, count=bits, bitorder="little"), bitorder="little").tobytes()


class Reader:
    """Takes fields off the front of ``data``.

    Every method raises CodingError where the data ends too early.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        found = self._data[self._place : self._place + count]
        if len(found) < count:
            raise CodingError(
                f"{count} bytes are expected at byte {self._place} of {len(self._data)}: the data is cut off"
            )
        self._place += count
        return found

    def integer(self, count: int) -> int:
        """The next ``count`` bytes as one integer."""
        return int.from_bytes(self.take(count), "little")

    def fields(self, count: int, bits: int) -> NDArray[np.int64]:
        """The next ``count`` integers of ``bits`` bits, as ``pack`` writes them."""
        if bits == 0 or count == 0:
            return np.zeros(count, np.int64)
        packed = np.frombuffer(self.take(n_bytes(count, bits)), np.uint8)
        single = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        filled = np.zeros((count, 8), np.uint8)
        filled[:, : n_bytes(1, bits)] = np.packbits(single, axis=1, bitorder="little")
        return filled.view("<i8").reshape(-1)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self._place)

    def end(self) -> None:
        """Raises CodingError where anything is left."""
        left = len(self._data) - self._place
        if left:
            raise CodingError(f"{left} bytes too many, at byte {self._place}")
