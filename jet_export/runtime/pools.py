"""Who holds which numbered slot or page, and which part of a block of memory. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class Pool:
    """Numbered slots or pages, reference-counted."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # descending: the lowest number is taken first
        self.holders = [0] * size
        self.given = 0  # references dropped so far

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - self.free

    def take(self, n: int) -> list[int]:
        assert n <= self.free
        items = self._free[: -n - 1 : -1]
        del self._free[len(self._free) - n :]
        for i in items:
            self.holders[i] = 1
        return items

    def share(self, items: Iterable[int]) -> None:
        """Add a reference to items that are in use already."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] += 1

    def give(self, items: Iterable[int]) -> None:
        """Drop a reference; an item without references is free."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] -= 1
            self.given += 1
            if not self.holders[i]:
                self._free.append(i)


class Arena:
    """Parts of a block of `size` bytes: the first gap that is long enough is taken."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.parts: dict[int, int] = {}  # first byte -> bytes of those in use
        self.gaps = [(0, size)] if size else []  # (first byte, bytes), in order, none beside another

    def take(self, n: int) -> int | None:
        """First byte of a part of n >= 1 bytes; None if no gap is that long."""
        for i, (first, length) in enumerate(self.gaps):
            if length >= n:
                self.gaps[i : i + 1] = [(first + n, length - n)] if length > n else []
                self.parts[first] = n
                self.used += n
                return first
        return None

    def give(self, first: int) -> None:
        n = self.parts.pop(first)
        self.used -= n
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self.gaps, (first, n)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self.gaps = merged
