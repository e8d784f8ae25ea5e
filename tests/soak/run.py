"""What is asked for -> a gateway under clients and faults -> findings and figures."""

import asyncio
import json
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import gateway as gateways
from tests.soak.clients.client import Clients
from tests.soak.clients.connection import get, post
from tests.soak.clients.request import CHAT
from tests.soak.clients.tally import Tally, audit_log, audit_metrics, read_metrics
from tests.soak.faults import Faults, SmallDisk, clock_environment
from tests.soak.gateway import Gateway, Sample
from tests.soak.slope import slope

SETTINGS: dict[str, object] = {
    "max_running": 16,
    "max_queued": 32,
    "max_connections": 300,
    "max_body_bytes": 1 << 18,
    "body_timeout_s": 5,
    "request_timeout_s": 20,
    "health_interval_s": 0.2,
    "fallback": "sparse=dense",
}
FAKE_SETTINGS = {"hang_timeout_s": 2, "startup_timeout_s": 20, "shadow_fraction": 0.02}
REAL_SETTINGS = {"request_timeout_s": 40}
START_S, RECOVERY_S = {False: 60, True: 900}, {False: 45, True: 400}  # fake, real
REST_S = 4.0  # after the last request, for what ends by itself to end
ALLOWED = {"anonymous_bytes": 16 << 20, "num_descriptors": 20, "num_tasks": 20}
NUM_SPARE = 10  # descriptors or tasks more at rest than at the beginning: idle connections
SAMPLE_S = 1.0
LATE_S = 2.0  # a connection may be closed so long after the descriptors were low


@dataclass
class Soak:
    """A run.

    Attributes:
        asked: see `python -m tests.soak --help`.
        folder: for configuration and logs.
        show: is told the share that is done, and what was found.
    """

    asked: Namespace
    folder: Path
    show: Callable[[float, str], None]
    findings: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unanswered: list[tuple[float, str]] = field(default_factory=list)  # of _scrape's, from when on
    progress: float = 0.0
    metrics: str = ""
    num_lost: int = 0
    tally: Tally = field(default_factory=Tally)

    async def run(self) -> dict[str, Any]:
        """Everything, in order; the figures."""
        disk = SmallDisk(self.folder / "workers")
        settings = SETTINGS | (REAL_SETTINGS if self.is_real else FAKE_SETTINGS)
        environment = clock_environment(self.folder)
        gateway = gateways.start(self.folder, self.asked.real, settings, environment)
        try:
            faults = Faults(gateway, self.folder, self.is_real, disk)
            if not await gateway.wait_until_ready(START_S[self.is_real]):
                raise RuntimeError(f"the gateway did not come up; {gateway.log} has the cause")
            tally = await self._load(gateway, faults)
            exit_status = await asyncio.to_thread(gateway.stop)
        finally:
            if gateway.popen.poll() is None:
                gateway.stop()
            disk.unmount()
        if exit_status != 0:
            self.findings.append(f"the gateway ended with exit status {exit_status}")
        self.findings += audit_log(tally, gateway.log, self.metrics)
        samples = [vars(sample) for sample in self.samples]
        (self.folder / "samples.json").write_text(json.dumps(samples))
        return self._figures(tally, faults)

    @property
    def is_real(self) -> bool:
        return bool(self.asked.real)

    async def _load(self, gateway: Gateway, faults: Faults) -> Tally:
        before = await gateway.sample(0)
        chat_status = await _ask_chat(gateway) if self.is_real else 200
        clients = self._clients(gateway, chat_status == 200)
        tally = self.tally = clients.tally
        asking = asyncio.create_task(clients.run())
        beside = [
            asyncio.create_task(self._break(gateway, faults)),
            asyncio.create_task(self._scrape(gateway)),
            asyncio.create_task(self._sample(gateway)),
        ]
        begun_s = time.monotonic()
        while self.progress < 1 or not beside[0].done():
            if gateway.popen.poll() is not None:
                self.findings.append(f"the gateway ended by itself: {gateway.popen.returncode}")
                break
            share = (time.monotonic() - begun_s) / (60 * self.asked.minutes)
            if self.asked.requests:
                share = max(share, tally.num_requests / self.asked.requests)
            self.progress = min(share, 1.0)
            self.show(self.progress, self._told(faults))
            await asyncio.sleep(0.2)
        clients.is_over = True
        await asking
        tally.seen[CHAT, chat_status] += self.is_real
        for task in beside:
            task.cancel()
        for result in await asyncio.gather(*beside, return_exceptions=True):
            if isinstance(result, Exception):
                self.findings.append(f"the soak itself failed: {result!r}")
        await self._rest(gateway, before, tally)
        self._judge_lost(tally, faults)
        return tally

    def _told(self, faults: Faults) -> str:
        wrong = self.tally.num_wrong + len(self.findings)
        num_faults = faults.counts.total()
        return f"{self.tally.num_requests} requests, {num_faults} faults, {wrong} wrong"

    def _clients(self, gateway: Gateway, has_chat: bool) -> Clients:
        places = int(str(SETTINGS["max_running"])) + int(str(SETTINGS["max_queued"]))
        return Clients(
            gateway.port,
            f"{self.asked.seed} 0",
            self.asked.clients,
            num_flood=int(2.5 * places),
            num_crowd=0 if self.is_real else int(str(SETTINGS["max_connections"])),
            is_real=self.is_real,
            has_chat=has_chat,
        )

    async def _break(self, gateway: Gateway, faults: Faults) -> None:
        """Brings the faults about, spread over the run, each once the last has been got over."""
        planned = faults.plan(self.asked.seed, self.asked.faults)
        draw = random.Random(f"{self.asked.seed} details")
        for place, kind in enumerate(planned):
            while self.progress < (place + 0.5) / (len(planned) + 1):
                await asyncio.sleep(0.1)
            await faults.bring(kind, draw)
            if not await gateway.wait_until_ready(RECOVERY_S[self.is_real]):
                self.findings.append(f"{kind}: not ready {RECOVERY_S[self.is_real]} s later")

    async def _scrape(self, gateway: Gateway) -> None:
        """Reads what monitoring reads; every answer must be whole."""
        while True:
            for path in ("/metrics", "/v1/models", "/v1/comparison", "/livez"):
                begun_s = time.monotonic()
                try:
                    status, body = await get(gateway.port, path, timeout_s=20)
                    if status == 200 and path == "/metrics":
                        read_metrics(body.decode())
                    elif status != 200 and b"Service Unavailable" not in body:
                        self.findings.append(f"GET {path}: {status}")
                except asyncio.CancelledError:
                    raise
                except TimeoutError:
                    self.findings.append(f"GET {path}: no answer in 20 s")
                except ValueError as error:
                    self.findings.append(f"GET {path}: {error!r}"[:500])
                except Exception as error:  # no connection: only where descriptors are low
                    self.unanswered.append((begun_s, f"GET {path}: {error!r}"[:500]))
            await asyncio.sleep(0.5)

    async def _sample(self, gateway: Gateway) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(10):
                    if sample := await gateway.sample(self.tally.num_requests):
                        self.samples.append(sample)
            await asyncio.sleep(SAMPLE_S)

    async def _rest(self, gateway: Gateway, before: Sample | None, tally: Tally) -> None:
        """The gateway once no request is left."""
        if gateway.popen.poll() is not None:
            return
        if not await gateway.wait_until_ready(RECOVERY_S[self.is_real]):
            self.findings.append("not ready after the run")
        await asyncio.sleep(REST_S)
        _, body = await get(gateway.port, "/metrics")
        self.metrics = body.decode()
        self.findings += audit_metrics(tally, self.metrics)
        after = await gateway.sample(tally.num_requests)
        if before is None or after is None:
            self.findings.append("the gateway could not be looked at at rest")
            return
        for name in ("num_descriptors", "num_tasks"):
            if getattr(after, name) > getattr(before, name) + NUM_SPARE:
                self.findings.append(
                    f"{name} at rest: {getattr(before, name)} before, {getattr(after, name)} after"
                )

    def _judge_lost(self, tally: Tally, faults: Faults) -> None:
        """Once all faults are over, since each tells only then how long it lasted."""
        self.findings += [told for at_s, told in self.unanswered if not _is_low(faults, at_s)]
        lost = Counter(route for at_s, route in tally.lost if not _is_low(faults, at_s))
        self.num_lost = lost.total()
        if lost:
            self.findings.append(f"{self.num_lost} requests had no answer: {lost}")
        if tally.num_wrong:
            self.findings.append(f"{tally.num_wrong} wrong answers; see wrong")
        if tally.num_plain and not (tally.kinds["crowd"] or tally.kinds["attack"]):
            self.findings.append(f"{tally.num_plain} answers of the HTTP server without a crowd")

    def _figures(self, tally: Tally, faults: Faults) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "seed": self.asked.seed,
            "workers": "real" if self.is_real else "fake",
            "num_requests": tally.num_requests,
            "num_answers_by_code": dict(_by_code(tally)),
            "num_left": tally.left.total() + tally.left_early.total(),
            "num_lost": self.num_lost,
            "num_closed_for_want_of_descriptors": len(tally.lost) - self.num_lost,
            "num_plain": tally.num_plain,
            "num_wrong": tally.num_wrong,
            "num_hung": tally.num_hung,
            "num_clients_by_kind": dict(tally.kinds),
            "num_faults": faults.counts.total(),
            "num_faults_by_kind": dict(faults.counts),
        }
        numbers = [sample.num_requests for sample in self.samples]
        for name, allowed in ALLOWED.items():
            found = slope(numbers, [getattr(sample, name) for sample in self.samples])
            if found is None:
                continue
            figures[f"{name}_per_1000_requests"] = round(found.value, 3)
            figures[f"{name}_per_1000_requests_standard_error"] = round(found.error, 3)
            if found.grows(allowed):
                self.findings.append(f"{name} grows: {found}")
        if self.samples:
            figures["anonymous_bytes_last"] = self.samples[-1].anonymous_bytes
        return {
            **figures,
            "wrong": tally.wrong,
            "findings": self.findings,
            "notices": faults.notices,
            "passed": not self.findings,
        }


def _by_code(tally: Tally) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, code), number in sorted(tally.seen.items(), key=lambda item: item[0][1]):
        found[str(code)] += number
    return found


def _is_low(faults: Faults, at_s: float) -> bool:
    """Whether the gateway may have had too few descriptors for a connection opened then."""
    return any(begun_s - LATE_S <= at_s <= ended_s + LATE_S for begun_s, ended_s in faults.low_s)


async def _ask_chat(gateway: Gateway) -> int:
    """The status of a chat: 400 of a model without a chat template."""
    body = {"model": "dense", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    status, _ = await post(gateway.port, CHAT, body)
    return status
