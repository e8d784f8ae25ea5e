"""The committed example: anyone can recompute it, and docs/loadtest.md says what comes out."""

from pathlib import Path
from typing import Any

import pytest

from loadtest.record import Recorded
from loadtest.report.result import result_of

DOCS = Path(__file__).parents[2] / "docs"
RUNS = sorted(path.parent for path in (DOCS / "example").glob("*/*/run.json"))


def cell(before: float, after: float, speedup: dict[str, float], digits: int) -> str:
    return (
        f"{before:.{digits}f} -> {after:.{digits}f}, {speedup['ratio']:.2f} "
        f"({speedup['low']:.2f} to {speedup['high']:.2f})"
    )


def row_of(name: str, result: dict[str, Any]) -> str:
    sides = [result["baseline"], result["candidate"]]
    tpot = [result["tpot_s"][side]["median"] * 1e3 for side in sides]
    ttft = [result["ttft_s"][side]["median"] * 1e3 for side in sides]
    rate = [result["output_tokens_per_s"][side] for side in sides]
    speedups = result["speedups"]
    cells = (
        cell(*tpot, speedups["tpot_p50"], 1),
        cell(*ttft, speedups["ttft_p50"], 0),
        cell(*rate, speedups["throughput"], 0),
    )
    return f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}/{run.name}")
def test_the_documented_figures_follow_from_the_record(run: Path) -> None:
    result = result_of(Recorded.read(run))
    assert result["passed"]
    assert row_of(f"{run.parent.name}/{run.name}", result) in (DOCS / "loadtest.md").read_text()


def test_there_is_an_example() -> None:
    assert len(RUNS) == 8
