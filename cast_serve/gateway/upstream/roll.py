"""A variant and a model directory -> the variant served from there, without a lost request.

    a second worker starts -> it answers a canary -> it takes the first one's place
    -> the first one finishes its requests -> and is ended

Until it answers, the first one serves, and goes on if the second fails. Both share the variant's
cores while both run, and both models are in memory.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.errors import RollError, UsageError, VariantError
from cast_serve.gateway.upstream.replica import Replica, Variant, start_worker, stop_workers
from cast_serve.gateway.upstream.supervisor import Supervisor
from cast_serve.gateway.upstream.variants import log_name, successor

logger = logging.getLogger(__name__)

POLL_S = 0.05
Say = Callable[[str], None]


@dataclass(eq=False)
class Roller:
    """Rolls variants, one at a time.

    Attributes:
        drain_limit_s: for the old worker's requests; longer than any may take.
        on_switch: called when a new replica has taken the old one's place.
        on_end: called with a variant's name and ``done`` or ``failed``.
    """

    variants: Mapping[str, Variant]
    supervisor: Supervisor
    drain_limit_s: float
    on_switch: Callable[[Replica], None]
    on_end: Callable[[str, str], None]
    _rolling: str | None = None
    _draining: asyncio.Task[None] | None = None
    _num_workers: Counter[str] = field(default_factory=Counter)  # started by rolls, by variant

    async def roll(self, name: str, model: Path | None, say: Say) -> dict[str, Any]:
        """Rolls one variant. If it is cancelled before the new worker serves, that one is ended.

        Args:
            name: of the variant.
            model: a directory, or a model's name on a hub; None: reload what is served now.
            say: receives progress messages.

        Returns:
            what was done, with seconds.

        Raises:
            UsageError: if there is no such variant or model, the variant's servers run elsewhere,
                or another is being rolled.
            RollError: if the new worker did not come up.
        """
        old = self._rollable(name)
        self._rolling = name
        try:
            begun_s = time.monotonic()
            new = await self._started(old, model, say)
            ready_s = time.monotonic() - begun_s
            self._take_over(old, new)
        except BaseException:
            self._rolling = None
            self.on_end(name, "failed")
            raise
        num_running = old.num_outstanding
        say(f"it serves {name} now; the old worker is finishing {num_running} requests")
        # A task, since it must not end with the client that asked for the roll.
        self._draining = asyncio.create_task(self._drain(old))
        await asyncio.shield(self._draining)
        return {
            "variant": name,
            "model": str(new.model),
            "before": str(old.model),
            "ready_s": round(ready_s, 3),
            "drained_requests": num_running,
            "drain_s": round(time.monotonic() - begun_s - ready_s, 3),
        }

    async def close(self) -> None:
        """Ends an old worker that still drains, at once."""
        if self._draining is not None:
            self._draining.cancel()
            with suppress(asyncio.CancelledError):
                await self._draining

    def _rollable(self, name: str) -> Replica:
        variant = self.variants.get(name)
        if variant is None:
            raise UsageError(
                f"variant {name!r} does not exist; the variants are {list(self.variants)}"
            )
        if any(replica.model is None for replica in variant.replicas):
            raise UsageError(
                f"the servers of variant {name!r} were not started here, or by a command of "
                "their own, and cannot be replaced from here; roll them where they run"
            )
        if self._rolling is not None:
            raise UsageError(
                f"variant {self._rolling!r} is already being rolled; wait until that has finished"
            )
        (replica,) = variant.replicas
        return replica

    async def _started(self, old: Replica, model: Path | None, say: Say) -> Replica:
        """A second worker that is up, in no variant's list yet."""
        self._num_workers[old.variant] += 1
        log = log_name(old.variant, 1 + self._num_workers[old.variant])
        new = await asyncio.to_thread(successor, old, model, log)  # may have to fetch the model
        say(f"{old.variant}: loading {new.model}, log {new.log}; the old worker serves meanwhile")
        try:
            start_worker(new)  # in this thread, with which it ends
            watch = self.supervisor.begin(new)
            while not new.is_up and not watch.done():
                await asyncio.wait([watch], timeout=POLL_S)
            if watch.done():
                watch.result()
        except BaseException as error:
            await self._end(new)
            if not isinstance(error, VariantError | OSError):
                raise
            raise RollError(f"{error}\n{old.model} is still being served") from None
        return new

    def _take_over(self, old: Replica, new: Replica) -> None:
        """In one step of the event loop, so that a request is sent to one of the two."""
        replicas = self.variants[old.variant].replicas
        replicas[replicas.index(old)] = new
        self.supervisor.adopt(new)
        self.on_switch(new)
        logger.info("%s: took over from %s, which finishes its requests", new, old.url)

    async def _drain(self, old: Replica) -> None:
        name = old.variant
        try:
            await self.supervisor.end(old)  # or it would be started again when it ends
            deadline_s = time.monotonic() + self.drain_limit_s
            while old.num_outstanding and time.monotonic() < deadline_s:
                await asyncio.sleep(POLL_S)
            if old.num_outstanding:
                logger.warning("%s: %d requests did not finish in time", old, old.num_outstanding)
        finally:
            self._rolling = None
            await _undisturbed(asyncio.to_thread(stop_workers, [old]))
            logger.info("%s: ended", old)
            self.on_end(name, "done")

    async def _end(self, new: Replica) -> None:
        with suppress(KeyError):  # it could not be started
            await self.supervisor.end(new)
        await _undisturbed(asyncio.to_thread(stop_workers, [new]))


async def _undisturbed(work: Awaitable[None]) -> None:
    """Awaits to the end, even if cancelled meanwhile: no process may be left behind."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
