"""A running container -> what is expected of each: hardening, answers, metrics, a drain."""

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx


def free_ports(num: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens."""
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num)]
        return [each.getsockname()[1] for each in found]


ROOT = Path(__file__).resolve().parents[3]
WORK = ROOT / "build/check-image"
PREFIX = "cast-check"  # of everything that is made and removed
GATEWAY_PORT, PROMETHEUS_PORT = free_ports(2)
GATEWAY = f"http://127.0.0.1:{GATEWAY_PORT}"
READY_S = 1200  # two workers that compile at once on two busy cores took 400 s
NUM_STREAMED = 900  # tokens, of the tiny model's 1024
NOW = ("--force", "--time", "2")
REMOVAL = {"pod": NOW, "container": NOW, "network": (), "volume": (), "secret": ()}


class Problem(Exception):
    """What a check found, as text for people."""


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    """What a program printed.

    Raises:
        Problem: if it fails, with the end of what it said.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise Problem(f"{' '.join(words[:6])}: exit {done.returncode}: {said}")
    return done.stdout


def podman(*words: object) -> str:
    return run("podman", *words)


def succeeds(*words: object) -> bool:
    return not subprocess.run(["podman", *map(str, words)], capture_output=True).returncode


def clear() -> None:
    """Removes all that this program makes but images, also what a killed run left.

    Raises:
        Problem: if something stays.
    """
    for kind, flags in REMOVAL.items():
        for name in ours(kind):
            succeeds(kind, "rm", *flags, name)
    left = [f"{kind} {name}" for kind in REMOVAL for name in ours(kind)]
    expect(not left, f"podman did not remove {', '.join(left)}; remove it by hand")


def ours(kind: str) -> list[str]:
    """Names of the pods, containers, volumes, networks or secrets that this program made."""
    name = "{{.Names}}" if kind == "container" else "{{.Name}}"
    everything = ["--all"] if kind == "container" else []
    names = podman(kind, "ls", *everything, "--format", name).split()
    # podman-compose's pod is pod_PREFIX.
    return [each for each in names if each.removeprefix("pod_").startswith(PREFIX)]


def expect(holds: bool, text: str) -> None:
    if not holds:
        raise Problem(text)


def status_of(container: str) -> str:
    return podman("inspect", "--format", "{{.State.Status}}", container).strip()


def log_of(container: str) -> str:
    done = subprocess.run(["podman", "logs", container], capture_output=True, text=True)
    return done.stdout + done.stderr


def check_hardened(container: str) -> None:
    """Its first process: no root, no capabilities, nothing to gain, a root that it cannot write."""
    code = "import re; print(open('/proc/1/status').read()); open('/opt/x', 'w')"
    done = subprocess.run(
        ["podman", "exec", container, "python", "-c", code], capture_output=True, text=True
    )
    facts = dict(re.findall(r"^(\w+):\s+(\S+)", done.stdout, flags=re.MULTILINE))
    expect(facts.get("CapEff") == "0" * 16, f"{container} has capabilities: {facts}")
    expect(facts.get("NoNewPrivs") == "1", f"{container} may gain privileges")
    user = podman("exec", container, "python", "-c", "import os; print(os.getuid(), os.getgid())")
    expect(user.split() == ["10001", "10001"], f"{container} runs as {user}")
    expect("Read-only file system" in done.stderr, f"{container} can write: {done.stderr}")


def wait_until(holds: Callable[[], bool], what: str, containers: Sequence[str]) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        states = podman("inspect", "--format", "{{.State.Status}}", *containers).split()
        for container, status in zip(containers, states, strict=True):
            if status != "running":
                raise Problem(f"{container} is {status}: {log_of(container)[-3000:]}")
        expect(time.monotonic() - began < READY_S, f"{what}: not within {READY_S} s")
        time.sleep(2)  # each of podman's commands takes time from what is waited for
    return time.monotonic() - began


def is_ready() -> bool:
    """Every variant has answered: /readyz alone is content with a fallback."""
    urls = [f"{GATEWAY}/startupz", f"{GATEWAY}/readyz"]
    with contextlib.suppress(httpx.HTTPError):
        return all(httpx.get(url, timeout=5).is_success for url in urls)
    return False


def is_healthy(container: str, url: str) -> bool:
    return succeeds("exec", container, "python", "-m", "cast_serve.health", url)


def ask(model: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, **fields}
    return httpx.post(f"{GATEWAY}/v1/completions", json=body, headers=headers, timeout=120)


def check_answers(expected: dict[str, str], headers: dict[str, str]) -> None:
    """Each model's name is answered by the variant that is expected."""
    for model, variant in expected.items():
        answer = ask(model, headers)
        expect(answer.is_success, f"{model}: {answer.status_code} {answer.text}")
        expect(answer.json()["usage"]["completion_tokens"] == 8, f"{model}: {answer.text}")
        by = answer.headers["X-Cast-Variant"]
        expect(by == variant, f"{model} was answered by {by}")


def check_drain(container: str, model: str, headers: dict[str, str]) -> int:
    """Stops a container in the middle of a stream, which goes on to its end.

    Returns:
        how many chunks came while it was stopping.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": NUM_STREAMED, "ignore_eos": True}
    stop = threading.Thread(target=podman, args=("stop", "-t", "75", container))
    is_stopping = threading.Event()
    num_after, last = 0, ""
    with httpx.stream(
        "POST",
        f"{GATEWAY}/v1/completions",
        json={**body, "stream": True},
        headers=headers,
        timeout=120,
    ) as stream:
        expect(stream.is_success, f"{model}: {stream.status_code}")
        for line in filter(None, stream.iter_lines()):
            if stop.ident is None:
                stop.start()
                threading.Thread(target=_watch, args=(container, is_stopping)).start()
            last = line
            num_after += is_stopping.is_set()
    stop.join()
    code = podman("inspect", "--format", "{{.State.ExitCode}}", container).strip()
    expect(last == "data: [DONE]", f"{container} was stopped, and the stream ended with {last!r}")
    expect(num_after > 0, f"{container}: the stream was over before the stop")
    expect(code == "0", f"{container} stopped with exit {code}")
    return num_after


def _watch(container: str, is_stopping: threading.Event) -> None:
    while status_of(container) == "running":
        time.sleep(0.05)
    is_stopping.set()


def check_kernels(container: str) -> None:
    text = log_of(container)
    expect(
        "/prebuilt/cast_kernels" in text, f"{container} runs no prebuilt kernels: {text[-3000:]}"
    )
    expect("building the CPU kernels" not in text, f"{container} compiled the kernels")


def check_metrics(variants: Sequence[str], headers: dict[str, str]) -> None:
    text = httpx.get(f"{GATEWAY}/metrics", headers=headers, timeout=10).text
    for name in ("cast_variant_info", "cast_requests_total", "vllm:num_requests_running"):
        found = set(re.findall(rf'^{name}{{.*variant="(\w+)"', text, flags=re.MULTILINE))
        expect(found >= set(variants), f"/metrics has {name} of {found} only")
