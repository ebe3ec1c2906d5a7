"""A bounded hand-over between two threads of one pipeline."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    """First in, first out, bounded by weight; things are put in groups, and the receiver takes all there is at once.

    Groups keep thread switches rare: they come per dozens of reads, not per read. A group heavier than the bound passes
    alone. `fail` makes both ends raise, so that no thread waits for a dead one.
    """

    def __init__(self, bound: int) -> None:
        #: Largest weight held, samples.
        self.bound = bound
        self._held: list[T] = []
        self._weight = 0
        self._closed = False
        #: What `fail` was told first.
        self.error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, things: Sequence[T], weight: int) -> None:
        """Hand things over that weigh so much together; blocks while there is no room."""
        with self._changed:
            while self._weight and self._weight + weight > self.bound and not self.error:
                self._changed.wait()
            if self.error:
                raise self.error
            self._held.extend(things)
            self._weight += weight
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
            self._held = []
            self._changed.notify_all()

    def take(self) -> list[T]:
        """Take all that is there, at least one; an empty list once closed and empty."""
        with self._changed:
            while not self._held and not self._closed and not self.error:
                self._changed.wait()
            if self.error:
                raise self.error
            things, self._held = self._held, []
            self._weight = 0
            self._changed.notify_all()
            return things
