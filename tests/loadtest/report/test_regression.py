"""Changes between two runs."""

from dataclasses import replace

import pytest
from rich.console import Console

from loadtest.record import Recorded
from loadtest.report.regression import TABLE_WIDTH, compare, table_of
from tests.loadtest.recordings import joined, recorded, request, simulated, two_pairs


def test_a_slower_candidate_is_worse_and_a_faster_one_better() -> None:
    fast, slow = simulated(1, speedup=1.5), simulated(2, speedup=1.2)
    worse = compare(fast, slow)["changes"]["tpot_p50"]
    assert worse["verdict"] == "worse"
    assert worse["new"]["high"] < worse["old"]["low"]
    assert worse["change"]["ratio"] == pytest.approx(
        worse["new"]["ratio"] / worse["old"]["ratio"], rel=1e-12
    )
    assert worse["change"]["low"] < 1.2 / 1.5 < worse["change"]["high"] < 1
    assert compare(slow, fast)["changes"]["tpot_p50"]["verdict"] == "better"
    assert compare(slow, fast)["num_worse"] == 0


def test_two_runs_of_the_same_are_the_same() -> None:
    found = compare(simulated(1), simulated(2))
    assert found["num_worse"] == 0
    changes = found["changes"].values()
    covering = sum(each["change"]["low"] <= 1 <= each["change"]["high"] for each in changes)
    assert covering >= len(changes) - 1
    change = compare(simulated(1), simulated(1))["changes"]["tpot_p50"]["change"]
    assert change["ratio"] == 1
    assert change["low"] < 0.999 < 1.001 < change["high"]  # it still has an interval


def test_two_launches_widen_a_change_more_than_their_many_pairs_narrow_it() -> None:
    two = joined([simulated(1), simulated(2)], simulated(1).about)
    one = Recorded(two.about, tuple(replace(each, launch=0) for each in two.requests))
    widths = []
    for old in (two, one):
        change = compare(old, one)["changes"]["ttft_p50"]["change"]
        widths.append(change["high"] - change["low"])
    assert widths[0] > 2 * widths[1]


def test_a_percentile_of_too_few_values_has_no_interval() -> None:
    found = compare(simulated(1, num_block_pairs=4), simulated(2, num_block_pairs=4))
    assert found["changes"]["ttft_p50"]["change"]["low"] is not None
    p99 = found["changes"]["ttft_p99"]
    assert p99["old"]["low"] is p99["change"]["low"] is p99["change"]["high"] is None


def test_what_failures_hide_is_not_judged() -> None:
    lost = [
        request(n, 0, v, 0.1 if v == "sparse" else None) for n, v in enumerate(("dense", "sparse"))
    ]
    found = compare(two_pairs(), recorded(lost))
    assert found["changes"]["ttft_p50"]["verdict"] is None
    assert found["changes"]["ttft_p50"]["change"] == {"ratio": None, "low": None, "high": None}


def test_other_settings_are_named_but_for_what_is_drawn_anew() -> None:
    new = two_pairs(
        plan={"concurrency": 8},
        schedule="poisson",
        workload={"seed": 0, "prompt_words": 128, "run_number": 3},
    )
    assert compare(two_pairs(), new)["differences"] == [
        "concurrency: 1, then 8",
        "schedule: closed, then poisson",
    ]


def test_another_machine_and_other_kernels_are_named() -> None:
    of_int8 = {"sparse": {"kernel": "cast::linear24_int8", "isa": "amx", "replica": "0"}}
    of_int4 = {"sparse": {"kernel": "cast::linear24_int4", "isa": "amx", "replica": "1"}}
    old = two_pairs(machine={"cpu": "Intel", "family": "6"}, served=of_int8)
    new = two_pairs(machine={"cpu": "AMD EPYC", "family": "25"}, served=of_int4)
    assert compare(old, new)["differences"] == [
        "cpu: Intel, then AMD EPYC",
        "family: 6, then 25",
        "sparse kernel: cast::linear24_int8, then cast::linear24_int4",
    ]
    assert compare(two_pairs(), new)["differences"] == []  # an older record does not say


def test_table_and_warnings() -> None:
    found = compare(simulated(1, speedup=1.5), two_pairs())
    assert any(text.startswith("new: 2 block pairs are too few") for text in found["warnings"])
    console = Console(width=TABLE_WIDTH)
    with console.capture() as capture:
        console.print(table_of(found))
    text = capture.get()
    assert "better" in text
    assert "sparse, TTFT p50, ms" in text
    assert "…" not in text


def test_a_run_with_turns_is_shown_beside_one_without_by_the_names_of_its_figures() -> None:
    plain = simulated(1, num_block_pairs=4)
    halves = (replace(r, turn=place % 2) for place, r in enumerate(plain.requests))
    talk = Recorded({**plain.about, "until": "certain"}, tuple(halves))
    found = compare(plain, talk)
    assert "until: None, then certain" in found["differences"]
    # The resamples of an ordinary interval say nothing about one that allows for every look.
    assert found["changes"]["tpot_p50"]["change"]["low"] is None
    console = Console(width=TABLE_WIDTH, record=True)
    console.print(table_of(found))
    lines = [line for line in console.export_text().splitlines() if "output tokens/s" in line]
    for line in lines:
        old, new = line.split("\u2502")[2:4]
        assert old.strip() == new.strip()
    assert len(lines) == 2
