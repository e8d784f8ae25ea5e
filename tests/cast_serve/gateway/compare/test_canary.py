"""The canary's share by simulated traffic on a fake clock, and one gateway that moves its own."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from cast_serve.gateway.app import create_app
from cast_serve.gateway.compare.agreement import Agreement
from cast_serve.gateway.compare.canary import Canary, _log_ratio
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.router import Router
from cast_serve.gateway.settings import CanaryPlan, GatewaySettings
from cast_serve.gateway.upstream.replica import Replica, Variant
from cast_serve.gateway.upstream.variants import remote_variants
from cast_serve.guard import Guard
from cast_serve.latency import RequestTiming
from tests.cast_serve.gateway.stack import running

COMPLETIONS = "/v1/completions"
BLOCK_S = 60.0


class Traffic:
    """A canary, and requests of its split: lognormal times, sent to either variant by chance."""

    def __init__(
        self,
        steps: list[float],
        seed: int = 0,
        names: tuple[str, str] = ("stable", "canary"),
        **guard: Any,
    ) -> None:
        self.shares = dict.fromkeys(names, 0.5)
        self.now_s = 0.0
        plan = CanaryPlan("default", "canary", steps)
        self.canary = Canary(plan, self.shares, Guard.of(guard), BLOCK_S, lambda: self.now_s)
        self.rng = np.random.default_rng(seed)
        self.canary.begin()

    def send(self, num: int, slowdown: float = 1.0, error_rate: float = 0.0) -> None:
        """One block of requests; the canary's fail, or are slower, as given."""
        is_canary = self.rng.random(num) < self.shares["canary"]
        has_failed = is_canary & (self.rng.random(num) < error_rate)
        e2e_s = np.exp(self.rng.normal(0, 0.5, num)) * np.where(is_canary, slowdown, 1)
        for each in zip(is_canary.tolist(), has_failed.tolist(), e2e_s.tolist(), strict=True):
            ours, failed, seconds = each
            self.end("canary" if ours else "stable", 503 if failed else 200, e2e_s=seconds)
        self.now_s += BLOCK_S

    def run(self, num_blocks: int, num: int, **harm: float) -> str:
        """The state after that many blocks, or once it is rolled back."""
        for _ in range(num_blocks):
            self.send(num, **harm)
            if self.canary.state == "rolled back":
                break
        return self.canary.state

    def end(
        self,
        variant: str,
        status: int,
        answered_by: str | None = None,
        model: str = "default",
        route: str = COMPLETIONS,
        e2e_s: float = 1.0,
    ) -> None:
        if answered_by is None:
            answered_by = variant if status == 200 else ""
        exchange = Exchange(route, False, body={"model": model}, variant=variant)
        exchange.answered_by, exchange.status = answered_by, status
        exchange.timing = RequestTiming(0.0, (), e2e_s, 8) if answered_by else None
        self.canary.observe(exchange)

    def check(self, name: str) -> dict[str, Any]:
        (found,) = (each for each in self.canary.about()["checks"] if each["name"] == name)
        return dict(found)


@pytest.mark.parametrize(
    ("guard", "harm"),
    [
        ({"max_slowdown": {"e2e_p50": 1.1}, "max_error_rate": 1}, {"slowdown": 1.1}),
        ({"max_error_rate": 0.05}, {"error_rate": 0.05}),
    ],
)
def test_a_canary_at_its_limit_is_rarely_rolled_back(
    guard: dict[str, Any], harm: dict[str, float]
) -> None:
    states = [Traffic([0.5], seed, **guard).run(20, 24, **harm) for seed in range(300)]
    assert states.count("rolled back") <= 15


def test_a_canary_that_stays_within_its_limit_stays() -> None:
    """At the last share the evidence begins anew a hundred times, each a chance of an alarm."""
    states = [
        Traffic([1], seed, max_error_rate=0.02).run(500, 50, error_rate=0.01) for seed in range(40)
    ]
    assert states.count("rolled back") <= 2


def test_a_variant_with_few_requests_does_not_look_faster_in_the_tail() -> None:
    """p95 of 25 values lies 8 % below that of 225, so only as many of either are compared."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(500):
        stable, few = ([{"e2e": (s,)} for s in rng.lognormal(0, 0.5, num)] for num in (225, 25))
        found.append(_log_ratio("e2e_p95", stable, few))
    assert np.mean(np.array(found, float)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("harm", "broken"),
    [({"slowdown": 2.0}, "max_slowdown.e2e_p50"), ({"error_rate": 0.05}, "error_rate")],
)
def test_a_harmful_canary_is_rolled_back_for_good(
    harm: dict[str, float], broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_slowdown": {"e2e_p50": 1.2}, "max_error_rate": 0.01}
    traffic = Traffic([0.1, 0.5, 1], **limits)
    assert traffic.run(40, 200, **harm) == "rolled back"
    assert traffic.shares == {"stable": 1.0, "canary": 0.0}
    assert traffic.check(broken)["verdict"] == "fail"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"canary is rolled back from 0.1 of default to 0: {broken}: " in record.message
    traffic.canary.forget("canary")
    traffic.run(10, 200)
    assert (traffic.canary.state, traffic.shares["canary"]) == ("rolled back", 0)


def test_a_good_canary_reaches_its_last_share_and_is_still_watched() -> None:
    limits = {"max_slowdown": {"e2e_p50": 1.2, "e2e_p95": 1.5}, "max_error_rate": 0.01}
    traffic = Traffic([0.1, 0.5, 1], min_speedup={"e2e_p50": 1.0}, **limits)
    seen = []
    for _ in range(40):
        traffic.send(250, slowdown=0.7)
        seen.append(traffic.shares["canary"])
    assert sorted(set(seen)) == [0.1, 0.5, 1]
    assert seen == sorted(seen)
    assert seen[4] == 0.1  # five blocks have not ended yet
    assert traffic.canary.state == "last share"
    assert [check["name"] for check in traffic.canary.about()["checks"]] == ["error_rate"]
    assert traffic.run(3, 250, error_rate=0.1) == "rolled back"


def test_too_few_answers_decide_nothing() -> None:
    traffic = Traffic([0.5, 1], max_slowdown={"e2e_p95": 1.1}, max_error_rate=1)
    traffic.run(20, 6, slowdown=2)
    assert traffic.canary.about()["num_blocks"] == 0
    traffic.run(20, 24, slowdown=2)
    found = traffic.canary.about()
    assert (found["state"], found["share"]) == ("raising", 0.5)
    assert found["num_blocks"] > 10
    assert traffic.check("max_slowdown.e2e_p95") == {
        "name": "max_slowdown.e2e_p95",
        "limit": 1.1,
        "found": None,
        "verdict": "inconclusive",
        "why": "0 of 5 blocks; one needs 20 answers of each variant that have this time",
    }


@pytest.mark.parametrize(
    ("request_", "is_failure"),
    [
        ({"status": 503}, True),
        ({"status": 200, "answered_by": "stable"}, True),
        ({"status": 504}, False),
        ({"status": 429}, False),
        ({"status": 499}, False),
        ({"status": 400}, False),
        ({"status": 503, "route": "/tokenize"}, False),
        ({"status": 503, "model": "canary"}, False),
        ({"status": 503, "variant": "stable"}, False),
    ],
)
def test_what_a_failure_is(request_: dict[str, Any], is_failure: bool) -> None:
    """Without max_error_rate one is too many; its fallback's answers are not credited to it."""
    traffic = Traffic([0.5, 1], max_slowdown={"e2e_p50": 1.0})
    traffic.end(**{"variant": "canary", **request_})
    assert (traffic.canary.state == "rolled back") == is_failure
    traffic.now_s += BLOCK_S
    traffic.end("stable", 200)
    assert traffic.check("error_rate")["found"] == (1 if is_failure else None)


@pytest.mark.parametrize(("agreeing", "share"), [(0.95, 1), (0.8, 0), (0.9, 0.5)])
def test_agreement_of_answers_of_one_token(agreeing: float, share: float) -> None:
    """At the limit, five prompts that happen to agree prove nothing."""
    traffic = Traffic([0.5, 1], min_token_agreement=0.9)
    for _ in range(40):
        traffic.send(40)
        for agrees in (traffic.rng.random(20) < agreeing).tolist():
            traffic.canary.observe_agreement(Agreement(1, agrees, 0.0, None, None))
        traffic.canary.observe_agreement(Agreement(0, 0, 0.0, 2.0, 2.0))  # of a chat
    assert traffic.shares["canary"] == share


def test_another_model_starts_at_the_first_share() -> None:
    traffic = Traffic([0.2, 0.6, 1], max_error_rate=0.5)
    traffic.run(8, 50)
    assert traffic.shares["canary"] == 0.6
    traffic.canary.forget("dense")
    assert traffic.shares["canary"] == 0.6
    traffic.canary.forget("canary")
    assert traffic.shares["canary"] == 0.2
    assert traffic.canary.about()["num_blocks"] == 0


@pytest.mark.parametrize("names", [("stable", "canary"), ("canary", "stable")])
def test_sticky_clients_stay_on_the_canary(names: tuple[str, str]) -> None:
    traffic = Traffic([0.1, 0.4, 1], names=names, max_error_rate=0.5)
    variants = {name: Variant(name, [Replica(name, "http://127.0.0.1:9")]) for name in names}
    router = Router(variants, {"default": traffic.shares}, {})

    def on_canary() -> set[str]:
        clients = [f"client {number}" for number in range(500)]
        return {each for each in clients if router.choose("default", each).name == "canary"}

    seen = [on_canary()]
    for _ in range(2):
        traffic.run(6, 100)
        seen.append(on_canary())
    assert seen[0] < seen[1] < seen[2]
    assert [round(len(clients) / 50) for clients in seen] == [1, 4, 10]


GUARD = "max_slowdown = {e2e_p50 = 1000}\n"


def settings(tmp_path: Path, guard: str = GUARD, **given: Any) -> GatewaySettings:
    path = tmp_path / "guard.toml"
    path.write_text(guard)
    defaults = {"split": "default=dense:1,sparse:0", "canary": "default=sparse:0.5,1"}
    return GatewaySettings(**{**defaults, "canary_guard": path, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"canary": "default=sparse"}, "'default=sparse' is not SPLIT=VARIANT:SHARE"),
        ({"canary": "default=sparse:"}, "is not SPLIT=VARIANT:SHARE"),
        ({"canary": "default=sparse:0,1"}, "ascending shares above 0 and up to 1"),
        ({"canary": "default=sparse:0.5,0.5"}, "ascending shares above 0 and up to 1"),
        ({"canary": "default=sparse:0.5,1.5"}, "ascending shares above 0 and up to 1"),
        ({"canary": "default=sparse:nan"}, "ascending shares above 0 and up to 1"),
        ({"canary": "other=sparse:1"}, "needs a split 'other' of 'sparse' and one other"),
        ({"canary": "default=spare:1"}, "needs a split 'default' of 'spare' and one other"),
        ({"split": "default=sparse:1"}, "and one other variant, but split is 'default=sparse:1'"),
        ({"split": "default=dense:1,sparse:1,third:1"}, "of 'sparse' and one other variant, but"),
        ({"canary_guard": None}, "has no limits to keep to; give canary_guard"),
        ({"canary_interval_s": 0}, "greater than 0"),
        ({"guard": "min_sped = 1"}, "guard .*: unknown key 'min_sped'"),
        ({"guard": "max_accuracy_loss = 0"}, "live traffic cannot measure max_accuracy_loss; take"),
        ({"guard": "allow_void = true"}, "live traffic cannot measure allow_void"),
        ({"guard": "min_speedup = {throughput = 1}"}, "cannot measure min_speedup.throughput"),
        ({"guard": "max_slowdown = {goodput = 1}"}, "cannot measure max_slowdown.goodput"),
        ({"guard": "min_token_agreement = 0.5"}, "is 0.5, but shadow_fraction is 0 and shadow"),
        ({"guard": "max_error_rate = 1"}, "limits nothing; give, for example, max_error_rate"),
        ({"canary": ""}, "has no effect without canary"),
        ({"fallback": "dense=sparse"}, "fallback dense=sparse would have the canary answer after"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    variants = remote_variants({name: [f"http://{name}:1"] for name in ("dense", "sparse")})
    with pytest.raises(ValueError, match=message):
        create_app(variants, settings(tmp_path, **given))


def test_agreement_needs_shadow_traffic_of_the_canary(tmp_path: Path) -> None:
    agreement = {"guard": "min_token_agreement = 0.5", "shadow_fraction": 0.5}
    urls = {name: [f"http://{name}:1"] for name in ("dense", "other", "sparse")}
    with pytest.raises(ValueError, match="compares 'dense' with 'other', where the canary is com"):
        create_app(remote_variants(urls), settings(tmp_path, **agreement))
    del urls["other"]
    create_app(remote_variants(urls), settings(tmp_path, **agreement))


def test_until_both_variants_are_up_the_canary_gets_nothing(tmp_path: Path) -> None:
    variants = remote_variants({name: [f"http://{name}:1"] for name in ("dense", "sparse")})
    client = TestClient(create_app(variants, settings(tmp_path)))  # without its lifespan
    shown = client.get("/v1/comparison").json()["canary"]
    assert (shown["state"], shown["share"]) == ("waiting", 0)
    off = TestClient(create_app(variants, GatewaySettings()))
    assert off.get("/v1/comparison").json()["canary"] is None


def test_a_gateway_raises_its_canary_and_rolls_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path).model_dump(include={"split", "canary", "canary_guard"})
    of_canary = (("model", "default"), ("variant", "sparse"))
    with running(**given, canary_interval_s=BLOCK_S) as stack:
        canary, now_s = stack.gateway.canary, 0.0
        assert canary is not None
        assert stack.client.get("/v1/models/default").json()["split"]["sparse"] == 0.5
        monkeypatch.setattr(canary, "_clock", lambda: now_s)
        canary.begin()
        for _ in range(5):
            for number in range(16):
                answer = stack.complete(model="default", user=f"user {number}")
                assert answer.status_code == 200
            now_s += BLOCK_S
        stack.complete(model="default")
        shown = stack.client.get("/v1/comparison").json()["canary"]
        assert (shown["model"], shown["variant"]) == ("default", "sparse")
        assert (shown["state"], shown["share"], shown["num_blocks"]) == ("last share", 1, 0)
        assert [check["name"] for check in shown["checks"]] == ["error_rate"]
        assert stack.metrics()["cast_canary_share", of_canary] == 1
        assert stack.metrics()["cast_canary_rollbacks_total", of_canary] == 0

        stack.workers["sparse"].state.error_at = 1  # in a stream that has begun
        stack.complete(model="default", stream=True)
        shown = stack.client.get("/v1/comparison").json()["canary"]
        assert (shown["state"], shown["share"]) == ("rolled back", 0)
        assert "1 of 1 requests failed" in shown["checks"][0]["why"]
        assert stack.metrics()["cast_canary_share", of_canary] == 0
        assert stack.metrics()["cast_canary_rollbacks_total", of_canary] == 1
        assert stack.complete(model="default").headers["X-Cast-Variant"] == "dense"
