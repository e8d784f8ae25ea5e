"""Nothing -> a fake worker, and the processes that may stand between it and a client."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import httpx

from benchmarks.gateway.fake_worker import MODEL
from benchmarks.gateway.passthrough import KINDS

WAYS = ("gateway", *KINDS)
DIRECT = "direct"
START_S = 60


@dataclass(frozen=True)
class Way:
    """A process between client and worker, or none: where it answers, and its CPU time so far."""

    url: str
    cpu_s: Callable[[], float]


def started(stack: ExitStack) -> dict[str, Way]:
    """The worker (`DIRECT`), and each of `WAYS` once it answers; the stack ends them.

    With two cores or more this process and the worker leave the first one to the ways.

    Raises:
        RuntimeError: if one does not answer.
    """
    cores = sorted(os.sched_getaffinity(0))
    own, others = (cores[:1], cores[1:]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, others)
    stack.callback(os.sched_setaffinity, 0, cores)
    package = __name__.rpartition(".")[0]
    port = _free_port()
    worker = _url(port)
    stack.enter_context(_process(others, worker, f"{package}.fake_worker", str(port)))
    ways = {DIRECT: Way(worker, time.process_time)}
    for kind in WAYS:
        port = _free_port()
        command = [f"{package}.passthrough", kind, str(port), worker]
        if kind == "gateway":
            command = ["cast_serve", "gateway", "--port", str(port), "--set", "max_running=1024"]
            command += ["--variant", f"{MODEL}={worker}"]
        process = stack.enter_context(_process(own, _url(port), *command))
        ways[kind] = Way(_url(port), _cpu_clock(process.pid))
    return ways


@contextmanager
def _process(cores: Sequence[int], url: str, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A module that runs on these cores, once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        os.sched_setaffinity(process.pid, cores)
        deadline_s = time.monotonic() + START_S
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{' '.join(command[:3])} does not answer at {url}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:  # after a Ctrl-C meanwhile too
            process.kill()
            process.wait()


def _is_healthy(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200
    return False


def _cpu_clock(pid: int) -> Callable[[], float]:
    """CPU seconds of a process of this machine, to the nanosecond."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise RuntimeError(f"process {pid} has no CPU clock: {os.strerror(error)}")
    return lambda: time.clock_gettime(clock.value)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
