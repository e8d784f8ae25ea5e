"""One replica -> whether requests may go to it, followed all the time; a local worker is restarted.

A server is judged by its /health and by its progress: answers that came or, where none did, a
canary, a request for one token. It is up once it has answered its first canary, which may take
`FIRST_ANSWER_FACTOR` times as long as later ones; a request that failed at it brings another one
at once. A worker that ends, or hangs and is killed, is restarted after a pause that doubles.

An error in here ends neither the watch over the other replicas nor that over this one.
`Supervisor` keeps a watch over each of them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cast_serve.errors import VariantError
from cast_serve.gateway.upstream import probes
from cast_serve.gateway.upstream.client import Client
from cast_serve.gateway.upstream.probes import Canary, Limits
from cast_serve.gateway.upstream.replica import (
    LOCKED,
    UNKNOWN,
    Replica,
    kill_worker,
    log_tail,
    note_refusal,
    start_worker,
)

logger = logging.getLogger(__name__)

CANARY_INTERVAL_S = 5.0  # between the starts of two
LOADING_INTERVAL_S = 1.0  # between two looks at a replica that was never up, at most
LIMITS_INTERVAL_S = 30.0  # between two reads of a remote server's limits
EXIT_POLL_S = 0.2
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
STEADY_S = 300.0  # up for so long, a worker's next pause is the first one again
MAX_FAILED_STARTS = 5  # in a row, of a worker that was up before
STEP_FACTOR = 10  # an engine without progress for so many full steps hangs
FIRST_ANSWER_FACTOR = 10  # times the hang limit: the first answer compiles and loads what it needs


@dataclass(frozen=True)
class WatchSettings:
    """How closely to watch.

    Attributes:
        interval_s: between two looks at a replica.
        startup_timeout_s: for a local worker to answer after its start.
        hang_timeout_s: for a canary to be answered, or the engine's counters to move; at least.
    """

    interval_s: float
    startup_timeout_s: float
    hang_timeout_s: float

    def hang_limit_s(self, replica: Replica) -> float:
        """Longer than the replica's slowest step, or a busy engine is taken for one that hangs."""
        return max(self.hang_timeout_s, STEP_FACTOR * (replica.limits.step_s or 0.0))


class Supervisor:
    """The watches over all replicas, which may change meanwhile (roll.py).

    Args:
        client: for health checks, canaries and the workers' limits.
        settings: how closely to watch.
        on_change: called for each replica at first, and when its ``is_up`` or ``num_restarts``
            changed.
    """

    def __init__(
        self,
        client: Client,
        settings: WatchSettings,
        on_change: Callable[[Replica], None],
    ) -> None:
        self._client = client
        self._settings = settings
        self._on_change = on_change
        self._tasks: dict[Replica, asyncio.Task[None]] = {}
        self._failures: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()

    async def run(self, replicas: Iterable[Replica]) -> None:
        """Watches until cancelled.

        Raises:
            VariantError: if a local worker does not start, or does not come back.
        """
        try:
            for replica in replicas:
                self.begin(replica)
                self.adopt(replica)
            while True:
                failed = await self._failures.get()
                if not failed.cancelled():
                    failed.result()
        finally:
            for replica in list(self._tasks):
                await self.end(replica)

    def begin(self, replica: Replica) -> asyncio.Task[None]:
        """Watches one more, whose failure only its task raises until it is adopted."""
        watch = Watch(replica, self._client, self._settings, self._on_change)
        self._tasks[replica] = task = asyncio.create_task(watch.run())
        return task

    def adopt(self, replica: Replica) -> None:
        """From now on its failure ends `run`."""
        self._tasks[replica].add_done_callback(self._failures.put_nowait)

    async def end(self, replica: Replica) -> None:
        """Watches it no longer: a local worker that ends stays so."""
        task = self._tasks.pop(replica)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(eq=False)
class Watch:
    """Keeps ``is_up`` of one replica current, and a local worker running.

    Attributes:
        replica: if local, started.
        on_change: called at first, and when ``is_up`` or ``num_restarts`` changed.
    """

    replica: Replica
    client: Client
    settings: WatchSettings
    on_change: Callable[[Replica], None]
    _told: tuple[bool, int] | None = None

    async def run(self) -> None:
        """Watches until cancelled.

        Raises:
            VariantError: if a local worker ends or times out before it ever was up, or
                `MAX_FAILED_STARTS` times in a row after that.
        """
        replica = self.replica
        has_been_up = False
        num_failed_starts = 0
        backoff_s = FIRST_BACKOFF_S
        while True:
            replica.came_up_s = None
            try:
                if replica.is_local and replica.process is None:
                    start_worker(replica)
                    replica.num_restarts += 1
                failure = await self._until_failure()
            except OSError as error:  # no memory for a process, no room for its log
                failure = f"could not be started: {error}"
            replica.is_up = False
            self._tell()
            if not replica.is_local:
                logger.warning("%s: %s; down until it answers a completion", replica, failure)
                await self._retried(self._wait_for_progress)
                continue
            if replica.came_up_s is None:
                num_failed_starts += 1
            else:
                has_been_up = True
                num_failed_starts = 0
                if time.monotonic() - replica.came_up_s >= STEADY_S:
                    backoff_s = FIRST_BACKOFF_S
            if not has_been_up or num_failed_starts == MAX_FAILED_STARTS:
                times = f" ({num_failed_starts} starts in a row failed)" if has_been_up else ""
                lines = "\n".join(log_tail(replica, 30))
                raise VariantError(f"variant {replica} {failure}{times}; its log says:\n{lines}")
            lines = " | ".join(log_tail(replica, 3))
            logger.warning(
                "%s: %s; restart in %.3g s; its log: %s", replica, failure, backoff_s, lines
            )
            if replica.process is not None:
                await kill_worker(replica)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _tell(self) -> None:
        now = self.replica.is_up, self.replica.num_restarts
        if self._told != now:
            self._told = now
            self.on_change(self.replica)

    async def _until_failure(self) -> str:
        """Watches until the replica's process ended or must be ended; returns why, in words."""
        watchers = [self._follow_health, self._follow_progress]
        if self.replica.process is not None:
            watchers.append(self._wait_for_exit)
        tasks = [asyncio.create_task(self._retried(watcher)) for watcher in watchers]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _retried(self, watch: Callable[[], Coroutine[Any, Any, str]]) -> str:
        """Restarts a watch that failed itself: a bug of ours must not end a worker."""
        while True:
            try:
                return await watch()
            except Exception:
                logger.exception(
                    "%s: watching it failed; retry in %.3g s", self.replica, CANARY_INTERVAL_S
                )
            await asyncio.sleep(CANARY_INTERVAL_S)

    async def _wait_for_exit(self) -> str:
        process = self.replica.process
        assert process is not None
        while process.poll() is None:
            await asyncio.sleep(EXIT_POLL_S)
        return f"ended with {process.returncode}"

    async def _follow_health(self) -> str:
        """Marks the replica up and down by its /health and, where that is not enough, a canary."""
        replica = self.replica
        must_answer = True
        read_s = 0.0
        while True:
            self._tell()  # what `note_failure` changed
            must_answer = must_answer or replica.is_doubted.is_set()
            replica.is_doubted.clear()
            looked_s = time.monotonic()
            is_healthy = await probes.is_healthy(self.client, replica.url)
            if is_healthy and not replica.is_up:
                limits = await self._read_limits()
                is_healthy = limits is not None
                replica.limits = limits or Limits()
                read_s = looked_s
            if is_healthy and must_answer:
                canary = await self._first_canary()
                if canary in probes.NOT_FOR_US:
                    unknown = UNKNOWN.format(replica.variant)
                    note_refusal(replica, LOCKED if canary is Canary.LOCKED else unknown)
                    replica.is_doubted.clear()  # the next look will do
                elif canary is Canary.ANSWERED:
                    replica.refusal = ""
                # Busy, or it hangs, which `_follow_progress` finds out.
                is_busy = canary is Canary.SILENT and replica.is_up
                must_answer = not (canary is Canary.ANSWERED or is_busy)
                is_healthy = not must_answer
            now_s = time.monotonic()
            if replica.is_up and not is_healthy:
                logger.warning("%s: does not answer", replica)
                replica.is_up = False
            elif is_healthy and not replica.is_up and replica.failed_s < looked_s:
                replica.is_up = True
                if replica.came_up_s is None:
                    replica.came_up_s = now_s
                    logger.info("%s: ready after %.0f s", replica, now_s - replica.started_s)
                else:
                    logger.info("%s: answers again", replica)
            elif replica.model is None and replica.is_up and now_s - read_s > LIMITS_INTERVAL_S:
                read_s = now_s  # another server may stand behind the URL by now
                replica.limits = await self._read_limits() or replica.limits
            elif (
                replica.process is not None
                and replica.came_up_s is None
                and now_s - replica.started_s > self.settings.startup_timeout_s
            ):
                reason = f", {replica.refusal}" if replica.refusal else ""
                return (
                    f"did not answer within {self.settings.startup_timeout_s:.0f} s "
                    f"(CAST_STARTUP_TIMEOUT_S){reason}"
                )
            self._tell()
            wait_s = self.settings.interval_s
            if replica.came_up_s is None:
                wait_s = min(wait_s, LOADING_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await replica.is_doubted.wait()

    async def _read_limits(self) -> Limits | None:
        return await probes.read_limits(self.client, self.replica.url, self.replica.variant)

    async def _first_canary(self) -> Canary:
        """The canary that decides whether the replica is up."""
        replica = self.replica
        timeout_s = self.settings.hang_limit_s(replica)
        if replica.came_up_s is None:
            timeout_s *= FIRST_ANSWER_FACTOR
            if replica.process is not None:
                timeout_s = min(timeout_s, self.settings.startup_timeout_s)
        return await probes.send_canary(self.client, replica.url, replica.variant, timeout_s)

    async def _follow_progress(self) -> str:
        replica = self.replica
        num_received = replica.num_received
        wait_s = self.settings.interval_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s = self.settings.interval_s
            if replica.came_up_s is not None and replica.num_received == num_received:
                begun_s = time.monotonic()
                if not await self._makes_progress():
                    return self._hung()
                wait_s = max(wait_s, begun_s + CANARY_INTERVAL_S - time.monotonic())
            num_received = replica.num_received

    def _hung(self) -> str:
        limit_s, set_s = self.settings.hang_limit_s(self.replica), self.settings.hang_timeout_s
        step_s = self.replica.limits.step_s
        step = f", raised to {STEP_FACTOR} steps of {step_s:.3g} s" if limit_s > set_s else ""
        return f"made no progress for {limit_s:.3g} s (CAST_HANG_TIMEOUT_S is {set_s:.3g} s{step})"

    async def _wait_for_progress(self) -> str:
        while not await self._makes_progress():
            await asyncio.sleep(CANARY_INTERVAL_S)
        return "makes progress"

    async def _makes_progress(self) -> bool:
        replica = self.replica
        num_received = replica.num_received
        canary = await probes.look_for_progress(
            self.client, replica.url, replica.variant, self.settings.hang_limit_s(replica)
        )
        if canary in probes.NOT_FOR_US:  # not the engine's fault
            replica.is_doubted.set()
            return True
        return canary is Canary.ANSWERED or replica.num_received != num_received
