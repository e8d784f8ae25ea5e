"""A variant's replicas, each one vLLM server: their state and, for a local one, its processes.

A local worker is a process group of its own (``cast-serve worker``), so that Ctrl-C reaches only
the gateway and killing takes the engine's processes along.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cast_serve.gateway.upstream.probes import Limits

logger = logging.getLogger(__name__)

# Any program cannot be asked to end with the gateway, and to keep to its cores.
CONFINED = ("setpriv", "taskset")
KILL_GRACE_S = 5.0  # for the kernel to clear away what was killed
LOCKED = "locked: its worker refuses the gateway's key (401); give both the same CAST_WORKER_KEY"
UNKNOWN = (
    "unknown to its server, which serves no model of that name (404); start the server with "
    "--served-model-name {}"
)
# For the gateway alone; a worker's key is passed to it separately.
NOT_FOR_WORKERS = ("CAST_API_KEYS", "CAST_API_KEYS_FILE", "CAST_WORKER_KEY_FILE", "VLLM_API_KEY")


@dataclass(eq=False)
class Replica:
    """One vLLM server.

    Attributes:
        variant: name of the variant that it serves.
        url: where it answers, without a trailing slash.
        model: the local worker's directory; None for a remote one and for a `command`.
        command: starts a local server other than `cast-serve worker`; empty for a worker.
        cores: CPU ids of the local worker.
        vllm_flags: passed on to the local worker's vLLM.
        key: that the local worker asks for.
        worker_flags: of the local worker itself.
        is_up: requests may go there.
        num_outstanding: requests sent and not yet answered; the gateway counts.
        num_received: answers and parts of streams that came; the gateway counts.
        num_restarts: of the local worker.
        limits: as the server publishes them.
        is_doubted: set when a request failed at the server: its watch then sends a canary at once,
            which decides, as the request itself may be what made it fail. Until then it stays up.
        refusal: why the server is at work, but not for this gateway; empty once it has answered.
        process: the local worker, leader of its process group.
        log: what the local worker prints, after what others have printed there.
        log_start: bytes of the log that were there when the local worker was started.
        started_s: when the local worker was started, on the monotonic clock, as the next two.
        came_up_s: when it first answered since its start; None before.
        failed_s: when a request last could not reach it.
    """

    variant: str
    url: str
    model: Path | None = None
    command: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    vllm_flags: tuple[str, ...] = ()
    key: str = field(default="", repr=False)
    worker_flags: tuple[str, ...] = ()
    is_up: bool = False
    num_outstanding: int = 0
    num_received: int = 0
    num_restarts: int = 0
    limits: Limits = Limits()
    is_doubted: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: str = ""
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    log_start: int = 0
    started_s: float = field(default_factory=time.monotonic)
    came_up_s: float | None = None
    failed_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.variant} at {self.url}"

    @property
    def is_local(self) -> bool:
        """Whether it is started and ended here."""
        return self.model is not None or bool(self.command)

    @property
    def loading_s(self) -> float | None:
        """Seconds since the start of a local worker that has not answered yet; else None."""
        if self.process is None or self.came_up_s is not None:
            return None
        return time.monotonic() - self.started_s


@dataclass(eq=False)
class Variant:
    """One served model.

    Attributes:
        name: what requests write in ``model``.
        replicas: the servers that answer for it, at least one.
    """

    name: str
    replicas: list[Replica]

    @property
    def is_up(self) -> bool:
        return any(replica.is_up for replica in self.replicas)

    @property
    def status(self) -> str | None:
        """Why it does not answer, as ``loading, 130 s so far``; None if it is up, or for no reason
        that is known.
        """
        if self.is_up:
            return None
        if refusals := [replica.refusal for replica in self.replicas if replica.refusal]:
            return refusals[0]
        seconds = [s for replica in self.replicas if (s := replica.loading_s) is not None]
        return f"loading, {max(seconds):.0f} s so far" if seconds else None

    @property
    def max_model_len(self) -> int | None:
        """Tokens that every replica can hold; None if none says."""
        return _least(replica.limits.max_model_len for replica in self.replicas)

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids below it are known to every replica; None if none says."""
        return _least(replica.limits.vocabulary_size for replica in self.replicas)

    def pick(self, tried: Collection[Replica] = ()) -> Replica | None:
        """The replica that is up with the fewest outstanding requests, the first of equals.

        Args:
            tried: those that are not to be asked again.
        """
        up = [replica for replica in self.replicas if replica.is_up and replica not in tried]
        return min(up, key=lambda replica: replica.num_outstanding, default=None)


def worker_command(replica: Replica) -> list[str]:
    """The command that runs a local replica."""
    cores = ",".join(map(str, replica.cores))
    if replica.command:
        setpriv, taskset = CONFINED
        return [setpriv, "--pdeathsig", "TERM", taskset, "-c", cores, *replica.command]
    command = [sys.executable, "-m", "cast_serve", "worker", str(replica.model)]
    command += ["--name", replica.variant, "--port", replica.url.rpartition(":")[2]]
    command += ["--cores", cores, *replica.worker_flags]
    command += ["--", *replica.vllm_flags]
    return command


def start_worker(replica: Replica) -> None:
    """Starts a local replica's process; returns at once, `Watch` tells when it answers.

    To be called in the thread that lives longest: the worker ends with the thread that starts it.
    """
    assert replica.log is not None
    own = {name: value for name, value in os.environ.items() if name not in NOT_FOR_WORKERS}
    own |= {"CAST_PARENT_PID": str(os.getpid()), "CAST_WORKER_KEY": replica.key}
    with open(replica.log, "ab") as log:
        replica.log_start = log.tell()
        replica.process = subprocess.Popen(
            worker_command(replica),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=own,
        )
    replica.started_s = time.monotonic()
    cores = ",".join(map(str, replica.cores))
    loaded = replica.model or replica.command[0]
    logger.info("%s: loading %s on cores %s, log %s", replica, loaded, cores, replica.log)


def note_failure(replica: Replica) -> None:
    """Marks a replica down that refused a connection, until its next good health check."""
    if replica.is_up:
        logger.warning("%s: refuses connections; down until its next good health check", replica)
    replica.is_up = False
    replica.failed_s = time.monotonic()


def note_refusal(replica: Replica, refusal: str) -> None:
    """Marks a replica down that is not there for this gateway, until it answers a canary."""
    if replica.refusal != refusal:
        logger.warning("%s: %s", replica, refusal)
    replica.is_up = False
    replica.refusal = refusal
    replica.failed_s = time.monotonic()
    replica.is_doubted.set()


def stop_workers(replicas: Iterable[Replica], grace_s: float = 15) -> None:
    """Ends local workers and every process they started; returns when none is left.

    Args:
        replicas: no longer watched, or they would be restarted; remote ones are left alone.
        grace_s: for a worker to end by itself after SIGTERM; then it is killed.
    """
    running = [replica.process for replica in replicas if replica.process is not None]
    for process in running:
        _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("worker %d did not exit within %.3g s; killing it", process.pid, grace_s)
        _signal_group(process.pid, signal.SIGKILL)  # what the leader left behind, too
    deadline = time.monotonic() + KILL_GRACE_S
    while any(process.poll() is None or _has_group(process.pid) for process in running):
        if time.monotonic() > deadline:
            logger.warning("workers are still running %.3g s after SIGKILL", KILL_GRACE_S)
            break
        time.sleep(0.02)


async def kill_worker(replica: Replica) -> None:
    """Ends a local replica's process group without a grace: it has ended, or hangs."""
    await asyncio.to_thread(stop_workers, [replica], 0)
    replica.process = None  # its id may belong to another process from now on


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _has_group(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def log_tail(replica: Replica, num_lines: int) -> list[str]:
    """The last lines that a local replica printed."""
    log = replica.log
    assert log is not None
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError as error:
        return [f"{log} cannot be read: {error}"]


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
