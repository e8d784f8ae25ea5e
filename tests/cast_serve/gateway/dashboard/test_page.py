"""The page at /: its files, its policy, keys, the keyboard, a gateway that is not ready or ends."""

import tomllib
from pathlib import Path

import httpx
import uvicorn
from playwright.sync_api import expect

from cast_serve.gateway.dashboard.page import FILES, HEADERS, STATIC
from tests.browser import Watched
from tests.cast_serve.gateway.dashboard.fake_gateway import FakeGateway, column

ROOT = Path(__file__).parents[4]


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
