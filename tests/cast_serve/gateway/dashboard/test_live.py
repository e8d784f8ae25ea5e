"""The verdict, speed-ups, agreement and charts of live traffic."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import Watched
from tests.cast_serve.gateway.dashboard.fake_gateway import FakeGateway, column


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


def test_a_ratio_without_an_interval_is_no_verdict(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.has_interval = False
    page = watched.page
    page.goto(url)
    cards = page.locator("#speedups article")
    expect(cards.nth(1)).to_contain_text("1.31×")
    expect(
        cards.get_by_text("an interval needs 20 streamed requests of each variant")
    ).to_have_count(2)
    expect(cards.get_by_text("an interval needs 20 requests")).to_have_count(2)
    expect(page.locator("#verdict")).to_have_text(
        "No verdict yet: an interval needs 20 streamed requests of each variant."
    )
    expect(cards.get_by_text("faster")).to_have_count(0)


def test_without_traffic_the_page_says_so(url: str, gateway: FakeGateway, watched: Watched) -> None:
    gateway.has_traffic = False
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    expect(page.locator("#speedups").get_by_text("waiting for traffic")).to_have_count(4)
    expect(page.locator("#charts").get_by_text("waiting for traffic")).to_have_count(4)


@pytest.mark.parametrize(
    ("tpot", "state", "text"),
    [
        ((1.31, 1.2, 1.37), "is-better", "sparse is faster per token: 1.31× (1.20 to 1.37)."),
        ((1.02, 0.98, 1.05), "is-even", "No clear difference per token: 1.02× (0.98 to 1.05)"),
        ((1.02, 1.0, 1.05), "is-even", "No clear difference per token: 1.02× (1.00 to 1.05)"),
        ((0.8, 0.7, 0.9), "is-worse", "sparse is slower per token: 0.80× (0.70 to 0.90)."),
    ],
)
def test_the_verdict_is_green_only_beyond_the_interval(
    url: str,
    gateway: FakeGateway,
    watched: Watched,
    tpot: tuple[float, float, float],
    state: str,
    text: str,
) -> None:
    gateway.tpot = tpot
    page = watched.page
    page.goto(url)
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text(text)
    expect(verdict).to_have_class(f"verdict {state}")
    card = page.locator("#speedups article").nth(1)
    expect(card).to_have_class(f"card {state}")
    expect(card).to_contain_text(f"95 % interval {tpot[1]:.2f} to {tpot[2]:.2f}")
    colours = {
        name: verdict.evaluate(f"e => getComputedStyle(e).getPropertyValue('--{name}')")
        for name in ("state", "accent")
    }
    assert (colours["state"] == colours["accent"]) == (state == "is-better")


def test_agreement_says_that_it_is_off(url: str, gateway: FakeGateway, watched: Watched) -> None:
    gateway.shadow_fraction = 0
    page = watched.page
    page.goto(url)
    off = "off: set CAST_SHADOW_FRACTION"
    expect(page.locator("#speedups article").nth(3)).to_contain_text(off)
    expect(page.locator("#charts figcaption").nth(3)).to_have_text(off)
    expect(page.locator("#charts figcaption").nth(0)).to_contain_text("dense")


def test_a_canary_shows_its_share(url: str, gateway: FakeGateway, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    expect(page.locator("#window")).to_contain_text("So far: ")
    expect(page.locator("#window")).not_to_contain_text("Canary")
    gateway.canary = {"variant": "sparse", "model": "default", "share": 0.05, "state": "raising"}
    expect(page.locator("#window")).to_contain_text("Canary: sparse gets 5 % of default, raising.")
