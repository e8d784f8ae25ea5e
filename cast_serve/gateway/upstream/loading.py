"""Local workers that have not answered yet -> what each is doing, told on stderr until all have."""

import asyncio
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from cast_serve.gateway.upstream.replica import Replica, Variant

logger = logging.getLogger(__name__)

LIVE_INTERVAL_S = 1.0
PLAIN_INTERVAL_S = 15.0
# What vLLM, and then `cast-serve worker`, print when a stage begins; the latest comes first. The
# worker prints warnings too, but JSON, which describes its model, only once that is loaded.
STAGES = (
    (re.compile(r"cast-serve worker .*?: \{"), "answering its first requests"),
    (re.compile("Dynamo bytecode transform"), "compiling"),
    (re.compile("Warming up model for the compilation"), "compiling"),
)


async def show(variants: Sequence[Variant], console: Console) -> None:
    """Shows what the workers are doing until each has answered once; returns at once without any.

    Args:
        variants: started, or about to be.
        console: a terminal gets one line that changes, anything else a log line now and then.
    """
    local = [replica for v in variants for replica in v.replicas if replica.is_local]

    def is_over() -> bool:
        return all(replica.came_up_s is not None for replica in local)

    if not console.is_terminal:
        while not is_over():
            await asyncio.sleep(PLAIN_INTERVAL_S)
            if not is_over():
                logger.info("%s", _describe(local))
    elif not is_over():
        with console.status("starting", refresh_per_second=4) as status, _logs_above_status():
            while not is_over():
                status.update(_describe(local))
                await asyncio.sleep(LIVE_INTERVAL_S)


def _describe(replicas: Sequence[Replica]) -> str:
    return "; ".join(f"{replica.variant}: {_state(replica)}" for replica in replicas)


def _state(replica: Replica) -> str:
    if replica.loading_s is None:
        return "starting" if replica.came_up_s is None else "ready"
    return f"{_stage(replica)}, {replica.loading_s:.0f} s so far"


def _stage(replica: Replica) -> str:
    text = _printed(replica)
    return next((stage for pattern, stage in STAGES if pattern.search(text)), "loading")


def _printed(replica: Replica) -> str:
    """What the worker has printed since its start."""
    if replica.log is None:
        return ""
    try:
        with open(replica.log, "rb") as log:
            log.seek(replica.log_start)
            return log.read().decode(errors="replace")
    except OSError:  # to tell of it is not worth an end
        return ""


@contextmanager
def _logs_above_status() -> Iterator[None]:
    """Sends the log through rich's stderr, which writes above the line that changes."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)
