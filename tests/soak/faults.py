"""A seed -> the faults of a run in their order, and how each is brought about."""

import asyncio
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.soak.clients.connection import ClosedError, post
from tests.soak.clients.request import VARIANTS
from tests.soak.gateway import Gateway

SAID = ("slow", "status", "cut", "unfinished", "bad_event", "error_event", "metrics")  # of fake.py
DONE = ("kill", "stop", "replace", "descriptors")
ENDED = ("kill", "stop", "replace", "engine")  # a worker starts anew, a real one for a minute
BORNE = ("pause", "descriptors", "disk", "clock")  # none does
NUM_BORNE = 6  # of each, for one of each of ENDED
KILLED_ON_FULL_DISK = {False: 0.5, True: 0.1}  # fake, real
DISK_BYTES = 1 << 20
LIBFAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
SPARE_DESCRIPTORS = 2
CLOCK_STEPS = ("+3600", "-3600", "+86400", "+0")


class Faults:
    """All faults that can be brought about here.

    Args:
        gateway: the one that must bear them.
        folder: of the run.
        is_real: whether its workers are vLLM's.
        disk: where these log.

    Attributes:
        kinds: what can be brought about; what is named more often is more often.
        counts: by kind, how many were brought about.
        notices: what cannot, and why.
        low_s: when the gateway had too few descriptors: from, to (time.monotonic).
    """

    def __init__(self, gateway: Gateway, folder: Path, is_real: bool, disk: "SmallDisk") -> None:
        self.gateway = gateway
        self.counts: Counter[str] = Counter()
        self.low_s: list[tuple[float, float]] = []
        self._folder = folder
        self._is_real = is_real
        self._disk = disk
        self.notices = _notices(disk, is_real)
        kinds = [*ENDED, *NUM_BORNE * BORNE] if is_real else [*DONE, *SAID, "disk", "clock"]
        can_be = {"disk": disk.is_mounted, "clock": bool(LIBFAKETIME)}
        self.kinds = [kind for kind in kinds if can_be.get(kind, True)]

    def plan(self, seed: int, number: int) -> list[str]:
        """Kinds in their order, drawn round by round, each as often as `kinds` has it."""
        draw = random.Random(f"{seed} faults")
        found: list[str] = []
        while len(found) < number:
            found += draw.sample(self.kinds, len(self.kinds))
        return found[:number]

    async def bring(self, kind: str, draw: random.Random) -> None:
        """Brings one about; returns when it is over, not when all has recovered."""
        self.counts[kind] += 1
        variant = draw.choice(VARIANTS)
        seconds = draw.choice((0.5, 1.0, 2.0))
        if kind in SAID:
            # The worker may just be starting again: then there is nothing to break.
            with suppress(OSError, TimeoutError, EOFError, ClosedError):
                await post(
                    self.gateway.ports[variant], "/fault", {"kind": kind, "seconds": seconds}
                )
            await asyncio.sleep(seconds)
        elif kind in ENDED:
            self._signal(variant, kind)
        elif kind == "pause":
            await self._pause(variant, seconds)
        elif kind == "descriptors":
            await self._without_descriptors(seconds)
        elif kind == "disk":
            self._disk.fill()
            if draw.random() < KILLED_ON_FULL_DISK[self._is_real]:
                self._signal(variant, "kill")
            await asyncio.sleep(seconds)
            self._disk.clear()
        elif kind == "clock":
            step_clock(self._folder, draw.choice(CLOCK_STEPS))
            await asyncio.sleep(seconds)

    def _signal(self, variant: str, kind: str) -> None:
        worker, *children = self.gateway.workers(variant) or [0]
        target = children[-1] if kind == "engine" and children else worker
        number = {"stop": signal.SIGSTOP, "replace": signal.SIGTERM}.get(kind, signal.SIGKILL)
        _send([target] if target else [], number)

    async def _pause(self, variant: str, seconds: float) -> None:
        """Stops a worker and its children for less than the hang limit."""
        stopped = self.gateway.workers(variant)
        try:
            _send(stopped, signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            _send(stopped, signal.SIGCONT)

    async def _without_descriptors(self, seconds: float) -> None:
        pid = self.gateway.popen.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(found.name) for found in Path(f"/proc/{pid}/fd").iterdir())
        begun_s = time.monotonic()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + SPARE_DESCRIPTORS, hard))
        await asyncio.sleep(seconds)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        self.low_s.append((begun_s, time.monotonic()))


class SmallDisk:
    """A disk of 1 MB at a folder, if this process may mount one.

    Attributes:
        is_mounted: whether it may.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        try:
            self.is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except OSError:
            self.is_mounted = False

    def fill(self) -> None:
        with suppress(OSError), open(self._folder / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    def clear(self) -> None:
        """Makes room again, also in the workers' logs."""
        (self._folder / "ballast").unlink(missing_ok=True)
        for log in self._folder.glob("*.log"):
            os.truncate(log, 0)

    def unmount(self) -> None:
        """The logs stay in the folder."""
        if self.is_mounted:
            logs = {log: log.read_bytes() for log in self._folder.glob("*.log")}
            subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
            for log, content in logs.items():
                log.write_bytes(content)


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def clock_environment(folder: Path) -> dict[str, str]:
    """Environment of a process whose wall clock `step_clock` sets; its monotonic one stays."""
    if not LIBFAKETIME:
        return {}
    step_clock(folder, "+0")
    return {
        "LD_PRELOAD": str(LIBFAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }


def step_clock(folder: Path, seconds: str) -> None:
    (folder / "clock").write_text(f"{seconds}\n")


def _notices(disk: SmallDisk, is_real: bool) -> list[str]:
    found = []
    if not disk.is_mounted:
        found.append("disk: skipped, mounting a small tmpfs needs root")
    if not LIBFAKETIME:
        found.append("clock: skipped, Debian's package faketime is not installed")
    if is_real:
        found.append(f"{', '.join(SAID)}: skipped, only fake workers can be told to")
    return found
