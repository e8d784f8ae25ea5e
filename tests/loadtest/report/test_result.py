"""What a result holds, and its table for the terminal."""

from rich.console import Console

from loadtest.report.result import result_of, table_of
from tests.loadtest.recordings import two_pairs

RESULT = result_of(two_pairs())


def test_the_result_holds_what_scripts_read() -> None:
    assert RESULT["passed"]
    assert (RESULT["baseline"], RESULT["candidate"]) == ("dense", "sparse")
    assert RESULT["block_order"] == ["dense", "sparse", "sparse", "dense"]
    assert (RESULT["concurrency"], RESULT["output_tokens_per_request"]) == (1, 3)
    assert (RESULT["seed"], RESULT["prompt_words"]) == (0, 128)
    assert RESULT["ratio"]["ttft"]["median"] == 2.5
    assert RESULT["verdict"]["passed"]


def test_table_fits_a_narrow_terminal() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of(RESULT))
    text = capture.get()
    assert "2.83x (no interval)" in text
    assert "8500" in text
    assert "…" not in text
