"""Workers that ask for a key: the gateway sends it to them alone, and says where it is refused."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway import fake_worker
from tests.cast_serve.gateway.stack import Servers, events, wait_until

KEY = "of-the-workers"
LOCKED = "locked: its worker refuses the gateway's key (401); give both the same CAST_WORKER_KEY"


@dataclass
class Locked:
    """A gateway before workers dense and sparse that ask for `keys`, and what they were sent."""

    client: httpx.Client
    keys: dict[str, str]
    sent: list[tuple[str, str | None]] = field(default_factory=list)

    def ready(self) -> dict[str, Any]:
        return dict(self.client.get("/readyz").json())

    def complete(self, name: str, **more: object) -> httpx.Response:
        body = {"model": name, "prompt": "a", **more}
        return self.client.post("/v1/completions", json=body, headers={"Authorization": "Bearer c"})


@contextmanager
def locked(keys: dict[str, str], **settings: object) -> Iterator[Locked]:
    found = Locked(httpx.Client(timeout=20), keys)
    apps = {name: fake_worker.create_app(name) for name in keys}
    for name, app in apps.items():

        @app.middleware("http")
        async def check(request: Request, call_next: Any, name: str = name) -> Any:
            given = request.headers.get("authorization")
            found.sent.append((request.url.path, given))
            if request.url.path != "/health" and given != f"Bearer {found.keys[name]}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

    defaults = {"health_interval_s": 0.05, "shutdown_grace_s": 1}
    with found.client, Servers() as servers:
        urls = {name: [servers.start(app)] for name, app in apps.items()}
        gateway = create_app(remote_variants(urls), GatewaySettings(**(defaults | settings)))
        found.client.base_url = servers.start(gateway)
        yield found


def test_a_server_without_the_variants_model_is_named() -> None:
    unknown = "unknown to its server, which serves no model of that name (404); start the server"
    with Servers() as servers:
        url = servers.start(fake_worker.create_app("other"))
        settings = GatewaySettings(health_interval_s=0.05, shutdown_grace_s=1)
        gateway = create_app(remote_variants({"sparse": [url]}), settings)
        with httpx.Client(base_url=servers.start(gateway), timeout=20) as client:
            wait_until(lambda: str(client.get("/readyz").json()["sparse"]).startswith(unknown))
            (card,) = client.get("/v1/models").json()["data"]
            assert card["id"] == "sparse"
            assert card["status"].endswith("--served-model-name sparse")


def is_up(stack: Locked) -> bool:
    return stack.client.get("/readyz").status_code == 200


def test_the_key_goes_to_the_workers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "key").write_text(f"{KEY}\n")
    with locked({"dense": KEY, "sparse": KEY}, worker_key_file=tmp_path / "key") as stack:
        wait_until(lambda: is_up(stack))
        answers = [stack.complete("dense"), stack.complete("sparse", stream=True)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert events(answers[1])[-1] == "[DONE]"
        answers += [stack.client.get(path) for path in ("/v1/models", "/metrics", "/readyz")]
        answers.append(stack.client.post("/v1/compare", json={"prompt": "x", "max_tokens": 3}))
        assert all(answer.status_code == 200 for answer in answers)
        assert "vllm:num_requests_running" in answers[3].text
        assert {given for _, given in stack.sent} == {f"Bearer {KEY}"}  # and not the client's
        assert {"/health", "/v1/models", "/metrics", "/v1/completions"} <= {
            p for p, _ in stack.sent
        }
        assert not [a for a in answers if KEY in a.text or KEY in str(a.headers)]
    assert caplog.text
    assert KEY not in caplog.text


def test_without_a_key_none_is_sent() -> None:
    with locked({"dense": "", "sparse": ""}) as stack:
        wait_until(lambda: LOCKED in stack.ready().values())
        assert {given for _, given in stack.sent} == {None}


def test_a_worker_that_refuses_the_key_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with locked({"dense": KEY, "sparse": "another"}, worker_key=KEY) as stack:
        wait_until(lambda: stack.ready() == {"dense": True, "sparse": LOCKED})
        assert not is_up(stack)
        refused = stack.complete("sparse")
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            503,
            "variant_unavailable",
        )
        assert f"variant 'sparse' is {LOCKED}" in refused.json()["error"]["message"]
        cards = stack.client.get("/v1/models").json()["data"]
        assert {card["id"]: card.get("status") for card in cards} == {
            "dense": None,
            "sparse": LOCKED,
        }
        stack.keys["sparse"] = KEY
        wait_until(lambda: is_up(stack))
        assert stack.complete("sparse").status_code == 200
    assert caplog.text.count(LOCKED) == 1  # and not at every look


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_key_that_changes_meanwhile_is_no_401_of_the_clients(is_stream: bool) -> None:
    with locked({"dense": KEY, "sparse": KEY}, worker_key=KEY, fallback="sparse=dense") as stack:
        wait_until(lambda: is_up(stack))
        stack.keys["sparse"] = "another"
        found = stack.complete("sparse", stream=is_stream)
        assert (found.status_code, found.headers["X-Cast-Fallback"]) == (200, "sparse")
        # A look that began before the 401 may call it up once more.
        wait_until(lambda: stack.ready()["sparse"] == LOCKED)
        stack.keys["dense"] = "another"
        assert stack.complete("dense").status_code == 503
        assert LOCKED in stack.complete("dense").json()["error"]["message"]


def test_an_idle_worker_that_refuses_the_key_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cast_serve.gateway.upstream.supervisor.CANARY_INTERVAL_S", 0.05)
    with locked({"dense": KEY}, worker_key=KEY) as stack:
        wait_until(lambda: is_up(stack))
        stack.keys["dense"] = "another"
        wait_until(lambda: stack.ready() == {"dense": LOCKED})
