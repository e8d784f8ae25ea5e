"""What is said of a variant while it loads, with a small script in the place of its worker."""

import asyncio
import io
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from rich.console import Console

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import loading
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway.upstream.scripted_worker import Worker, watching

pytestmark = pytest.mark.anyio

BODY = {"model": "sparse", "prompt": "a"}
SAYS = r"loading, 13\d s so far"


@asynccontextmanager
async def gateway(worker: Worker) -> AsyncIterator[httpx.AsyncClient]:
    settings = GatewaySettings(health_interval_s=0.05)
    app = create_app([worker.variant], settings)
    transport = httpx.ASGITransport(app)
    async with (
        asyncio.timeout(40),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        yield client


async def test_answers_say_since_when_a_variant_loads(local: Worker) -> None:
    local.set("unhealthy")
    local.set("models", '{"data": [{"id": "sparse", "object": "model"}]}')
    async with gateway(local) as client:
        local.replica.started_s = time.monotonic() - 130
        refused = await client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        error = refused.json()["error"]
        assert re.fullmatch(f"variant 'sparse' is {SAYS}; try again shortly", error.pop("message"))
        assert error == {"type": "server_error", "param": None, "code": "variant_unavailable"}

        readiness = await client.get("/readyz")
        assert readiness.status_code == 503
        assert re.fullmatch(SAYS, readiness.json()["sparse"])

        (card,) = (await client.get("/v1/models")).json()["data"]
        assert re.fullmatch(SAYS, card.pop("status"))
        assert card == {"id": "sparse", "object": "model", "owned_by": "cast-serve"}

        local.clear("unhealthy")
        while not local.replica.is_up:
            await asyncio.sleep(0.01)
        assert (await client.get("/readyz")).json() == {"sparse": True}
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert "status" not in card

        local.set("unhealthy")  # down, but its worker has loaded
        while local.replica.is_up:
            await asyncio.sleep(0.01)
        assert (await client.get("/readyz")).json() == {"sparse": False}
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert card["status"] == "down"
        message = (await client.post("/v1/completions", json=BODY)).json()["error"]["message"]
        assert "is not answering" in message


async def test_what_runs_elsewhere_is_never_said_to_load() -> None:
    (variant,) = remote_variants({"dense": ["http://127.0.0.1:9"]})
    assert variant.status is None
    await loading.show([variant], Console(file=io.StringIO()))  # ends at once


async def test_without_a_terminal_a_line_now_and_then_says_what_each_does(
    local: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PLAIN_INTERVAL_S", 0.03)
    caplog.set_level(logging.INFO, loading.__name__)
    local.set("unhealthy")
    out = io.StringIO()
    telling = asyncio.create_task(loading.show([local.variant], Console(file=out)))
    async with watching(local) as watch:
        for printed, stage in (
            ("disabling torch.compile", "loading"),
            ("INFO Warming up model for the compilation...", "compiling"),
            ("cast-serve worker sparse: {}", "answering its first requests"),
        ):
            assert local.replica.log is not None
            with local.replica.log.open("a") as log:
                log.write(printed + "\n")
            line = re.compile(rf"sparse: {stage}, \d+ s so far")
            await watch.until(lambda line=line: any(map(line.fullmatch, caplog.messages)))
        local.clear("unhealthy")
        await watch.until(lambda: local.replica.is_up)
        await asyncio.wait_for(telling, 10)
    assert out.getvalue() == ""


async def test_on_a_terminal_one_line_changes(
    local: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LIVE_INTERVAL_S", 0.02)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80)
    local.set("unhealthy")
    telling = asyncio.create_task(loading.show([local.variant], console))
    async with watching(local) as watch:
        await watch.until(lambda: re.search(r"loading, \d+ s so far", terminal.getvalue()))
        local.clear("unhealthy")
        await asyncio.wait_for(telling, 10)
