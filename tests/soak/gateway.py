"""What to serve -> a gateway process in a folder, watched: memory, descriptors, tasks, workers.

Run as a program it is that process: `cast-serve`, with fake workers in the place of vLLM's, a route
that tells how many tasks there are, and shorter pauses before a worker is started again.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.ports import free_port
from tests.soak.clients.connection import get
from tests.soak.clients.request import VARIANTS

ROOT = Path(__file__).parents[2]
TASKS = "/soak/tasks"
FAKES, MAX_BACKOFF_S = "CAST_SOAK_FAKES", 2.0


@dataclass(frozen=True)
class Sample:
    """The gateway at one moment."""

    at_s: float
    num_requests: int
    anonymous_bytes: int  # resident memory without files
    num_descriptors: int
    num_tasks: int


class Gateway:
    """A running gateway.

    Attributes:
        port: where it listens.
        ports: of its workers, by variant.
        log: its stderr.
        worker_logs: the folder of its workers' logs.
    """

    def __init__(self, popen: subprocess.Popen[bytes], port: int, folder: Path) -> None:
        self.popen = popen
        self.port = port
        self.log = folder / "gateway.log"
        self.worker_logs = folder / "workers"
        self.ports: dict[str, int] = {}

    async def sample(self, num_requests: int) -> Sample | None:
        """None if it does not answer in time."""
        process = Path(f"/proc/{self.popen.pid}")
        try:
            _, body = await get(self.port, TASKS)
            num_tasks = int(json.loads(body)["tasks"])
            status = (process / "status").read_text()
            num_descriptors = len(list((process / "fd").iterdir()))
        except Exception:  # under a fault anything may fail; the next sample comes soon
            return None
        anonymous = 1024 * int(status.split("RssAnon:")[1].split()[0])  # files come and go
        now_s = time.monotonic()
        return Sample(now_s, num_requests, anonymous, num_descriptors, num_tasks)

    async def is_ready(self) -> bool:
        try:
            status, body = await get(self.port, "/readyz", 5)
        except Exception:
            return False
        return status == 200 and all(found is True for found in json.loads(body).values())

    async def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether every variant is up within that time."""
        deadline_s = time.monotonic() + timeout_s
        while not await self.is_ready():
            if time.monotonic() > deadline_s or self.popen.poll() is not None:
                return False
            await asyncio.sleep(0.1)
        return True

    def workers(self, variant: str) -> list[int]:
        """Process ids of a variant's worker and of what it started, the worker first."""
        parents: dict[int, int] = {}
        words: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if state != "Z":
                    parents[int(folder.name)] = int(parent)
                    words[int(folder.name)] = line
        ours = [pid for pid, parent in parents.items() if parent == self.popen.pid]
        found = [pid for pid in ours if f" {self.ports[variant]} " in f"{words[pid]} "]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def stop(self, timeout_s: float = 60) -> int:
        """Ends it by SIGTERM; its exit status."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()


def start(
    folder: Path,
    directories: Sequence[Path],
    settings: Mapping[str, object],
    environment: Mapping[str, str],
) -> Gateway:
    """Starts `cast-serve up`.

    Args:
        folder: for the configuration and the logs; `folder/workers` must be there.
        directories: the models of `VARIANTS`; none: fake workers.
        settings: of the gateway.
        environment: beside this process's own.
    """
    ports: list[int] = []
    for _ in range(1 + len(VARIANTS)):
        ports.append(free_port(ports))
    port = ports.pop()
    lines = ["[gateway]", f"port = {port}", 'log_dir = "workers"']
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    cores = sorted(os.sched_getaffinity(0))
    for index, name in enumerate(VARIANTS):
        directory = directories[index % len(directories)] if directories else folder / "model"
        lines += [f"[variant.{name}]", f'dir = "{directory}"', f"port = {ports[index]}"]
        lines += [f'cores = "{cores[index % len(cores)]}"']
        if directories:
            lines += ['vllm = ["--enforce-eager", "--max-model-len", "512"]']
    if not directories:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
    (folder / "serve.toml").write_text("\n".join(lines) + "\n")
    kind = {"VLLM_CPU_KVCACHE_SPACE": "1"} if directories else {FAKES: "1"}
    with open(folder / "gateway.log", "wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.gateway", "up", "--config", folder / "serve.toml"],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **kind, **environment},
        )
    found = Gateway(popen, port, folder)
    found.ports = dict(zip(VARIANTS, ports, strict=True))
    return found


def _run() -> None:
    from cast_serve import __main__ as program
    from cast_serve.gateway import app as application
    from cast_serve.gateway.upstream import replica as replicas
    from cast_serve.gateway.upstream import supervisor

    def command(replica: replicas.Replica) -> list[str]:
        port = replica.url.rpartition(":")[2]
        return [sys.executable, "-m", "tests.soak.fake", replica.variant, port]

    os.environ.pop("LD_PRELOAD", None)  # the clock that steps is the gateway's, not its workers'
    created = application.create_app

    def create_app(*arguments: Any, **more: Any) -> Any:
        app = created(*arguments, **more)

        async def tasks() -> dict[str, int]:
            return {"tasks": len(asyncio.all_tasks())}

        app.add_api_route(TASKS, tasks, methods=["GET"])
        return app

    application.create_app = create_app
    supervisor.MAX_BACKOFF_S = MAX_BACKOFF_S
    if os.environ.get(FAKES):
        replicas.worker_command = command
        supervisor.CANARY_INTERVAL_S = 1.0
    program.main()


if __name__ == "__main__":
    _run()
