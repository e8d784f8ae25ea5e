"""The record and what follows from it come together or not at all, and agree."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.record import Recorded
from loadtest.report import picture
from loadtest.report.html import report as html_of
from loadtest.report.result import check_out, markdown_of, result_of, table_of, write_out
from tests.loadtest.recordings import recorded, request, simulated, two_pairs

RUN = two_pairs()
RESULT = result_of(RUN)
FILES = [
    *("report.html", "report.md", "report.png", "requests.jsonl", "result.json", "run.json"),
]


def broken_runs() -> list[Recorded]:
    """A run without blocks, and one in which a variant never answered."""
    lost = [request(n, 0, v, 1.0 if v == "dense" else None) for n, v in enumerate(RUN.variants)]
    open_loop = {"schedule": "poisson", "rate_per_s": 2.0}
    return [
        recorded([request(None, None, "dense", None)]),
        recorded(lost, **open_loop),
        two_pairs(**open_loop, slo={"ttft_s": 0.001, "tpot_s": None}),
    ]


def test_the_result_holds_what_scripts_read() -> None:
    assert RESULT["passed"]
    assert (RESULT["baseline"], RESULT["candidate"]) == ("dense", "sparse")
    assert RESULT["block_order"] == ["dense", "sparse", "sparse", "dense"]
    assert (RESULT["concurrency"], RESULT["output_tokens_per_request"]) == (1, 3)
    assert (RESULT["seed"], RESULT["prompt_words"]) == (0, 128)
    assert RESULT["ratio"]["ttft"]["median"] == 2.5
    assert RESULT["verdict"]["passed"]


def test_everything_is_computed_from_the_record(tmp_path: Path) -> None:
    write_out(tmp_path / "new" / "out", RUN, RESULT)
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert json.loads((out / "result.json").read_text()) == RESULT
    assert result_of(Recorded.read(out)) == RESULT
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(picture, "draw", full)
    with pytest.raises(OSError, match="disk full"):
        write_out(tmp_path / "out", RUN, RESULT)
    assert list(tmp_path.iterdir()) == []


def test_taken_or_impossible_places_are_refused(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already; name a new directory"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="file is not a directory"):
        check_out(tmp_path / "file" / "out")


def test_table_fits_a_narrow_terminal() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of(RESULT))
    text = capture.get()
    assert "2.83x (2.00 to 3.00)" in text
    assert "8500" in text
    assert "…" not in text


class Outline(HTMLParser):
    """Collects tags that open and close wrongly, and whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [name for name, _ in attrs if name in ("src", "href") or name[:2] == "on"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("run", [RUN, simulated(1, is_aa=True), *broken_runs()])
def test_html_is_one_file_that_fetches_and_runs_nothing(run: Recorded) -> None:
    page = html_of(run, result_of(run))
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert not re.search(r"url\(|@import", page)
    assert "nan" not in re.findall(r'="([^"]*)"', page)


def test_html_shows_warnings_before_anything_else() -> None:
    result = result_of(two_pairs(harness={"is_void": True, "why": "too slow"}))
    page = html_of(RUN, result)
    body = page[page.index("<body>") :]
    assert body.index("VOID. The harness did not keep up: too slow") < body.index("<h1>")
    assert "NOT PASSED" in body


def test_html_escapes_what_others_wrote() -> None:
    run = two_pairs(url="http://<script>", workload={"source": "<b>"})
    page = html_of(run, result_of(run))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_open_loops_show_latency_against_time() -> None:
    assert "Latency against time" not in html_of(RUN, RESULT)
    run = two_pairs(schedule="poisson", rate_per_s=2.0)
    assert "12 of 12 requests" in html_of(run, result_of(run))


@pytest.mark.parametrize("run", broken_runs())
def test_broken_runs_are_written_too(tmp_path: Path, run: Recorded) -> None:
    write_out(tmp_path / "out", run, result_of(run))
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result_of(run)


def test_markdown() -> None:
    text = markdown_of(RESULT)
    assert text.startswith("# sparse is 2.00x")
    assert "| TPOT p50, ms | 500.00 | 250.00 | 2.00x (2.00 to 2.00) |" in text
    assert "> **2 block pairs are too few" in text
    assert "- passed: error_rate: no request failed" in text
