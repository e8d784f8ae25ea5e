"""One replica -> whether requests may go to it, kept true to life; a local worker is restarted.

A server is judged by its /health and by its progress: answers that came or, where none did, a
canary. A worker that ends, or hangs and is killed, starts anew after a pause that doubles.
"""

import asyncio
import logging
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httpx

from cast_serve import probes
from cast_serve.replicas import Replica, kill_worker, log_tail, start_worker

logger = logging.getLogger(__name__)

CANARY_INTERVAL_S = 5.0  # between the starts of two
EXIT_POLL_S = 0.2
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
STEADY_S = 300.0  # up for so long, a worker is forgiven its earlier ends
MAX_FAILED_STARTS = 5  # in a row, of a worker that was up before


class VariantError(RuntimeError):
    """A variant did not start, or did not come back."""


@dataclass(frozen=True)
class WatchSettings:
    """How closely to watch.

    Attributes:
        interval_s: between two looks at a replica.
        startup_timeout_s: for a local worker to answer after its start.
        hang_timeout_s: for a canary to be answered, or the engine's counters to move. Longer than
            the slowest step of an engine, or a busy one is taken for hung.
    """

    interval_s: float
    startup_timeout_s: float
    hang_timeout_s: float


async def watch_replica(
    replica: Replica,
    client: httpx.AsyncClient,
    settings: WatchSettings,
    on_change: Callable[[Replica], None],
) -> None:
    """Keeps ``is_up`` true to life, and a local worker running, until cancelled.

    Args:
        replica: if local, started.
        client: for health checks, canaries and the worker's limits.
        settings: see there.
        on_change: called at first, and when ``is_up`` or ``num_restarts`` changed.

    Raises:
        VariantError: if a local worker ends or times out before it ever was up, or
            `MAX_FAILED_STARTS` times in a row after that.
    """
    told: tuple[bool, int] | None = None

    def tell() -> None:
        nonlocal told
        if told != (replica.is_up, replica.num_restarts):
            told = replica.is_up, replica.num_restarts
            on_change(replica)

    has_been_up = False
    num_failed_starts = 0
    backoff_s = FIRST_BACKOFF_S
    while True:
        replica.came_up_s = None
        fate = await _fate(replica, client, settings, tell)
        replica.is_up = False
        tell()
        if replica.process is None:
            logger.warning("%s: %s; down until it answers a completion", replica, fate)
            while not await _makes_progress(replica, client, settings):
                await asyncio.sleep(CANARY_INTERVAL_S)
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
            raise VariantError(f"variant {replica} {fate}{times}; its log says:\n{lines}")
        lines = " | ".join(log_tail(replica, 3))
        logger.warning("%s: %s; restart in %.3g s; its log: %s", replica, fate, backoff_s, lines)
        await kill_worker(replica)
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        start_worker(replica)
        replica.num_restarts += 1
        tell()


async def _fate(
    replica: Replica, client: httpx.AsyncClient, settings: WatchSettings, tell: Callable[[], None]
) -> str:
    """Watches until the replica's process ended or must be ended; returns why, in words."""
    watchers: list[Coroutine[Any, Any, str]] = [
        _until_overdue(replica, client, settings, tell),
        _until_hung(replica, client, settings),
    ]
    if replica.process is not None:
        watchers.append(_until_ended(replica.process))
    tasks = [asyncio.create_task(watcher) for watcher in watchers]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_ended(process: subprocess.Popen[bytes]) -> str:
    while process.poll() is None:
        await asyncio.sleep(EXIT_POLL_S)
    return f"ended with {process.returncode}"


async def _until_overdue(
    replica: Replica, client: httpx.AsyncClient, settings: WatchSettings, tell: Callable[[], None]
) -> str:
    """Marks the replica up and down by its /health."""
    while True:
        tell()  # what `note_failure` changed
        looked_s = time.monotonic()
        is_healthy = await probes.is_healthy(client, replica.url)
        if is_healthy and not replica.is_up:
            limits = await probes.read_limits(client, replica.url, replica.variant)
            is_healthy = limits is not None
            replica.max_model_len, replica.vocabulary_size = limits or (None, None)
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
        elif (
            replica.process is not None
            and replica.came_up_s is None
            and now_s - replica.started_s > settings.startup_timeout_s
        ):
            return f"did not answer within {settings.startup_timeout_s:.0f} s"
        tell()
        await asyncio.sleep(settings.interval_s)


async def _until_hung(replica: Replica, client: httpx.AsyncClient, settings: WatchSettings) -> str:
    num_received = replica.num_received
    wait_s = settings.interval_s
    while True:
        await asyncio.sleep(wait_s)
        wait_s = settings.interval_s
        if replica.came_up_s is not None and replica.num_received == num_received:
            begun_s = time.monotonic()
            if not await _makes_progress(replica, client, settings):
                return f"made no progress for {settings.hang_timeout_s:.3g} s"
            wait_s = max(wait_s, begun_s + CANARY_INTERVAL_S - time.monotonic())
        num_received = replica.num_received


async def _makes_progress(
    replica: Replica, client: httpx.AsyncClient, settings: WatchSettings
) -> bool:
    num_received = replica.num_received
    is_moving = await probes.makes_progress(
        client, replica.url, replica.variant, settings.hang_timeout_s
    )
    return is_moving or replica.num_received != num_received
