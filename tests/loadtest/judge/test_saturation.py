"""Where queues begin, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from loadtest.judge.saturation import growth, saturation
from loadtest.record import Request
from loadtest.report.result import result_of
from loadtest.report.words import notes
from tests.loadtest.recordings import recorded, request

# Ten parts of ten requests: part p lasts 10 / (p + 1) seconds, so its rate is p + 1.
STARTS_S = [sum(10 / (earlier + 1) for earlier in range(part)) for part in range(10)]


def ramp(block: int, variant: str, saturated_from: int, *, error: bool = False) -> list[Request]:
    """A block whose TTFT is 0.1 s, and from that part on 0.3 s, or an error."""
    found = []
    for part, start_s in enumerate(STARTS_S):
        is_slow = part >= saturated_from
        ttft_s = None if is_slow and error else 0.3 if is_slow else 0.1
        for place in range(10):
            sent_s = 1000.0 * block + start_s + place / (part + 1)
            found.append(request(block, 0, variant, ttft_s, 0.01, sent_s=sent_s))
    return found


def run(dense: list[Request], sparse: list[Request]) -> Any:
    return recorded([*dense, *sparse], schedule="ramp", rate_per_s=5.5)


@pytest.mark.parametrize("error", [False, True])
def test_the_rate_before_queues_begin(error: bool) -> None:
    found = run(ramp(0, "dense", 6, error=error), ramp(1, "sparse", 10))
    dense = saturation(found, "dense")
    assert dense == {"rate_per_s": pytest.approx(6.0), "is_reached": True}
    sparse = saturation(found, "sparse")
    assert sparse == {"rate_per_s": pytest.approx(10.0), "is_reached": False}


@pytest.mark.parametrize("num_prompts", [25, 35, 50])
def test_parts_that_cut_through_places(num_prompts: int) -> None:
    flat = [
        request(block, block // 2, variant, 0.1, sent_s=1000.1 * block + 0.5 * place)
        for block, variant in enumerate(("dense", "sparse", "sparse", "dense") * 3)
        for place in range(num_prompts)
    ]
    found = saturation(recorded(flat, schedule="ramp", rate_per_s=2.0), "dense")
    assert found == {"rate_per_s": pytest.approx(2.0), "is_reached": False}


def test_a_slow_spell_that_ends_is_no_saturation() -> None:
    slow = ramp(0, "dense", 3)[:40] + ramp(0, "dense", 10)[40:]
    assert not saturation(run(slow, ramp(1, "sparse", 10)), "dense")["is_reached"]


@pytest.mark.parametrize(("begins", "error"), [(1, False), (0, True)])
def test_a_ramp_that_begins_beyond_the_limit_tells_no_rate(begins: int, error: bool) -> None:
    result = result_of(run(ramp(0, "dense", begins, error=error), ramp(1, "sparse", 10)))
    assert result["saturation"]["dense"] == {"rate_per_s": None, "is_reached": True}
    assert any("dense does not keep up with any rate" in text for text in notes(result))
    closed = recorded([*ramp(0, "dense", 9), *ramp(1, "sparse", 9)])
    assert result_of(closed)["saturation"] is None


def test_a_rate_beyond_the_limit_is_warned_of() -> None:
    slow = recorded([*ramp(0, "dense", 4), *ramp(1, "sparse", 10)], schedule="constant")
    found = result_of(slow)
    assert found["ttft_growth"] == {"dense": pytest.approx(3.0), "sparse": pytest.approx(1.0)}
    (warning,) = (text for text in found["warnings"] if "exceeds" in text)
    assert "dense 3.0x" in warning
    failed = recorded([*ramp(0, "dense", 0, error=True), *ramp(1, "sparse", 10)], schedule="burst")
    assert result_of(failed)["ttft_growth"]["dense"] is None
    assert result_of(run(ramp(0, "dense", 4), ramp(1, "sparse", 10)))["ttft_growth"] is None


def test_later_turns_are_no_arrivals() -> None:
    """A conversation every 2 s; its second turn is as slow as you like, wherever it falls."""
    requests = []
    for block, variant in enumerate(("dense", "sparse")):
        for place in range(40):
            sent_s = 1000.0 * block + 2.0 * place
            requests.append(request(block, 0, variant, 0.1, 0.01, sent_s=sent_s))
            later_s = sent_s + 0.3 + 0.01 * (place % 7)
            later = request(block, 0, variant, 0.1 + 0.05 * place, 0.01, sent_s=later_s)
            requests.append(replace(later, turn=1))
    found = recorded(requests, schedule="constant", rate_per_s=0.5)
    assert saturation(found, "dense") == {"rate_per_s": pytest.approx(0.5), "is_reached": False}
    assert growth(found, "dense") == pytest.approx(1)
