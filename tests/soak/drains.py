"""A number and a seed -> so many gateways ended by SIGTERM under 64 streams; none may break.

Each gateway stands before the same two fake workers. All requests have been sent when the signal
comes, at a moment that the seed draws. Every stream must be whole, and the exit status 0.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.soak import gateway as gateways
from tests.soak.clients import oracle
from tests.soak.clients.connection import ClosedError, Connection, get
from tests.soak.clients.oracle import WrongError
from tests.soak.clients.request import COMPLETIONS, VARIANTS, Ask, Asks
from tests.soak.gateway import ROOT, Gateway

NUM_STREAMS = 64
NUM_TOKENS = 16
WAIT_S = 60.0


async def run(
    number: int, seed: int, folder: Path, show: Callable[[float, str], None]
) -> dict[str, Any]:
    """All drains; the figures."""
    ports = gateways.free_ports(len(VARIANTS))
    command = [sys.executable, "-m", "tests.soak.fake"]
    log = open(folder / "workers.log", "wb")  # noqa: SIM115
    fakes = [
        subprocess.Popen([*command, name, str(port)], cwd=ROOT, stderr=log)
        for name, port in zip(VARIANTS, ports, strict=True)
    ]
    draw = random.Random(f"{seed} drains")
    asks = Asks(f"{seed} drains", "dd", is_real=False)
    broken: list[str] = []
    num_streams = num_failed_exits = 0
    try:
        for done in range(number):
            gateway = await start(folder, done, ports)
            try:
                wrong, status = await drain(gateway, asks, draw.choice((0.0, 0.05, 0.2, 0.4)))
            finally:
                gateway.popen.kill()  # nothing, once it has ended
                gateway.popen.wait()
            num_streams += NUM_STREAMS
            num_failed_exits += status != 0
            broken += [f"drain {done}: {what}" for what in wrong]
            show((done + 1) / number, f"{done + 1} drains, {len(broken)} broken answers")
    finally:
        for fake in fakes:
            fake.terminate()
            fake.wait()
        log.close()
    return {
        "seed": seed,
        "num_drains": number,
        "num_streams": num_streams,
        "num_broken": len(broken),
        "num_exits_other_than_0": num_failed_exits,
        "broken": broken[:20],
        "passed": not broken and not num_failed_exits,
    }


async def start(folder: Path, number: int, ports: list[int]) -> Gateway:
    """`cast-serve gateway` before the fake workers, ready."""
    (port,) = gateways.free_ports(1)
    command = [sys.executable, "-m", "cast_serve", "gateway", "--port", str(port)]
    for name, own in zip(VARIANTS, ports, strict=True):
        command += ["--variant", f"{name}=http://127.0.0.1:{own}"]
    place = folder / str(number)
    place.mkdir()
    with open(place / "gateway.log", "wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CAST_HEALTH_INTERVAL_S": "0.1"}
        popen = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
    gateway = Gateway(popen, port, place)
    if not await gateway.wait_until_ready(WAIT_S):
        popen.kill()
        popen.wait()
        raise RuntimeError(f"a gateway did not come up; {gateway.log} has the cause")
    return gateway


async def drain(gateway: Gateway, asks: Asks, after_s: float) -> tuple[list[str], int]:
    """Ends a gateway under streams: what was wrong with them, and its exit status."""
    asked = [asks.next(COMPLETIONS, num_tokens=NUM_TOKENS) for _ in range(NUM_STREAMS)]
    sent = asyncio.Semaphore(0)
    streams = [asyncio.create_task(_stream(gateway.port, ask, sent)) for ask in asked]
    for _ in asked:
        await sent.acquire()
    await get(gateway.port, "/livez")  # so the gateway has read what was sent before
    await asyncio.sleep(after_s)
    gateway.popen.send_signal(signal.SIGTERM)
    wrong = [found for found in await asyncio.gather(*streams) if found]
    return wrong, await asyncio.to_thread(gateway.popen.wait, WAIT_S)


async def _stream(port: int, ask: Ask, sent: asyncio.Semaphore) -> str:
    """What is wrong with one answer; empty: nothing."""
    connection = await Connection.open(port)
    try:
        async with asyncio.timeout(WAIT_S):
            headers = {"X-Request-Id": ask.key}
            await connection.send("POST", ask.route, headers, json.dumps(ask.body).encode())
            sent.release()
            status, found = await connection.head()
            content = b"".join([piece async for piece in connection.pieces()])
        seen = oracle.judge(ask, status, found, content)
        return "" if seen.code == 200 else f"{ask.key}: {seen.code}"
    except (ClosedError, TimeoutError, WrongError, OSError) as error:
        return f"{ask.key}: {error!r}"
    finally:
        connection.close()
