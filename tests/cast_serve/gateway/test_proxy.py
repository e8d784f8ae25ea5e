"""What the proxy does with what it is not asked every day."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.probes import Limits
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway.stack import events, running, url_of, wait_until


def test_requests_go_where_fewest_are() -> None:
    with running(num_replicas=2) as stack, ThreadPoolExecutor(6) as pool:
        for app in (stack.workers["dense"], stack.others["dense"]):
            app.state.gate.clear()
        asked = [pool.submit(stack.complete, model="dense") for _ in range(6)]
        wait_until(
            lambda: (
                len(stack.workers["dense"].state.bodies) + len(stack.others["dense"].state.bodies)
                == 6
            )
        )
        assert len(stack.workers["dense"].state.bodies) == 3
        for app in (stack.workers["dense"], stack.others["dense"]):
            app.state.gate.set()
        assert {found.result().status_code for found in asked} == {200}


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_fallback_answers_and_says_so(is_stream: bool) -> None:
    with running(fallback="sparse=dense", health_interval_s=30) as stack:
        stack.servers.stop(url_of(stack, "sparse"))
        found = stack.complete(model="sparse", stream=is_stream)
        assert found.status_code == 200
        assert found.headers["X-Cast-Variant"] == "dense"
        assert found.headers["X-Cast-Fallback"] == "sparse"
        assert stack.workers["dense"].state.bodies[0]["model"] == "dense"
        labels = (("from_variant", "sparse"), ("reason", "broken"), ("to_variant", "dense"))
        metrics = stack.metrics()
        assert metrics["cast_fallbacks_total", labels] == 1
        # Its time holds the wait for the variant that failed, and is that of neither.
        of_dense = (("variant", "dense"),)
        assert metrics["cast_output_tokens_total", of_dense] == 3
        assert metrics.get(("cast_e2e_request_latency_seconds_count", of_dense), 0) == 0
        assert stack.client.get("/v1/comparison").json()["variants"]["dense"]["num_requests"] == 0
        again = stack.complete(model="sparse")
        assert again.headers["X-Cast-Fallback"] == "sparse"
        assert stack.client.get("/readyz").status_code == 200  # every model is answered
        assert stack.client.get("/readyz").json() == {"dense": True, "sparse": False}


def test_a_request_beyond_the_fallbacks_context_is_the_variants_own() -> None:
    with running(fallback="sparse=dense", health_interval_s=30) as stack:
        stack.gateway.variants["dense"].replicas[0].limits = Limits(16, 100)
        assert stack.complete(model="sparse", max_tokens=40).status_code == 200
        stack.servers.stop(url_of(stack, "sparse"))
        assert stack.complete(model="sparse", max_tokens=4).headers["X-Cast-Variant"] == "dense"
        found = stack.complete(model="sparse", max_tokens=40)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "variant_unavailable")


def test_models_are_those_that_may_be_asked_for() -> None:
    with running(split="default=sparse:1") as stack:
        stack.workers["sparse"].state.cards.append({"id": "adapter", "object": "model"})
        listed = stack.client.get("/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["dense", "sparse", "default"]
        for card in listed:
            assert stack.client.get(f"/v1/models/{card['id']}").json() == card
        found = stack.client.get("/v1/models/adapter")
        assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")
        stack.servers.stop(url_of(stack, "dense"))
        wait_until(lambda: not stack.gateway.variants["dense"].is_up)
        assert stack.client.get("/v1/models/dense").json()["status"] == "down"


def test_a_split_follows_its_weights_and_users_stay_where_they_are() -> None:
    with running(split="llama=dense:3,sparse:1; other=dense:1") as stack:
        random.seed(0)
        assert stack.complete(model="other").headers["X-Cast-Variant"] == "dense"
        names = [stack.complete(model="llama").headers["X-Cast-Variant"] for _ in range(200)]
        assert 130 <= names.count("dense") <= 170  # 150 +- 6; unweighted, 100 +- 7
        by_user = {}
        for number in range(20):
            user = f"user {number}"
            seen = {
                stack.complete(model="llama", user=user).headers["X-Cast-Variant"] for _ in range(3)
            }
            assert len(seen) == 1
            by_user[user] = seen.pop()
        assert set(by_user.values()) == {"dense", "sparse"}
        assert "llama" in [card["id"] for card in stack.client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "llama=dense:1,spare:1"}, "names 'spare', but the variants are"),
        ({"split": "dense=dense:1"}, "is the name of a variant"),
        ({"fallback": "sparse=dens"}, "names 'dens'"),
        ({"split": "llama=dense"}, "is not NAME=VARIANT:WEIGHT"),
        ({"split": "llama=dense:0"}, "is not NAME=VARIANT:WEIGHT"),
        ({"fallback": "sparse=sparse"}, "is not VARIANT=VARIANT"),
    ],
)
def test_wrong_names_are_refused_at_the_start(settings: dict[str, str], message: str) -> None:
    variants = remote_variants({name: [f"http://{name}:1"] for name in ("dense", "sparse")})
    with pytest.raises(ValueError, match=message):
        create_app(variants, GatewaySettings(**settings))


def test_a_deadline_ends_the_wait_the_answer_and_the_stream() -> None:
    with running() as stack:
        worker = stack.workers["dense"]
        worker.state.gate.clear()
        headers = {"X-Request-Timeout": "0.3"}
        body = {"model": "dense", "prompt": "x"}
        found = stack.client.post("/v1/completions", json=body, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        streamed = stack.client.post(
            "/v1/completions", json={**body, "stream": True}, headers=headers
        )
        *_, last = events(streamed)
        assert json.loads(last)["error"]["code"] == "timeout"
        wait_until(lambda: worker.state.num_left == 2)  # vLLM is told to stop
        for wrong in ("0", "-1", "601", "soon", "nan", "1_0"):
            found = stack.client.post(
                "/v1/completions", json=body, headers={"X-Request-Timeout": wrong}
            )
            assert found.status_code == 400, wrong
            assert "seconds above 0 and up to 600" in found.json()["error"]["message"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_stops_the_work(is_stream: bool) -> None:
    with running() as stack:
        worker = stack.workers["dense"]
        worker.state.gate.clear()
        body = {"model": "dense", "prompt": "x", "stream": is_stream}
        address = (stack.client.base_url.host, stack.client.base_url.port)
        content = json.dumps(body).encode()
        with socket.create_connection(address) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + content)
            wait_until(lambda: bool(worker.state.bodies))
        wait_until(lambda: worker.state.num_left == 1)
        labels = (("code", "499"), ("route", "/v1/completions"), ("variant", "dense"))
        wait_until(lambda: stack.metrics().get(("cast_requests_total", labels)) == 1)
        assert stack.metrics()["cast_requests_in_flight", (("variant", "dense"),)] == 0
        assert stack.gateway.places.admissions["dense"].num_running == 0


def test_a_full_queue_is_429_before_the_worker_sees_anything() -> None:
    with running(max_running=1, max_queued=1) as stack, ThreadPoolExecutor(2) as pool:
        worker = stack.workers["dense"]
        worker.state.gate.clear()
        first = pool.submit(stack.complete, model="dense")
        wait_until(lambda: bool(worker.state.bodies))
        second = pool.submit(stack.complete, model="dense")
        wait_until(lambda: stack.gateway.places.admissions["dense"].num_queued == 1)
        assert stack.metrics()["cast_requests_queued", (("variant", "dense"),)] == 1
        third = stack.complete(model="dense")
        assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
        assert int(third.headers["Retry-After"]) >= 1
        assert stack.complete(model="sparse").status_code == 200  # its own queue
        assert stack.complete(model="dense", n=0).status_code == 400  # checked before admission
        assert len(worker.state.bodies) == 1
        worker.state.gate.set()
        assert first.result().status_code == second.result().status_code == 200
        assert stack.metrics()["cast_requests_shed_total", (("reason", "queue_full"),)] == 1


def test_ids_come_back_and_reach_the_log_which_holds_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running() as stack, caplog.at_level("INFO", "cast_serve.gateway.middleware.request_log"):
        body = {"model": "dense", "prompt": "a secret", "stream": True}
        found = stack.client.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1"})
        assert found.headers["X-Request-Id"] == "abc-1"
        made = stack.client.post(
            "/v1/completions", json=body, headers={"X-Request-Id": "no id \t" + "x" * 200}
        )
        assert len(made.headers["X-Request-Id"]) == 32
        refused = stack.client.post("/v1/completions", json={"model": "dense", "prompt": [999]})
        assert len(refused.headers["X-Request-Id"]) == 32
        stack.client.get("/metrics")
        wait_until(lambda: len(caplog.records) == 3)
    lines = sorted((json.loads(r.getMessage()) for r in caplog.records), key=lambda x: x["status"])
    lines.sort(key=lambda line: line["request_id"] != "abc-1")
    assert [line["status"] for line in lines] == [200, 200, 400]
    assert lines[0]["request_id"] == "abc-1"
    assert lines[0]["variant"] == "dense"
    assert (lines[0]["prompt_tokens"], lines[0]["output_tokens"]) == (2, 3)
    assert lines[0]["ttft_s"] <= lines[0]["duration_s"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("num_bytes", "status"), [(50, 408), (10_001, 413)])
def test_a_body_that_does_not_arrive_or_says_it_is_too_large(num_bytes: int, status: int) -> None:
    with running(body_timeout_s=0.2) as stack:
        address = (stack.client.base_url.host, stack.client.base_url.port)
        with socket.create_connection(address) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {num_bytes}"
            connection.sendall(head.encode() + b"\r\n\r\n{")
            assert connection.recv(200).startswith(f"HTTP/1.1 {status}".encode())


def test_a_head_that_is_too_large_is_431() -> None:
    with running(max_header_bytes=4096) as stack:
        for headers in ({"X-A": "a" * 4096}, {f"X-{n}": "a" * 100 for n in range(50)}):
            found = stack.client.get("/livez", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (431, "head_too_large")
            assert "larger than 4096 bytes" in found.json()["error"]["message"]
        assert stack.client.get("/livez?" + "a" * 4096).status_code == 431
        assert stack.client.get("/livez", headers={"X-A": "a" * 3000}).status_code == 200


def test_the_host_header_steers_no_redirect() -> None:
    with running() as stack:
        found = stack.client.get("/v1/models/", headers={"Host": "evil.example"})
        assert found.status_code == 404
        assert "evil" not in str(found.headers)


def test_compare_asks_both_and_comparison_shows_it() -> None:
    with running() as stack:
        found = stack.client.post("/v1/compare", json={"prompt": "x", "max_tokens": 3}).json()
        assert set(found["variants"]) == {"dense", "sparse"}
        assert found["variants"]["dense"]["text"] == "one two three"
        assert found["variants"]["dense"]["ttft_s"] > 0
        for name, worker in stack.workers.items():
            asked = worker.state.bodies[0]
            assert (asked["model"], asked["stream_options"]) == (name, {"include_usage": True})
        assert stack.client.post("/v1/compare", json={"prompt": ""}).status_code == 400
        stack.complete(model="dense", stream=True)
        shown = stack.client.get("/v1/comparison").json()
        assert shown["baseline"] == "dense"
        assert shown["variants"]["dense"]["num_requests"] == 1  # compare is no traffic
        assert shown["shadow_fraction"] == 0
        assert shown["models"] == {"dense": {}, "sparse": {}}  # given as URLs


def test_shadow_traffic_is_not_seen_by_the_client_and_counted_apart() -> None:
    with running(shadow_fraction=1.0) as stack:
        assert stack.complete(model="sparse", stream=True).headers["X-Cast-Variant"] == "sparse"
        wait_until(lambda: bool(stack.workers["dense"].state.bodies))
        wait_until(lambda: stack.gateway.shadow.outcomes["finished"] > 0)
        assert stack.complete(model="sparse").status_code == 200
        metrics = stack.metrics()
        labels = (("code", "200"), ("route", "/v1/completions"), ("variant", "dense"))
        assert metrics["cast_requests_total", labels] == 0
        assert metrics["cast_shadow_requests_total", (("outcome", "finished"),)] >= 1


def test_the_description_knows_every_route_and_no_422() -> None:
    with running() as stack:
        schema = stack.client.get("/openapi.json").json()
        assert schema["openapi"].startswith("3.1")
        completions = schema["paths"]["/v1/completions"]["post"]
        assert set(completions["responses"]) == {
            *("200", "400", "401", "404", "408", "413", "429", "431", "500", "502", "503", "504")
        }
        model = schema["paths"]["/v1/models/{name}"]["get"]
        assert set(model["responses"]) == {"200", "401", "404", "431", "500"}
        reference = completions["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/CompletionBody"
        fields = schema["components"]["schemas"]["CompletionBody"]["properties"]
        assert fields["model"]["enum"] == ["dense", "sparse"]
        assert "422" not in json.dumps(schema)
        metrics = schema["paths"]["/metrics"]["get"]["responses"]["200"]
        assert set(metrics["content"]) == {"text/plain"}
        assert "content" not in schema["paths"]["/livez"]["get"]["responses"]["200"]
        assert "content" in schema["paths"]["/readyz"]["get"]["responses"]["503"]
