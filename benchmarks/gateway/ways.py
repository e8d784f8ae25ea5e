"""No input -> a running fake worker and, in front of it, our gateway and the proxies beside it.

Each process that can stand between client and worker is a *way*; `DIRECT` is none.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import httpx

from benchmarks.gateway.fake_worker import MODEL
from benchmarks.gateway.passthrough import KINDS
from cast_serve.ports import free_port

WAYS = ("gateway", *KINDS)
DIRECT = "direct"
START_S = 60  # for a process to answer /health


@dataclass(frozen=True)
class Way:
    """A process between client and worker, or none.

    Attributes:
        url: where it answers; of `DIRECT`, the worker's.
        cpu_s: its CPU time so far; of `DIRECT`, this process's, the client.
    """

    url: str
    cpu_s: Callable[[], float]


def started(stack: ExitStack) -> dict[str, Way]:
    """Starts the worker and a process for each of `WAYS`, and waits until they answer.

    With two cores or more, this process and the worker leave the first one to the ways.

    Args:
        stack: ends the processes.

    Returns:
        `DIRECT` and each of `WAYS`, by name.

    Raises:
        RuntimeError: if one does not answer.
    """
    cores = sorted(os.sched_getaffinity(0))
    own, others = (cores[:1], cores[1:]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, others)
    stack.callback(os.sched_setaffinity, 0, cores)
    package = __name__.rpartition(".")[0]
    port = free_port()
    worker = _url(port)
    stack.enter_context(_process(others, worker, f"{package}.fake_worker", str(port)))
    ways = {DIRECT: Way(worker, time.process_time)}
    for kind in WAYS:
        port = free_port()
        command = [f"{package}.passthrough", kind, str(port), worker]
        if kind == "gateway":
            command = ["cast_serve", "gateway", "--port", str(port), "--set", "max_running=1024"]
            command += ["--variant", f"{MODEL}={worker}"]
        process = stack.enter_context(_process(own, _url(port), *command))
        ways[kind] = Way(_url(port), _cpu_clock(process.pid))
    return ways


@contextmanager
def _process(cores: Sequence[int], url: str, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a module on these cores; yields once it answers at `url`."""
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
        finally:  # also if a Ctrl-C cut the wait short
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


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
