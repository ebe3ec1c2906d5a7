"""A Dask cluster of worker processes on this machine, which never ends up without workers.

Dask's own gives a worker up when none of its name is there some seconds after one died. That look may fall into the
moment in which it is starting again; then its nanny is closed for good, and with the last one gone a flow would wait
for ever. Here, a worker that stays away has its nanny replaced, and when that is no use, the flow is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

import distributed
from distributed.core import Status

logger = logging.getLogger(__name__)

#: Seconds between looks at the workers.
TICK = 1.0
#: Seconds that a worker may be away, for it is starting.
START_WITHIN = 120.0
#: Seconds that the end waits for workers that are starting, before it ends those too.
LEAVE_WITHIN = 10.0
#: Nannies in a row that were replaced before any worker came up, after which more of them are no use.
STILLBORN = 5

#: Dask's own reaction to a worker that is away is put off: ours is better.
LOCAL_SETTINGS = {"distributed.deploy.lost-worker-timeout": "10000 hours"}


def pause(scheduler: Any, names: Collection[str]) -> None:
    """Have a scheduler give nothing to workers of some names; a new process of such a worker needs it again."""
    for worker in list(scheduler.workers.values()):
        if str(worker.name) in names and worker.status == Status.running:
            scheduler.handle_worker_status_change(Status.paused, worker, f"aside-{worker.name}")


async def restart(scheduler: Any, worker: str) -> None:
    """Have the nanny of a worker start its process anew; it may be gone meanwhile."""
    addresses = [address for address, state in scheduler.workers.items() if str(state.name) == worker]
    await scheduler.restart_workers(
        addresses, timeout=20, wait_for_workers=False, on_error="return", stimulus_id=f"restart-{worker}"
    )


class Tending:
    """Something done every second, and ended between two times: Dask loses the processes whose start was cut off."""

    def __init__(self, look: Callable[[], Awaitable[None]], *, after: float = 0.0) -> None:
        """Begin, after some seconds. What `look` raises, it has to handle itself."""
        self._leaving = asyncio.Event()
        self._task = asyncio.create_task(self._repeat(look, after))

    async def _repeat(self, look: Callable[[], Awaitable[None]], after: float) -> None:
        while not await self._is_leaving(after):
            await look()
            after = TICK

    async def _is_leaving(self, within: float) -> bool:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), within)
        return self._leaving.is_set()

    async def end(self, within: float | None = None) -> bool:
        """Let it finish what it does, and do no more. Return whether it has, after some seconds at most."""
        self._leaving.set()
        done, _ = await asyncio.wait({self._task}, timeout=within)
        return bool(done)


class LocalCluster(distributed.LocalCluster):
    """Workers of this machine, each with a nanny in this process."""

    scheduler: Any

    def __init__(self, **options: Any) -> None:
        #: Names of workers that get nothing to do.
        self.aside: set[str] = set()
        self._away: dict[Any, float] = {}
        self._stillborn = 0
        self._tending: Tending | None = None
        self._news: deque[str] = deque(maxlen=100)
        #: Why more workers are no use; the flow ends with it.
        self.trouble = ""
        super().__init__(**options)

    async def _start(self) -> None:
        await super()._start()
        self._tending = Tending(self._tend, after=TICK)

    async def _close(self) -> None:
        if self._tending is not None and not await self._tending.end(LEAVE_WITHIN):
            starting = [nanny for nanny in self._created if nanny.status == Status.init]
            await asyncio.gather(*(nanny.close() for nanny in starting))
            await self._tending.end()
        await super()._close()

    def news(self) -> list[str]:
        """Take what happened since the last call, in words."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def restart(self, worker: str) -> None:
        """Start a worker's process, and with it the engine, anew."""
        self.sync(restart, self.scheduler, worker)

    async def _tend(self) -> None:
        try:
            pause(self.scheduler, self.aside)
            await self._mend()
        except Exception as error:
            logger.exception("the workers could not be tended; trying again")
            self._tell(f"a worker can't be started: {type(error).__name__}: {error}")

    async def _mend(self) -> None:
        """Replace the nannies whose workers stay away."""
        if self._lock.locked():  # Dask is making nannies
            return
        now = time.monotonic()
        there = {state.name for state in self.scheduler.workers.values()}
        if there:
            self._stillborn = 0
        for name in self.worker_spec:
            if name in there:
                self._away.pop(name, None)
                continue
            away = now - self._away.setdefault(name, now)
            nanny = self.workers.get(name)
            if nanny is not None and away < START_WITHIN and nanny.status in (Status.init, Status.running):
                continue
            if self._stillborn == STILLBORN:
                self.trouble = (
                    f"worker processes can't be started on this machine: {STILLBORN} in a row did not come up; "
                    "`shoal doctor` and the log of this run say more"
                )
                return
            self._stillborn += 1
            self._tell(f"worker {name} does not come back; another takes its place")
            self._away.pop(name)
            self.workers.pop(name, None)
            if nanny is not None:
                await nanny.close()
        if set(self.worker_spec) - set(self.workers):
            await self._correct_state()

    def _tell(self, text: str) -> None:
        logger.info("%s", text)
        if not self._news or self._news[-1] != text:
            self._news.append(text)
