"""How the page looks, wide and narrow, light and dark, and axe's rules."""

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import LOOKS, Watched, picture, violations, wider_than_the_window
from tests.cast_serve.gateway.dashboard.fake_gateway import FakeGateway


@pytest.mark.parametrize(("look", "width", "scheme"), LOOKS)
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
    page.clock.resume()
    picture(page, tmp_path, f"dashboard-{look}")
    assert violations(page) == []

    folds = page.locator(".fold")
    assert folds.count() == 2
    for fold in folds.all():
        is_folded = not fold.locator("> div").is_visible()
        assert is_folded == fold.locator("summary").is_visible() == (width < 640)
        if is_folded:
            fold.locator("summary").click()
    expect(page.locator("#charts polyline").first).to_be_visible()
    expect(page.locator("#sparsity")).to_be_visible()
    if width < 640:
        picture(page, tmp_path, f"dashboard-{look}-unfolded")
        assert violations(page) == []

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert wider_than_the_window(page) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", background))) < 3 * 128
    assert is_dark == (scheme == "dark")
    moving = "getComputedStyle(document.getElementById('start')).transitionDuration"
    assert page.evaluate(moving) == "0s"


def test_axe_finds_what_is_wrong(watched: Watched) -> None:
    watched.page.set_content(
        "<html lang=en><title>t</title><main><h1>h</h1><img src=data:,></main>"
    )
    (found,) = violations(watched.page)
    assert found.startswith("image-alt:")
