"""A page that fetches and runs nothing, and says first what may mislead."""

import re
from html.parser import HTMLParser

import pytest

from loadtest.record import Recorded
from loadtest.report import html
from loadtest.report.result import result_of
from tests.loadtest.recordings import broken_runs, four_pairs, simulated, two_pairs

RUN = two_pairs()


class Outline(HTMLParser):
    """Collects tags that open and close wrongly, and whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [name for name, _ in attrs if name in ("src", "href") or name[:2] == "on"]
        self.fetched += [
            f"{name} {value}"
            for name, value in attrs
            if name == "xlink:href" and not str(value).startswith("#")
        ]
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("run", [RUN, simulated(1, is_aa=True), *broken_runs()])
def test_html_is_one_file_that_fetches_and_runs_nothing(run: Recorded) -> None:
    page = html.report(run, result_of(run))
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert len(set(outline.ids)) == len(outline.ids)
    # What charts refer to is in the page.
    assert not re.search(r"url\((?!#)|@import", page)
    assert "nan" not in re.findall(r'="([^"]*)"', page)


def test_html_shows_warnings_and_verdict_before_any_figure() -> None:
    def badge(**guard: object) -> str:
        result = result_of(two_pairs(guard=guard))
        return str(re.findall('<p class="verdict ([^<]*)</p>', html.report(RUN, result))[0])

    assert badge(max_error_rate=0.1) == 'muted">NO GUARD RAIL SET'
    assert badge(min_speedup={"tpot_p50": 1}) == 'inconclusive">INCONCLUSIVE'  # no interval
    page = html.report(
        four_pairs(), result_of(four_pairs(guard={"min_speedup": {"tpot_p50": 1.9}}))
    )
    assert '<p class="verdict pass">PASS</p>' in page
    void = result_of(two_pairs(harness={"is_void": True, "why": "too slow"}))
    page = html.report(RUN, void).partition("<body>")[2]
    assert page.index("did not keep up: too slow") < page.index("2.00x")


def test_html_escapes_what_others_wrote() -> None:
    run = two_pairs(url="http://<script>", workload={"source": "<b>"})
    page = html.report(run, result_of(run))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
