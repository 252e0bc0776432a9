"""Free block ids as runs of neighbours, so that a request gets few and growth stays beside it."""

from __future__ import annotations


class FreeRuns:
    """Maximal runs of free ids `[0, num_ids)`. Every operation costs O(1) a run it touches.

    A run is known by its last id, because most changes take from its front: `_lengths[last]`,
    and `_lasts[first]` finds the last id from the first. `_classes[k]` holds the runs whose
    length has k bits, and bit k of `_filled` says whether there are any (two-level segregated
    fit, Masmano et al. 2004, with one level).
    """

    def __init__(self, num_ids: int) -> None:
        self.count = 0
        self._lengths: dict[int, int] = {}
        self._lasts: dict[int, int] = {}
        self._classes: list[dict[int, None]] = [{} for _ in range(num_ids.bit_length() + 1)]
        self._filled = 0
        if num_ids:
            self.put(0, num_ids)

    def put(self, first: int, length: int) -> None:
        """Give back `length` ids from `first`, joined with the free runs on both sides."""
        self.count += length
        last = first + length - 1
        left = self._lengths.get(first - 1)
        if left is not None:
            self._remove(first - left, first - 1)
            first -= left
        right_last = self._lasts.get(last + 1)
        if right_last is not None:
            self._remove(last + 1, right_last)
            last = right_last
        self._insert(first, last)

    def take(self, count: int) -> list[tuple[int, int]]:
        """Take `count` ids (no more than there are) as (first, length) runs, few where possible.

        A run that holds all of them is preferred, from the smallest class that surely does;
        else the largest runs are used up one after the other.
        """
        taken = []
        while count:
            sure = self._filled >> ((count - 1).bit_length() + 1)
            if sure:
                size_class = (count - 1).bit_length() + (sure & -sure).bit_length()
            else:
                size_class = self._filled.bit_length() - 1
            last = next(reversed(self._classes[size_class]))
            length = min(count, self._lengths[last])
            taken.append((self._take_front(last, length), length))
            count -= length
        return taken

    def take_after(self, block: int) -> int:
        """Take one id: `block`'s right neighbour if free, else one with room to its right.

        That one stands in the middle of a large run, so that a sequence which had to move goes
        on growing there, and whoever grows at the run's front does too. There must be a free id.
        """
        last = self._lasts.get(block + 1)
        if last is None:
            last = next(reversed(self._classes[self._filled.bit_length() - 1]))
            half = self._lengths[last] // 2
            if half:
                first = last - self._lengths[last] + 1
                self._take_front(last, half)
                self.count += half
                self._insert(first, first + half - 1)
        return self._take_front(last, 1)

    def runs(self) -> list[tuple[int, int]]:
        """All free runs as (first, length), ascending."""
        return sorted((first, last - first + 1) for first, last in self._lasts.items())

    def _take_front(self, last: int, count: int) -> int:
        """Cut `count` ids off a run's front; returns the first of them."""
        length = self._lengths[last]
        first = last - length + 1
        left = length - count
        self.count -= count
        if left and left.bit_length() == length.bit_length():
            del self._lasts[first]
            self._lasts[first + count] = last
            self._lengths[last] = left
        else:
            self._remove(first, last)
            if left:
                self._insert(first + count, last)
        return first

    def _insert(self, first: int, last: int) -> None:
        length = last - first + 1
        self._lengths[last] = length
        self._lasts[first] = last
        size_class = length.bit_length()
        self._classes[size_class][last] = None
        self._filled |= 1 << size_class

    def _remove(self, first: int, last: int) -> None:
        del self._lasts[first]
        size_class = self._lengths.pop(last).bit_length()
        runs = self._classes[size_class]
        del runs[last]
        if not runs:
            self._filled &= ~(1 << size_class)
