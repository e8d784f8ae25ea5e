"""Which faults a run has, and that a paused worker goes on."""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from tests.soak import faults
from tests.soak.faults import BORNE, ENDED, Faults, SmallDisk
from tests.soak.gateway import Gateway


class Disk:
    is_mounted = True


class Watched:
    """A gateway with one worker, which is no server."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids

    def workers(self, variant: str) -> list[int]:
        return self.pids


def of(is_real: bool, pids: list[int]) -> Faults:
    gateway, disk = cast(Gateway, Watched(pids)), cast(SmallDisk, Disk())
    return Faults(gateway, Path(), is_real, disk)


def test_most_faults_of_real_workers_do_not_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LIBFAKETIME", [Path("lib")])
    real = of(True, [])
    counts = Counter(real.plan(seed=1, number=3 * len(real.kinds)))
    assert counts == {**dict.fromkeys(ENDED, 3), **dict.fromkeys(BORNE, 18)}
    fakes = of(False, [])
    assert Counter(fakes.plan(seed=1, number=2 * len(fakes.kinds))) == dict.fromkeys(fakes.kinds, 2)


def test_a_paused_worker_stops_and_goes_on() -> None:
    child: subprocess.Popen[Any] = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"]
    )

    def state() -> str:
        return (Path("/proc") / str(child.pid) / "stat").read_text().rpartition(")")[2].split()[0]

    async def watch() -> None:
        fault = asyncio.create_task(of(True, [child.pid]).bring("pause", random.Random(1)))
        deadline_s = time.monotonic() + 20
        while state() != "T" and not fault.done() and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        assert state() == "T"
        await fault

    try:
        asyncio.run(watch())
        assert state() != "T"
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
