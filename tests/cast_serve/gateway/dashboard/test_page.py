"""The page at /, in Debian's Chromium, before a gateway that says what a test wants to see."""

import asyncio
import itertools
import json
import os
import re
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cast_serve.gateway.dashboard.page import FILES, HEADERS, STATIC, router
from tests.programs import need

ROOT = Path(__file__).parents[4]
WORDS = {
    "dense": " Paris, a city on the Seine, and it has been the seat of kings and of parliaments "
    "for the better part of a thousand years.",
    "sparse": " Paris, a city on the Seine, and it has been the home of painters and of "
    "publishers for as long as anyone cares to remember.",
}
INFO = """\
# TYPE cast_variant_info gauge
cast_variant_info{variant="dense",pattern="",kernel="onednn",isa="AVX-512 BF16",dtype="bfloat16",\
head="bfloat16",num_sparse_layers="0",num_dense_layers="211",\
weight_bytes="212336640",dense_weight_bytes="212336640"} 1.0
cast_variant_info{variant="sparse",pattern="2:4",kernel="a \\"quoted\\" one",isa="avx512_bf16",\
dtype="bfloat16",head="int8",num_sparse_layers="210",num_dense_layers="1",\
weight_bytes="66666240",dense_weight_bytes="212336640"} 1.0
cast_requests_in_flight{variant="dense"} 0.0
"""


class FakeGateway:
    """What the page talks to; a test sets the attributes."""

    def __init__(self) -> None:
        self.key = ""
        self.ready: dict[str, bool | str] = {"dense": True, "sparse": True}
        self.has_traffic = True
        self.has_interval = True
        self.gap_s = {"dense": 0.006, "sparse": 0.004}
        self.refusal: dict[str, Any] = {}  # variant -> error object, as the response
        self.broken: dict[str, Any] = {}  # variant -> error object, as an event after 3 tokens
        self.fallback: dict[str, str] = {}  # variant -> the one that answers instead
        self.bodies: list[dict[str, Any]] = []
        self.num_polls = 0
        self.left: list[str] = []  # variants whose client left early

    def comparison(self) -> dict[str, Any]:
        if not self.has_traffic:
            return {"baseline": "dense", "candidate": "sparse", "window": 512,
                    "variants": {"dense": {"num_requests": 0, "ttft_s": None}},
                    "speedups": {}, "agreement": None}  # fmt: skip
        self.num_polls += 1
        wave = (1, 1.04, 0.97, 1.08, 1.01, 0.94, 1.02)[self.num_polls % 7]

        def latencies(ttft_s: float, tpot_s: float, rate: float) -> dict[str, Any]:
            def quantiles(p50: float) -> dict[str, float]:
                return {"p50": p50, "p95": 1.4 * p50, "p99": 1.6 * p50, "n": 40}

            return {
                "num_requests": 40 + self.num_polls,
                "ttft_s": quantiles(ttft_s * wave),
                "itl_s": quantiles(tpot_s),
                "tpot_s": quantiles(tpot_s / wave),
                "e2e_s": quantiles(ttft_s + 40 * tpot_s),
                "output_tokens_per_s": quantiles(rate * wave),
            }

        def ratio(value: float, low: float, high: float) -> dict[str, float]:
            interval = {"low": low, "high": high, "confidence": 0.95}
            return {"ratio": value} | (interval if self.has_interval else {})

        return {
            "baseline": "dense",
            "candidate": "sparse",
            "window": 512,
            "variants": {
                "dense": latencies(0.5526, 0.0667, 12.3),
                "sparse": latencies(0.5433, 0.0510, 14.7),
            },
            "speedups": {
                "ttft": {"p50": ratio(1.03, 0.96, 1.1), "p95": ratio(0.99, 0.8, 1.2)},
                "tpot": {"p50": ratio(1.31, 1.2, 1.37), "p95": ratio(1.24, 1.11, 1.4)},
                "e2e": {"p50": ratio(0.85, 0.8, 0.9), "p95": None},
            },
            "agreement": {
                "token_agreement": {
                    "mean": 0.874 * wave / 1.08,
                    **({"low": 0.861, "high": 0.887} if self.has_interval else {}),
                    "n_requests": 31,
                    "n_tokens": 1984,
                },
                "kl_nats": {"mean": 0.0312},
            },
        }

    async def events(self, variant: str, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            words = re.findall(r"\s?\S+", WORDS[variant])[: body["max_tokens"]]
            for number, word in enumerate(words):
                await asyncio.sleep(self.gap_s[variant])
                if number == 3 and variant in self.broken:
                    yield f"data: {json.dumps({'error': self.broken[variant]})}\n\n"
                    return
                last = number == len(words) - 1
                choice = {"index": 0, "text": word, "finish_reason": "length" if last else None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": 5, "completion_tokens": 2 * len(words)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.append(variant)
            raise

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router())

        @app.middleware("http")
        async def check_key(request: Request, call_next: Any) -> Response:
            is_open = request.url.path in (*FILES, "/readyz")
            if is_open or request.headers.get("authorization", "") in (
                f"Bearer {self.key}",
                self.key,
            ):
                return await call_next(request)  # type: ignore[no-any-return]
            return JSONResponse({"error": {"message": "give an API key"}}, 401)

        @app.get("/readyz")
        async def readyz() -> JSONResponse:
            return JSONResponse(self.ready, 200 if set(self.ready.values()) == {True} else 503)

        @app.get("/v1/comparison")
        async def comparison() -> dict[str, Any]:
            return self.comparison()

        @app.get("/metrics")
        async def metrics() -> PlainTextResponse:
            return PlainTextResponse(INFO)

        @app.post("/v1/completions")
        async def completions(body: dict[str, Any]) -> Response:
            self.bodies.append(body)
            if error := self.refusal.get(body["model"]):
                return JSONResponse({"error": error}, 429)
            variant = self.fallback.get(body["model"], body["model"])
            headers = {"X-Cast-Variant": variant}
            events = self.events(variant, body)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")

        return app


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def server(gateway: FakeGateway) -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(gateway.app(), port=0, log_level="warning", ws="none")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture
def url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = need("chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=20_000)  # the machine may be busy
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


WATCH = """document.addEventListener("securitypolicyviolation", (event) =>
    console.error(`content policy: ${event.violatedDirective} ${event.blockedURI}`))"""


class Watched:
    """A page and whatever its console called an error."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.add_init_script(WATCH)
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def expect_problems(self, pattern: str) -> None:
        """Takes the problems that match out, of which there must be some."""
        found = [problem for problem in self.problems if re.search(pattern, problem)]
        assert found, self.problems
        self.problems = [problem for problem in self.problems if problem not in found]


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """Fails the test for every problem that it did not expect."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    watched = Watched(page)
    yield watched
    page.close()
    assert watched.problems == []


def column(page: Page, variant: str) -> Any:
    return page.locator(f"#columns [data-variant={variant}]")


def figure(page: Page, variant: str, name: str) -> float:
    pair = column(page, variant).locator("dl > div").filter(has=page.get_by_text(name, exact=True))
    return float(pair.locator("dd").inner_text().removesuffix(" ms"))


def test_every_file_is_served_under_the_policy(url: str) -> None:
    for path, (name, media_type) in FILES.items():
        for method in ("GET", "HEAD"):
            response = httpx.request(method, url.rstrip("/") + path)
            assert response.status_code == 200
            assert response.headers["content-type"] == f"{media_type}; charset=utf-8"
            assert {key: response.headers[key] for key in HEADERS} == HEADERS
        assert httpx.get(url.rstrip("/") + path).content == (STATIC / name).read_bytes()


def test_every_file_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = "cast_serve.gateway.dashboard"
    patterns = setuptools["package-data"][package]
    folder = ROOT / package.replace(".", "/")
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert set(STATIC.iterdir()) <= packed
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in FILES.values()}


def test_both_variants_stream_side_by_side(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    page = watched.page
    page.goto(url)
    page.get_by_label("Example").select_option(label="A question")
    expect(page.get_by_label("Prompt")).to_have_value("Question: Why is the sky blue?\nAnswer:")
    page.get_by_label("Max tokens").fill("20")
    page.get_by_label("Prompt").fill("The capital of France is")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#outcome")).to_contain_text("Above 1, sparse is faster.")
    for name in ("dense", "sparse"):
        words = re.findall(r"\s?\S+", WORDS[name])[:20]
        assert column(page, name).locator(".answer").text_content() == "".join(words).strip()
        expect(column(page, name)).to_contain_text("done")
        assert figure(page, name, "TTFT") > 0
        assert figure(page, name, "tokens/s") > 0
        assert figure(page, name, "tokens") == 40  # as usage says, not one per event
    assert re.findall(r"(TTFT|TPOT|tokens/s)(?:\n|\s)*\d+\.\d\d×", page.inner_text("#outcome"))
    expect(page.locator("#outcome")).to_contain_text("the same for 49 characters")
    assert sorted(body["model"] for body in gateway.bodies) == ["dense", "sparse"]
    assert gateway.bodies[0] | {"model": ""} == {
        "model": "",
        "prompt": "The capital of France is",
        "max_tokens": 20,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_keyboard_is_enough_and_stop_stops(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.gap_s["dense"] = 60
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(column(page, "sparse")).to_contain_text("done")
    expect(column(page, "dense")).to_contain_text("waiting for the first token")
    page.keyboard.press("Enter")
    expect(column(page, "dense")).to_contain_text("stopped")
    expect(page.locator("#outcome")).to_contain_text("No ratio")
    expect(page.get_by_role("button", name="Compare")).to_be_focused()
    for _ in range(500):
        if gateway.left:
            break
        time.sleep(0.01)
    assert gateway.left == ["dense"]


def test_every_stop_of_the_tab_key_has_a_name_and_a_visible_focus(
    url: str, watched: Watched
) -> None:
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    stops = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused = page.locator(":focus-visible")
        assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        stops.append(
            focused.evaluate("e => e.ariaLabel ?? e.labels?.[0]?.firstChild.data.trim() ?? ''")
            or focused.inner_text()
        )
    assert stops == [
        *("Example", "Max tokens", "Prompt", "Compare", "Answer of dense", "Answer of sparse")
    ]


def test_charts_fill_after_two_polls(url: str, gateway: FakeGateway, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    charts = page.locator("#charts").get_by_role("img")
    expect(charts).to_have_count(4)
    for chart, num_lines in zip(charts.all(), (2, 2, 2, 1), strict=True):
        expect(chart.locator("polyline")).to_have_count(num_lines)
        expect(chart.locator("polyline").first).to_have_attribute(
            "points", re.compile(r"^\S+ \S+( \S+)*$")
        )
    expect(charts.nth(0)).to_have_attribute(
        "aria-label", re.compile(r"^TTFT p50, latest: dense \d{3} ms, sparse \d{3} ms$")
    )
    expect(charts.nth(3)).to_have_attribute("aria-label", re.compile(r"latest: sparse [\d.]+ %"))
    assert gateway.num_polls >= 2


def test_speedups_say_who_is_faster_in_words(url: str, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    ttft, tpot, e2e, agreement = page.locator("#speedups article").all()
    expect(ttft).to_contain_text("no clear difference")
    expect(tpot).to_contain_text("sparse is faster")
    expect(tpot).to_contain_text("1.31×")
    expect(tpot).to_contain_text("95 % interval 1.20 to 1.37")
    expect(tpot).to_contain_text("p95 1.24×, 1.11 to 1.40")
    expect(e2e).to_contain_text("dense is faster")
    expect(agreement).to_contain_text("interval 86.1 to 88.7 %")
    expect(agreement).to_contain_text("KL 0.0312 nats")


def test_a_ratio_without_an_interval_is_no_verdict(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.has_interval = False
    page = watched.page
    page.goto(url)
    cards = page.locator("#speedups article")
    expect(cards.nth(1)).to_contain_text("1.31×")
    expect(cards.get_by_text("too few requests for an interval")).to_have_count(4)
    expect(cards.get_by_text("faster")).to_have_count(0)


def test_what_is_served_comes_from_the_metrics(url: str, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    card = page.locator("#sparsity [data-variant=sparse]")
    for text in ('a "quoted" one', "avx512_bf16", "2:4", "210 sparse, 1 dense"):
        expect(card).to_contain_text(text)
    expect(card).to_contain_text("66.7 MB of 212.3 MB dense (0.314)")
    for text in ("Headint8", "Bits a weight5.02"):
        expect(card).to_contain_text(text)
    dense = page.locator("#sparsity [data-variant=dense]")
    for text in ("0 sparse, 211 dense", "Headbfloat16", "Bits a weight16"):
        expect(dense).to_contain_text(text)


def test_without_traffic_the_page_says_so(url: str, gateway: FakeGateway, watched: Watched) -> None:
    gateway.has_traffic = False
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    expect(page.locator("#speedups").get_by_text("waiting for traffic")).to_have_count(4)
    expect(page.locator("#charts").get_by_text("waiting for traffic")).to_have_count(4)


def test_a_variant_that_is_not_ready_is_told_in_words(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.ready["sparse"] = False
    page = watched.page
    page.goto(url)
    readiness = page.get_by_role("list", name="Variants").get_by_role("listitem")
    expect(readiness).to_have_text(["dense ready", "sparse not ready"])
    gateway.ready["sparse"] = "loading, 130 s so far"
    expect(readiness).to_have_text(["dense ready", "sparse loading, 130 s so far"])
    gateway.ready["sparse"] = True
    expect(readiness).to_have_text(["dense ready", "sparse ready"])
    watched.expect_problems("503")


def test_a_gateway_with_keys_is_asked_for_one_and_goes_on(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.key = "sk-right"
    page = watched.page
    page.goto(url)
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    page.get_by_role("button", name="Compare").click()  # waits for the key as well
    field.fill("sk-wrong")
    field.press("Enter")
    expect(page.get_by_text("The gateway refused that key")).to_be_visible()
    assert gateway.bodies == []
    field.fill("sk-right")
    field.press("Enter")
    expect(field).to_be_hidden()
    expect(page.locator("#outcome")).to_contain_text("Above 1, sparse is faster.")
    expect(page.locator("#speedups")).to_contain_text("1.31×")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        *(0, 0, "")
    ]
    watched.expect_problems("401")


def test_an_error_event_stands_in_its_variants_column(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.broken["sparse"] = {"message": "variant 'sparse' <b>left</b>", "type": "server_error"}
    page = watched.page
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    expect(column(page, "dense")).to_contain_text("done")
    expect(column(page, "sparse")).to_contain_text("failed")
    answer = column(page, "sparse").locator(".answer")
    expect(answer).to_have_text("Paris, a cityError: variant 'sparse' <b>left</b>")
    expect(page.locator("#outcome")).to_contain_text("No ratio")


def test_an_error_object_stands_in_its_variants_column(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.refusal["dense"] = {"message": "the queue is full", "type": "rate_limit_error"}
    page = watched.page
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    expect(column(page, "dense")).to_contain_text("Error: the queue is full")
    expect(column(page, "sparse")).to_contain_text("done")
    watched.expect_problems("429")


def test_a_fallback_does_not_pass_for_the_variant(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.fallback["sparse"] = "dense"
    page = watched.page
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    expect(column(page, "sparse")).to_contain_text("dense answered instead")
    expect(page.locator("#outcome")).to_contain_text("No ratio")


def test_a_gateway_that_ends_is_noticed(url: str, server: uvicorn.Server, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    server.should_exit = True
    expect(page.locator("#trouble")).to_have_text("The gateway does not answer. Trying again.")
    expect(page.locator("#readiness")).to_have_text("dense unknownsparse unknown")
    watched.expect_problems("ERR_")


def test_the_watch_sees_what_the_policy_forbids(url: str, watched: Watched) -> None:
    watched.page.goto(url)
    watched.page.evaluate("document.body.setAttribute('style', 'color: red')")
    watched.page.wait_for_function("1")
    watched.expect_problems("content policy: style-src")
    watched.problems.clear()  # the browser's own words for it


@pytest.mark.parametrize(
    ("look", "width", "scheme"),
    [("light", 1280, "light"), ("dark", 1280, "dark"), ("mobile", 360, "light")],
)
def test_it_looks_right(
    url: str,
    gateway: FakeGateway,
    watched: Watched,
    tmp_path: Path,
    look: str,
    width: int,
    scheme: Any,
) -> None:
    page = watched.page
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.clock.install()
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#outcome")).to_contain_text("Above 1")
    expect(page.locator("#sparsity")).to_contain_text("2:4")
    for _ in range(30):  # a minute of polls, without waiting for it
        with page.expect_response("**/v1/comparison"):
            page.clock.run_for(2000)
    expect(page.locator("#charts polyline").first).to_be_visible()
    folder = Path(os.environ.get("CAST_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"dashboard-{look}.png", full_page=True, caret="initial")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.unseen') &&"
        " e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)"
    )
    assert wide == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", background))) < 3 * 128
    assert is_dark == (scheme == "dark")
    moving = "getComputedStyle(document.getElementById('start')).transitionDuration"
    assert page.evaluate(moving) == "0s"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_aa(scheme: str) -> None:
    rules = (STATIC / "dashboard.css").read_text().split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): #(\w{6});", rules[scheme == "dark"]))

    def luminance(name: str) -> float:
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (value / 255 for value in bytes.fromhex(colours[name]))
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one: str, other: str) -> float:
        darker, lighter = sorted((luminance(one), luminance(other)))
        return (lighter + 0.05) / (darker + 0.05)

    text = ("ink", "muted", "accent", "error")
    for one, other in [
        *itertools.product(text, ("page", "surface", "wash")),
        ("on-accent", "accent"),
    ]:
        assert contrast(one, other) >= 4.5, (one, other)
    for name in ("edge", "v0", "v1", "v2", "v3"):  # borders of controls, and lines
        assert contrast(name, "surface") >= 3, name
