"""deploy/compose.yaml -> run by podman-compose, and checked."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from deploy.check.image.build import tag
from deploy.check.image.containers import (
    GATEWAY_PORT,
    PREFIX,
    PROMETHEUS_PORT,
    ROOT,
    WORK,
    check_answers,
    check_drain,
    check_hardened,
    check_kernels,
    check_metrics,
    clear,
    expect,
    is_healthy,
    is_ready,
    podman,
    run,
    wait_until,
)

COMPOSE = ROOT / "deploy/compose.yaml"
HEALTH = "http://127.0.0.1:8001/health"  # of a worker, in its container


def container_of(service: str) -> str:
    return f"{PREFIX}_{service}_1"


@contextlib.contextmanager
def composed(folder: Path, *services: str) -> Iterator[None]:
    """Services of deploy/compose.yaml up; with Debian's Prometheus, which is no image."""
    program = shutil.which("prometheus")
    prometheus = {"image": tag("cast-serve-gateway"), "entrypoint": [program], "user": "0:0"}
    prometheus["volumes"] = [f"{program}:{program}:ro"]
    override = WORK / "compose.json"
    override.write_text(json.dumps({"services": {"prometheus": prometheus}}))
    compose = ["podman-compose", "--file", COMPOSE, "--file", override, "-p", PREFIX]
    environment = {
        "CAST_MODELS": str(folder),
        "CAST_WORKER_KEY": secrets.token_hex(32),
        "CAST_DENSE_CORES": "0",
        "CAST_SPARSE_CORES": "1" if os.cpu_count() != 1 else "0",
        "CAST_GATEWAY_PORT": str(GATEWAY_PORT),
        "CAST_PROMETHEUS_PORT": str(PROMETHEUS_PORT),
    }
    try:
        run(*compose, "up", "--detach", "--no-build", *services, environment=environment)
        yield
    finally:
        clear()


def check_compose(folder: Path) -> dict[str, float]:
    """Returns seconds: until ready with nothing compiled, and again after a restart."""
    workers = [container_of(f"worker-{variant}") for variant in ("dense", "sparse")]
    gateway = container_of("gateway")
    ours = [*workers, gateway]
    with composed(folder, "worker-dense", "worker-sparse", "gateway", "prometheus"):
        first_s = wait_until(is_ready, "compose", ours)
        check_answers({"dense": "dense", "sparse": "sparse", "default": "sparse"}, {})
        for container in ours:
            check_hardened(container)
            podman("healthcheck", "run", container)
        for worker in workers:
            routes = podman("exec", worker, "cat", "/proc/net/route")
            ways_out = [line for line in routes.splitlines()[1:] if line.split()[1] == "0" * 8]
            expect(not ways_out, f"{worker} has a way to the outside: {routes}")
        check_kernels(workers[1])
        check_metrics(("dense", "sparse"), {})
        wait_until(lambda: scraped() == {"dense", "sparse"}, "Prometheus's scrape", ours)
        print(f"{'compose':<12}answers, health, hardening, networks, metrics, scrape", flush=True)
        num = check_drain(gateway, "sparse", {})
        print(f"{'':<12}gateway stopped in mid-stream: {num} chunks after it", flush=True)
        again_s = restart(workers[1])
    return {"ready_s": round(first_s, 1), "restart_ready_s": again_s}


def restart(worker: str) -> float:
    """Seconds from a worker's start until it is ready."""
    podman("stop", "-t", "75", worker)
    began = time.monotonic()
    podman("start", worker)
    wait_until(lambda: is_healthy(worker, HEALTH), f"{worker} after a restart", [worker])
    return round(time.monotonic() - began, 1)


def time_restarts(folder: Path, num: int) -> dict[str, list[float]]:
    """A directory with sparse/ -> seconds until its worker is ready, alone on the machine.

    Returns:
        of num restarts without what it compiled before, and of num with it, in turn.
    """
    worker = container_of("worker-sparse")
    found: dict[str, list[float]] = {"empty_cache_s": [], "kept_cache_s": []}
    with composed(folder, "worker-sparse"):
        wait_until(lambda: is_healthy(worker, HEALTH), worker, [worker])
        for _ in range(num):
            podman("exec", worker, "find", "/tmp/cache", "-mindepth", "1", "-delete")
            for seconds in found.values():
                seconds.append(restart(worker))
    return found


def scraped() -> set[str]:
    """The variants that deploy/prometheus has series of."""
    with contextlib.suppress(httpx.HTTPError):
        query = {"query": 'cast_variant_up{job="cast-serve"} == 1'}
        url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query"
        answer = httpx.get(url, params=query, timeout=5)
        return {each["metric"]["variant"] for each in answer.json()["data"]["result"]}
    return set()
