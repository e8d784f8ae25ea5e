"""Which points are on a front, by hand, and the files of a sweep."""

import json
from pathlib import Path

import pytest

from loadtest.record import Recorded
from loadtest.report import pareto
from tests.loadtest.recordings import recorded, request, write_out

# Seconds per token and number of requests that end together, of each concurrency.
LOADS = {1: (0.1, 1), 2: (0.2, 4), 4: (0.4, 6), 8: (0.8, 6)}


def loaded(concurrency: int, *, other: str = "sparse") -> Recorded:
    """One block of each variant; a request has its first token at once, and 5 in all."""
    tpot_s, num = LOADS[concurrency]
    found = []
    for block, variant in enumerate(("dense", other)):
        for _ in range(num):
            tpot = tpot_s if variant == "dense" else tpot_s / 2
            found.append(
                request(
                    block,
                    0,
                    variant,
                    0.0,
                    tpot,
                    sent_s=10.0 * block,
                    output_tokens=5,
                    asked_tokens=5,
                )
            )
    plan = {"concurrency": concurrency, "output_tokens": 5, "candidate": other}
    return recorded(found, plan=plan)


def test_front_by_hand() -> None:
    runs = [(str(concurrency), loaded(concurrency)) for concurrency in LOADS]
    points = {(p["variant"], p["run"]): p for p in pareto.sweep_of(runs)["points"]}
    dense = [points["dense", str(concurrency)] for concurrency in LOADS]
    per_user = [point["output_tokens_per_s_per_user"] for point in dense]
    assert per_user == pytest.approx([10, 5, 2.5, 1.25])
    # 5 tokens in 0.4 s; 20 in 0.8 s; 30 in 1.6 s; 30 in 3.2 s
    assert [p["output_tokens_per_s"] for p in dense] == pytest.approx([12.5, 25, 18.75, 9.375])
    assert [p["is_on_front"] for p in dense] == [True, True, False, False]
    assert points["sparse", "1"]["output_tokens_per_s_per_user"] == pytest.approx(20)


def test_a_variant_that_never_answered_has_no_front(tmp_path: Path) -> None:
    lost = [
        request(n, 0, v, 0.1 if v == "dense" else None) for n, v in enumerate(("dense", "sparse"))
    ]
    sweep = pareto.sweep_of([("a", recorded(lost))])
    assert [point["is_on_front"] for point in sweep["points"]] == [True, False]
    assert "sparse answered too few requests to tell" in pareto.headline(sweep)
    pareto.write_sweep(tmp_path, sweep)
    assert (tmp_path / "report.png").exists()


def test_files(tmp_path: Path) -> None:
    for concurrency in (4, 1):
        run = loaded(concurrency)
        write_out(tmp_path / f"run-{concurrency}", run)
    assert pareto.is_sweep(tmp_path)
    assert not pareto.is_sweep(tmp_path / "run-1")
    runs = pareto.runs_in(tmp_path)
    assert [name for name, _ in runs] == ["run-1", "run-4"]
    sweep = pareto.sweep_of(runs)
    pareto.write_sweep(tmp_path, sweep)
    assert json.loads((tmp_path / "result.json").read_text()) == sweep
    page = (tmp_path / "report.html").read_text()
    assert '<a href="run-4/report.html">run-4</a>' in page
    # One warning for both runs, before the headline.
    assert page.count("1 block pairs are too few") == 1
    assert page.index("run-1, run-4: 1 block pairs") < page.index("<h1>")
    assert "| run-4 | 2.5 | 5.0 | 18.8 | 37.5 |" in (tmp_path / "report.md").read_text()


def test_runs_of_other_variants_are_refused(tmp_path: Path) -> None:
    for name, run in (("a", loaded(1)), ("b", loaded(1, other="other"))):
        write_out(tmp_path / name, run)
    with pytest.raises(ValueError, match="compare different variants"):
        pareto.runs_in(tmp_path)
