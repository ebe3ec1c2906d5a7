"""A bounded hand-over between two threads of one pipeline."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    """First in, first out, bounded by weight; the receiver takes all there is at once.

    Taking all at once keeps thread switches rare: under load they come per dozens of reads, not per read. Something
    heavier than the bound passes alone. `fail` makes both ends raise, so that no thread waits for a dead one.
    """

    def __init__(self, bound: int) -> None:
        #: Largest weight held, samples.
        self.bound = bound
        self._held: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._closed = False
        #: What `fail` was told first.
        self.error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, thing: T, weight: int) -> None:
        """Hand something over; blocks while there is no room."""
        with self._changed:
            while self._weight and self._weight + weight > self.bound and not self.error:
                self._changed.wait()
            if self.error:
                raise self.error
            self._held.append((thing, weight))
            self._weight += weight
            if len(self._held) == 1:
                self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Make every later or waiting `put` and `take` raise `error`. The first error wins."""
        with self._changed:
            self.error = self.error or error
            self._held.clear()
            self._changed.notify_all()

    def take(self) -> list[T]:
        """Take all that is there, at least one; an empty list once closed and empty."""
        with self._changed:
            while not self._held and not self._closed and not self.error:
                self._changed.wait()
            if self.error:
                raise self.error
            things = [thing for thing, _ in self._held]
            self._held.clear()
            self._weight = 0
            self._changed.notify_all()
            return things
