"""The gateway and real workers under abuse, under load, and while parts of them die."""

import ipaddress
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from prometheus_client.parser import text_string_to_metric_families

from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.supervisor import STEP_FACTOR
from cast_serve.worker_key import OPEN_PATHS
from tests import hostile
from tests.story.conftest import MAX_MODEL_LEN, PROMPTS, Served, descendants, worker

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(900)]

DTYPE = "float32"  # greedy texts do not depend on who else is in the batch


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.05)
    return time.monotonic() - began


def is_ready(served: Served) -> bool:
    return httpx.get(f"{served.url}/readyz", timeout=10).status_code == 200


def metric(served: Served, name: str, **labels: str) -> float:
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


def resident_bytes(served: Served) -> int:
    pids = [served.process.pid, *descendants(served.process.pid)]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def key_of_worker(served: Served) -> str:
    environment = Path(f"/proc/{worker(served, 'sparse')}/environ").read_text().split("\0")
    return dict(line.partition("=")[::2] for line in environment)["CAST_WORKER_KEY"]


def stream(
    url: str, name: str, prompt: str, max_tokens: int = 24, key: str = ""
) -> tuple[str, str]:
    """(text, how it ended): "done", or an error's code."""
    body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    text = ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=300
    ) as answer:
        if answer.status_code != 200:
            answer.read()
            return text, str(answer.json()["error"]["code"])
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return text, "done"
            if data:
                event = json.loads(data)
                if "error" in event:
                    return text, str(event["error"]["code"])
                text += "".join(choice["text"] for choice in event["choices"])
    return text, "cut off"


def test_64_streams_at_once_lose_no_token(served: Served) -> None:
    words = descendants(served.process.pid)[worker(served, "sparse")].split()
    direct = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    key = key_of_worker(served)
    prompts = [f"{number}. {prompt}" for number in range(4) for prompt in PROMPTS][:64]
    with ThreadPoolExecutor(64) as pool:
        through = list(pool.map(lambda prompt: stream(served.url, "sparse", prompt), prompts))
        straight = list(pool.map(lambda text: stream(direct, "sparse", text, key=key), prompts))
    assert {end for _, end in through + straight} == {"done"}
    assert through == straight


def test_neighbours_get_nothing_from_a_worker(served: Served) -> None:
    """Processes of other users: they see command lines and reach ports, and have no key."""
    (url,) = re.findall(r"^sparse at (\S+): loading", served.log.read_text(), re.M)
    key = key_of_worker(served)
    processes = descendants(served.process.pid)
    assert not [words for words in processes.values() if key in words]
    known = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key}"})
    paths = known.json()["paths"]
    assert {"/v1/completions", "/metrics", "/tokenize"} <= set(paths)
    for path, operations in paths.items():
        for method in operations:
            status = httpx.request(method, url + path).status_code
            assert status == (200 if path in OPEN_PATHS else 401), (method, path)
    listening = listening_addresses([served.process.pid, *processes])
    assert len(listening) >= 3
    assert {address for address in listening if not address.is_loopback} == set()


def listening_addresses(pids: Iterable[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Of each TCP socket on which one of the processes listens."""
    own = set()
    for file in [file for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()]:
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *more = line.split()
            if state == "0A" and more[5] in own:  # listens
                words = re.findall("." * 8, local.partition(":")[0])
                packed = b"".join(int(word, 16).to_bytes(4, "little") for word in words)
                found.append(ipaddress.ip_address(packed))
    return found


def test_compare_of_twins_finds_them_alike(served: Served) -> None:
    """They hold the same weights, so only rounding keeps them apart."""
    body = {"prompt": "The history of the city begins", "max_tokens": 48, "ignore_eos": True}
    found = httpx.post(f"{served.url}/v1/compare", json=body, timeout=300).json()
    for name in ("dense", "sparse"):
        assert found["variants"][name]["output_tokens"] == 48
        assert found["variants"][name]["tpot_s"] > 0
    agreement = found["agreement"]["sparse"]
    assert agreement["num_tokens"] == 48
    assert agreement["token_agreement"] == 1
    assert 0 <= agreement["kl_nats_per_token"] < 1e-4


def test_hostile_requests_do_no_harm(served: Served) -> None:
    workers = {name: worker(served, name) for name in ("dense", "sparse")}
    cases = list(hostile.requests(("dense", "sparse")))
    assert len(cases) > 500

    def send_all(client: httpx.Client) -> list[tuple[str, int, str]]:
        wrong = []
        for name, method, path, headers, content in cases:
            try:
                found = client.request(method, path, headers=headers, content=content)
            except httpx.HTTPError as error:  # closed before all of it was sent
                if len(content) <= 1 << 20 and "header" not in name:
                    wrong.append((name, 0, repr(error)))
                continue
            if found.status_code >= 500:
                wrong.append((name, found.status_code, found.text[:200]))
        return wrong

    with httpx.Client(base_url=served.url, timeout=120) as client:
        assert not send_all(client)
        before = resident_bytes(served)  # buffers and caches have their size by now
        assert not send_all(client)
    url = httpx.URL(served.url)
    assert url.port is not None
    address = (url.host, url.port)

    for _ in range(1000):
        socket.create_connection(address).close()
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(_send_slowly, address) for _ in range(8)]
        assert stream(served.url, "dense", "The")[1] == "done"
        assert {answer.result().partition(b"\r\n")[0][:13] for answer in slow} == {b"HTTP/1.1 408 "}
    assert {name: worker(served, name) for name in workers} == workers
    assert is_ready(served)
    assert resident_bytes(served) < 1.05 * before


def _send_slowly(address: tuple[str, int]) -> bytes:

    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
        return connection.recv(100)


def test_the_description_holds_for_whatever_schemathesis_makes_of_it(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert {"/v1/completions", "/v1/chat/completions"} <= {each.path for each in operations}
    wrong = [text for operation in operations for text in _undescribed(served, operation)]
    assert not wrong
    assert is_ready(served)


def _shorten(body: Any) -> None:
    """An answer of hundreds of tokens says no more than one of 8, and takes the suite minutes."""
    if not isinstance(body, dict):
        return
    lengths = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    for name in lengths or ["max_tokens"]:
        asked = body.get(name)
        if asked is None or (isinstance(asked, int) and 8 < asked <= MAX_MODEL_LEN):
            body[name] = 8


def _undescribed(served: Served, operation: Any) -> list[str]:
    """Requests that were answered by a status that the description does not know, or by a 5xx."""
    known = {int(status) for status in operation.definition.raw["responses"]}
    wrong: list[str] = []

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def send(case: Any) -> None:
        _shorten(case.body)
        found = case.call(base_url=served.url, timeout=300)
        if found.status_code >= 500 or found.status_code not in known:
            wrong.append(f"{case.method} {case.path} {str(case.body)[:200]}: {found.status_code}")

    send()
    return wrong


def test_a_killed_worker_is_seen_and_comes_back(served: Served) -> None:
    ends: list[tuple[str, str]] = []
    is_over = threading.Event()

    def keep_asking(name: str) -> None:
        while not is_over.is_set():
            ends.append((name, stream(served.url, name, "The sun", max_tokens=16)[1]))

    threads = [
        threading.Thread(target=keep_asking, args=(name,), daemon=True)
        for name in ("dense", "sparse") * 2
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(ends) >= 8, 60)
    os.killpg(worker(served, "sparse"), signal.SIGKILL)
    wait_until(lambda: not is_ready(served), 60)
    wait_until(lambda: is_ready(served), 400)
    ends_before = len(ends)
    wait_until(lambda: len(ends) >= ends_before + 8, 60)
    is_over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert {end for name, end in ends if name == "dense"} == {"done"}
    assert {end for name, end in ends if name == "sparse"} == {"done", "variant_unavailable"}
    assert all(end == "done" for _, end in ends[-8:])
    assert metric(served, "cast_variant_restarts_total", variant="sparse") == 1


def test_a_hanging_engine_is_seen_although_health_says_ok(served: Served) -> None:
    pids = descendants(worker(served, "dense"))
    engine = max(pids, key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
    os.kill(engine, signal.SIGSTOP)
    step_s = metric(served, "cast_worker_step_seconds", variant="dense")
    limit_s = max(GatewaySettings().hang_timeout_s, STEP_FACTOR * step_s)
    wait_until(lambda: not is_ready(served), 60 + limit_s)
    assert "made no progress for" in served.log.read_text()
    assert stream(served.url, "dense", "The")[1] == "variant_unavailable"
    assert stream(served.url, "sparse", "The")[1] == "done"
    wait_until(lambda: is_ready(served), 400)
    assert stream(served.url, "dense", "The")[1] == "done"


def test_sigterm_lets_every_accepted_request_finish(served: Served) -> None:
    """The last test of this module: nothing is served after it."""
    with ThreadPoolExecutor(8) as pool:
        names = ["dense", "sparse"] * 4
        asked = [pool.submit(stream, served.url, name, "Once", max_tokens=64) for name in names]
        wait_until(
            lambda: (
                sum(
                    metric(served, "cast_requests_in_flight", variant=name)
                    for name in ("dense", "sparse")
                )
                == 8
            ),
            60,
        )
        served.process.send_signal(signal.SIGTERM)
        assert {found.result()[1] for found in asked} == {"done"}
    assert served.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/livez")
