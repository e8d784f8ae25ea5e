"""Variants by name -> vLLM servers: local ones started, watched and stopped, or remote ones.

A local worker is a process group of its own (``cast-serve worker``), so that Ctrl-C reaches only
the gateway and stopping takes the engine's processes along.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

logger = logging.getLogger(__name__)

STOP_GRACE_S = 15.0
KILL_GRACE_S = 5.0  # for the kernel to clear away what was killed


class VariantError(RuntimeError):
    """A variant did not start."""


@dataclass
class Variant:
    """One served model.

    Attributes:
        name: what requests write in ``model``.
        url: where its vLLM server answers, without a trailing slash.
        model: the local worker's directory; None for a remote one.
        cores: CPU ids of the local worker.
    """

    name: str
    url: str
    model: Path | None = None
    cores: tuple[int, ...] = ()
    vllm_flags: tuple[str, ...] = ()
    is_up: bool = False
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    started_s: float = field(default_factory=time.monotonic)


def local_variants(models: Mapping[str, Path], vllm_flags: Sequence[str] = ()) -> list[Variant]:
    """Variants for directories, each on a free port and its own share of this process's cores.

    Raises:
        ValueError: if a directory holds no model, or there are fewer cores than variants.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(models):
        raise ValueError(
            f"{len(models)} variants need a core each, but this process has {len(cores)}; "
            "serve fewer, or run workers elsewhere and use `cast-serve gateway`"
        )
    for name, model in models.items():
        if not (model / "config.json").is_file():
            raise ValueError(f"variant {name}: {model} holds no model (no config.json)")
    share = len(cores) // len(models)
    ports = _free_ports(len(models))
    return [
        Variant(
            name=name,
            url=f"http://127.0.0.1:{ports[index]}",
            model=model,
            cores=tuple(cores[index * share : (index + 1) * share]),
            vllm_flags=tuple(vllm_flags),
        )
        for index, (name, model) in enumerate(models.items())
    ]


def start(variants: Sequence[Variant]) -> None:
    """Starts the local ones among them; returns at once, `watch` tells when they answer."""
    local = [variant for variant in variants if variant.model is not None]
    if not local:
        return
    logs = Path(tempfile.mkdtemp(prefix="cast-serve-"))
    for variant in local:
        variant.log = logs / f"{variant.name}.log"
        port = variant.url.rpartition(":")[2]
        command = [sys.executable, "-m", "cast_serve", "worker", str(variant.model)]
        command += ["--name", variant.name, "--port", port]
        command += ["--cores", ",".join(map(str, variant.cores)), "--", *variant.vllm_flags]
        with open(variant.log, "wb") as log:
            variant.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "CAST_PARENT_PID": str(os.getpid())},
            )
        variant.started_s = time.monotonic()
        cores = ",".join(map(str, variant.cores))
        logger.info(
            "%s: loading %s on cores %s, log %s", variant.name, variant.model, cores, variant.log
        )


async def watch(
    variants: Sequence[Variant],
    client: httpx.AsyncClient,
    interval_s: float,
    startup_timeout_s: float,
    on_change: Callable[[Variant], None],
) -> None:
    """Keeps ``is_up`` true to life until cancelled.

    Raises:
        VariantError: if a local worker ends, or takes longer than the time-out to answer.
    """
    while True:
        for variant in variants:
            was_up, variant.is_up = variant.is_up, await _answers(variant, client)
            process = variant.process
            if process is not None and process.poll() is not None:
                raise VariantError(
                    f"variant {variant.name} ended with {process.returncode}; its log says:\n"
                    f"{_tail(variant.log)}"
                )
            waited_s = time.monotonic() - variant.started_s
            if variant.is_up and not was_up:
                logger.info("%s: ready after %.0f s at %s", variant.name, waited_s, variant.url)
            elif was_up and not variant.is_up:
                logger.warning("%s: does not answer at %s", variant.name, variant.url)
                variant.started_s = time.monotonic()
            elif not variant.is_up and process is not None and waited_s > startup_timeout_s:
                raise VariantError(
                    f"variant {variant.name} did not answer within {startup_timeout_s:.0f} s; "
                    f"its log says:\n{_tail(variant.log)}"
                )
            on_change(variant)
        await asyncio.sleep(interval_s)


def stop(variants: Sequence[Variant]) -> None:
    """Ends the local workers and every process they started; returns when none is left."""
    running = [v.process for v in variants if v.process is not None]
    for process in running:
        _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_GRACE_S
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("worker %d did not end in %.0f s; killing it", process.pid, STOP_GRACE_S)
        _signal_group(process.pid, signal.SIGKILL)  # what the leader left behind
        process.wait()
    deadline = time.monotonic() + KILL_GRACE_S
    while any(_has_group(process.pid) for process in running) and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_group(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # the whole group is gone
        os.killpg(pid, number)


async def _answers(variant: Variant, client: httpx.AsyncClient) -> bool:
    try:
        response = await client.get(f"{variant.url}/health", timeout=5)
    except httpx.HTTPError:
        return False
    return response.status_code == 200


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _tail(log: Path | None, num_lines: int = 30) -> str:
    if log is None or not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
