"""deploy/compose.yaml -> run by podman-compose, and checked."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx

from deploy.check.image.build import tag
from deploy.check.image.containers import (
    ADDRESS,
    PREFIX,
    ROOT,
    WORK,
    check_answers,
    check_drain,
    check_hardened,
    check_kernels,
    check_metrics,
    expect,
    is_healthy,
    is_ready,
    podman,
    run,
    wait_until,
)

COMPOSE = ROOT / "deploy/compose.yaml"


def container_of(service: str) -> str:
    return f"{PREFIX}_{service}_1"


@contextlib.contextmanager
def composed(folder: Path) -> Iterator[None]:
    """deploy/compose.yaml up, but for Grafana; with Debian's Prometheus, which is no image."""
    program = shutil.which("prometheus")
    prometheus = {"image": tag("cast-serve-gateway"), "entrypoint": [program], "user": "0:0"}
    prometheus["volumes"] = [f"{program}:{program}:ro"]
    override = WORK / "compose.json"
    override.write_text(json.dumps({"services": {"prometheus": prometheus}}))
    compose = ["podman-compose", "--file", COMPOSE, "--file", override, "-p", PREFIX]
    cores = {"CAST_DENSE_CORES": "0", "CAST_SPARSE_CORES": "1" if os.cpu_count() != 1 else "0"}
    environment = {"CAST_MODELS": str(folder), "CAST_PUBLISH": ADDRESS, **cores}
    services = ["worker-dense", "worker-sparse", "gateway", "prometheus"]
    try:
        run(*compose, "up", "--detach", "--no-build", *services, environment=environment)
        yield
    finally:
        run(*compose, "down", "--volumes", environment=environment)


def check_compose(folder: Path) -> dict[str, float]:
    """Returns seconds: until ready with nothing compiled, and again after a restart."""
    workers = [container_of(f"worker-{variant}") for variant in ("dense", "sparse")]
    gateway = container_of("gateway")
    ours = [*workers, gateway]
    with composed(folder):
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
        podman("restart", "-t", "75", workers[1])
        url = "http://127.0.0.1:8001/health"
        again_s = wait_until(lambda: is_healthy(workers[1], url), "restart", workers)
    return {"ready_s": round(first_s, 1), "restart_ready_s": round(again_s, 1)}


def scraped() -> set[str]:
    """The variants that deploy/prometheus has series of."""
    with contextlib.suppress(httpx.HTTPError):
        query = {"query": 'cast_variant_up{job="cast-serve"} == 1'}
        answer = httpx.get(f"http://{ADDRESS}:9090/api/v1/query", params=query, timeout=5)
        return {each["metric"]["variant"] for each in answer.json()["data"]["result"]}
    return set()
