"""The key of gateway and workers: where it comes from, and that vLLM's server asks for it."""

import asyncio
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.engine import worker
from cast_serve.worker_key import OPEN_PATHS, WorkerKeyCheck, key_of_environment, read_key

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAST_WORKER_KEY", "CAST_WORKER_KEY_FILE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_a_key_from_the_setting_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key("", None) == ""
    assert read_key(KEY, None) == read_key("", file) == KEY
    with pytest.raises(ValueError, match="are both set; unset one"):
        read_key(KEY, file)
    with pytest.raises(ValueError, match=r"nowhere cannot be read: No such file"):
        read_key("", tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", b"a\0b"])
def test_what_fits_no_header_is_refused_and_not_told(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"key holds no key: .*openssl rand -hex 32") as error:
        read_key("", file)
    assert "two" not in str(error.value)
    file.write_bytes("schlüssel".encode())
    with pytest.raises(ValueError, match="not ASCII"):
        read_key("", file)


def test_a_worker_reads_the_gateways_variables_or_vllms_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert key_of_environment() == ""
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    assert key_of_environment() == "of-vllm"
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("CAST_WORKER_KEY_FILE", str(tmp_path / "key"))
    assert key_of_environment() == KEY


class Flags:
    """What `worker.guard` reads of vLLM's arguments."""

    def __init__(self, **changes: Any) -> None:
        self.api_key: list[str] | None = None
        self.host = "127.0.0.1"
        self.headless = False
        self.middleware = ["of.the.User"]
        self.__dict__ |= changes


def test_a_worker_with_a_key_has_vllm_check_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_WORKER_KEY", KEY)
    monkeypatch.setenv("VLLM_API_KEY", "another")  # which would let nobody in
    flags = Flags()
    worker.guard(flags, "sparse")  # type: ignore[arg-type]
    assert flags.middleware == ["of.the.User", "cast_serve.worker_key.WorkerKeyCheck"]
    assert os.environ["VLLM_API_KEY"] == KEY


def test_a_key_among_the_flags_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--api-key shows the key in `ps`.* CAST_WORKER_KEY"):
        worker.guard(Flags(api_key=[KEY]), "sparse")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "is_open"),
    [
        *(("127.0.0.1", False), ("localhost", False), ("::1", False), ("127.9.9.9", False)),
        *(("0.0.0.0", True), ("::", True), ("10.0.0.7", True), ("a.name", True), (None, True)),
    ],
)
def test_a_worker_that_is_open_to_the_network_says_so(
    host: str, is_open: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.guard(Flags(host=host), "sparse")  # type: ignore[arg-type]
    assert ("without a key" in capsys.readouterr().err) == is_open


def statuses_of_vllm() -> tuple[dict[str, set[int]], dict[str, int]]:
    """What vLLM's own application says, as a worker with a key has it built.

    Returns:
        by path, the statuses of requests without the key; and some of requests with it.
    """
    os.environ |= {"CAST_WORKER_KEY": KEY, "VLLM_SERVER_DEV_MODE": "1"}  # which has more routes
    from vllm.entrypoints.launchers.app import build_app

    args = worker._arguments(["--model", "m"])
    worker.guard(args, "sparse")
    app = build_app(args, ("generate",))

    def ask(method: str, path: str, **headers: str) -> int:
        async def send() -> int:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
                return (await client.request(method, path, headers=headers)).status_code

        return asyncio.run(send())

    without: dict[str, set[int]] = {"/nowhere": {ask("GET", "/nowhere")}}
    for route in app.routes:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in ("OPTIONS", *(getattr(route, "methods", None) or ("GET",))):
            for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
                if path != "/health":  # which asks the engine that is not there
                    without.setdefault(path, set()).add(ask(method, path, **headers))
    known = {
        path: ask("GET", path, Authorization=f"bearer {KEY}") for path in ("/docs", "/nowhere")
    }
    return without, known


def test_vllm_answers_nothing_but_probes_without_the_key() -> None:
    """In a process of its own: vLLM switches other loggers off."""
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        without, known = pool.submit(statuses_of_vllm).result()
    assert GUARDED_PREFIX == ("/v1", "/v2", "/inference", "/cohere")  # of these paths the first:
    assert {"/v1/completions", "/metrics", "/tokenize", "/invocations", "/sleep"} <= set(without)
    assert without.pop("/version") == {200, 405}
    assert set(OPEN_PATHS) == {"/health", "/version"}
    assert {path: statuses for path, statuses in without.items() if statuses != {401}} == {}
    assert known == {"/docs": 200, "/nowhere": 404}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_check_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(*_: object) -> None:
        raise AssertionError("it was let through")

    with pytest.raises(ValueError, match="no key to check"):
        WorkerKeyCheck(app)
    monkeypatch.setenv("CAST_WORKER_KEY", KEY)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing of the request is read")

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await WorkerKeyCheck(app)(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
