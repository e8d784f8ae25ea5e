"""Debian's Chromium, pages that tell what went wrong in them, their pictures, and axe's judgement.

The fixtures are for a conftest.py to import.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.programs import need

LOOKS = [
    (f"{device}-{scheme}", width, scheme)
    for device, width in (("desktop", 1280), ("phone", 360))
    for scheme in ("light", "dark")
]
"""Name, width of the window, colour scheme."""


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


def violations(page: Page) -> list[str]:
    """The rules that a page breaks, by axe, and where; of what is shown."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {[node['target'] for node in rule['nodes']]}" for rule in found]


def wider_than_the_window(page: Page) -> list[str]:
    """Elements that stick out to the right, but for what scrolls inside its box."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.unseen, .scrolls *') &&"
        " e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)"
    )
    return found


def picture(page: Page, tmp_path: Path, name: str) -> None:
    """Takes a picture of the whole page; `make test` keeps them in build/artifacts."""
    folder = Path(os.environ.get("CAST_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True, caret="initial")
