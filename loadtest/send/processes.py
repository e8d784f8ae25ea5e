"""A batch -> shares for several client processes, each with its own event loop -> one result.

For loads that are too much for one event loop. All shares run on one timetable:
time.perf_counter is CLOCK_MONOTONIC on Linux, the same for every process of a machine.
"""

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from loadtest.errors import UsageError
from loadtest.record import Request
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent

_LEAD_S = 0.05  # from the order to start to the start, for the order to arrive everywhere


class Processes:
    """Sends as a Client does, from processes that run while its `async with` lasts."""

    def __init__(
        self, num_processes: int, url: str, *, timeout_s: float, api_key: str | None = None
    ) -> None:
        if num_processes < 1:
            raise UsageError(f"--processes {num_processes} is too small; give at least 1")
        self.num_processes = num_processes
        self._arguments = {"url": url, "timeout_s": timeout_s, "api_key": api_key}
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    async def __aenter__(self) -> Self:
        context = multiprocessing.get_context("spawn")  # nothing is shared but the pipe
        for _ in range(self.num_processes):
            pipe, far_end = context.Pipe()
            process = context.Process(target=_work, args=(far_end, self._arguments), daemon=True)
            process.start()
            far_end.close()  # else the pipe stays open when the process has died
            self._pipes.append(pipe)
            self._processes.append(process)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    async def send(self, batch: Batch, on_response: Callable[[], None] = lambda: None) -> Sent:
        """Sends a batch; `on_response` is called for all conversations at its end.

        Raises:
            ChildProcessError: if a client process has died.
        """
        try:
            for pipe, share in zip(self._pipes, batch.shares(self.num_processes), strict=True):
                pipe.send(share)
            await self._answers()  # all are ready
            started_s = time.perf_counter() + _LEAD_S
            for pipe in self._pipes:
                pipe.send(started_s)
            sent: list[Sent] = await self._answers()
        except (EOFError, OSError) as error:
            raise ChildProcessError("a client process died; see its message above") from error
        by_index: dict[int, list[Request]] = {}
        for request in (request for share in sent for request in share.requests):
            by_index.setdefault(request.prompt_index, []).append(request)
        requests = tuple(r for one in batch.conversations for r in by_index[one.index])
        for _ in batch.conversations:
            on_response()
        return Sent(started_s, requests, tuple(share.cpu_s[0] for share in sent))

    async def _answers(self) -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(pipe.recv) for pipe in self._pipes))


def _work(pipe: Connection, arguments: dict[str, Any]) -> None:
    """A client process: receives batches and returns what became of them, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    asyncio.run(_serve(pipe, arguments))


async def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    def start() -> float:
        pipe.send("ready")
        started_s: float = pipe.recv()
        return started_s

    async with Client(**arguments) as client:
        while True:
            try:
                batch: Batch = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            pipe.send(await client.send(batch, start=start))
