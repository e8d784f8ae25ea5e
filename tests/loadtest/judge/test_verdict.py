"""Guard rails: which hold and which do not."""

from typing import Any

import pytest

from cast_serve.guard import Guard
from loadtest.judge.verdict import is_open, judge

SPEEDUP = {"ratio": 1.25, "low": 1.2, "high": 1.3}
RESULT: dict[str, Any] = {
    "is_complete": True,
    "num_requests": 100,
    "num_block_pairs": 10,
    "workload": {},
    "until": None,
    "num_errors": 1,
    "num_warmup_errors": 0,
    "num_unequal_lengths": 0,
    "output_tokens_per_request": 32,
    "errors": {"dense": {}, "sparse": {"timeout": 1}},
    "error_rate": {"dense": 0.0, "sparse": 0.02},
    "speedups": {"tpot_p50": SPEEDUP, "ttft_p99": {"ratio": 1.0, "low": 0.8, "high": 1.25}},
    "harness": {"is_void": False, "why": None},
    "num_launches": 1,
    "slo": None,
    "quality": None,
}
VOID = {"harness": {"is_void": True, "why": "slip p99 30 ms"}}
FEW = {"speedups": {"tpot_p50": {"ratio": 1.5, "low": None, "high": None}}}
FINE = {**RESULT, "num_errors": 0, "error_rate": {"dense": 0.0, "sparse": 0.0}}


def found(result: dict[str, Any], **guard: Any) -> dict[str, Any]:
    verdict = judge({**FINE, **result}, Guard.of(guard))
    verdicts = {check["verdict"] for check in verdict["checks"]}
    assert (verdict["verdict"] == "pass") == (verdicts <= {"pass"})
    return {check["name"]: check for check in verdict["checks"]}


@pytest.mark.parametrize(
    ("guard", "is_set"),
    [
        ({}, False),
        ({"max_error_rate": 0.5, "allow_void": True}, False),
        ({"min_speedup": {"tpot_p50": 1}}, True),
        ({"max_slowdown": {"tpot_p50": 1}}, True),
        ({"min_token_agreement": 0.0}, True),
        ({"max_accuracy_loss": 0.0}, True),
    ],
)
def test_only_limits_on_speed_and_quality_are_guard_rails(
    guard: dict[str, Any], is_set: bool
) -> None:
    assert judge(FINE, Guard.of(guard))["has_guard"] == is_set


def test_a_run_that_was_stopped_does_not_pass() -> None:
    stopped = {"is_complete": False, "num_block_pairs": 5, "num_planned_pairs": 12}
    check = found(stopped, min_speedup={"tpot_p50": 1.1})["complete"]
    assert check["verdict"] == "inconclusive"
    assert "5 of 12 block pairs" in check["why"]
    nothing = {**stopped, "num_requests": 0, "num_block_pairs": 0}
    assert list(found(nothing)) == ["complete"]


@pytest.mark.parametrize(
    ("change", "guard", "name", "verdict", "why"),
    [
        ({}, {}, "error_rate", "pass", "no request failed"),
        (RESULT, {}, "error_rate", "fail", "1 of 100 requests failed: sparse timeout x1"),
        (RESULT, {"max_error_rate": 0.02}, "error_rate", "pass", "1 of 100"),
        (RESULT, {"max_error_rate": 0.019}, "error_rate", "fail", "1 of 100"),
        (
            {"num_unequal_lengths": 2},
            {"max_error_rate": 1.0},
            "unequal_lengths",
            "fail",
            "2 of 100",
        ),
        (VOID, {}, "void", "inconclusive", "slip p99 30 ms"),
        (VOID, {"allow_void": True}, "void", "pass", "slip p99 30 ms"),
        ({"num_warmup_errors": 1}, {}, "warmup", "fail", "1 warm-up requests failed"),
        ({"num_requests": 0}, {}, "warmup", "fail", "so nothing was measured"),
        (FEW, {"min_speedup": {"tpot_p50": 1}}, "min_speedup.tpot_p50", "inconclusive", "too few"),
        ({}, {"min_speedup": {"goodput": 1}}, "min_speedup.goodput", "inconclusive", "--slo-"),
    ],
)
def test_what_is_judged(
    change: dict[str, Any], guard: dict[str, Any], name: str, verdict: str, why: str
) -> None:
    check = found(change, **guard)[name]
    assert check["verdict"] == verdict
    assert why in check["why"]


@pytest.mark.parametrize(
    ("change", "guard", "verdict"),
    [
        ({}, {}, "pass"),
        ({}, {"min_speedup": {"tpot_p50": 1.3}}, "inconclusive"),
        ({}, {"min_speedup": {"tpot_p50": 1.3}, "max_slowdown": {"tpot_p50": 0.5}}, "fail"),
        (VOID, {"min_speedup": {"tpot_p50": 9}}, "inconclusive"),
        (VOID, {"min_speedup": {"tpot_p50": 9}, "allow_void": True}, "fail"),
        (RESULT, {}, "fail"),
    ],
)
def test_a_failed_check_fails_a_sound_run_and_an_unsound_one_is_inconclusive(
    change: dict[str, Any], guard: dict[str, Any], verdict: str
) -> None:
    assert judge({**FINE, **change}, Guard.of(guard))["verdict"] == verdict


def test_how_much_more_would_settle_a_limit() -> None:
    def why(limit: float, **change: Any) -> str:
        check = found(change, min_speedup={"tpot_p50": limit})
        return str(check["min_speedup.tpot_p50"]["why"])

    # The interval reaches 0.0400 on the logarithm; 1.22 is 0.0243 below the ratio: 27.1 pairs.
    assert "about 18 more block pairs" in why(1.22)
    assert "about 6 more launches" in why(1.22, num_launches=3)
    assert "50 times as many block pairs may not do" in why(1.249)


def test_which_checks_there_are() -> None:
    assert list(found({})) == ["error_rate", "unequal_lengths", "void"]
    assert list(found({"num_requests": 0}, min_speedup={"tpot_p50": 1})) == ["warmup"]
    checks = ["warmup", "error_rate", "unequal_lengths", "void"]
    assert list(found({"num_warmup_errors": 1})) == checks


def test_the_lower_end_must_reach_the_least_speedup() -> None:
    check = found({}, min_speedup={"tpot_p50": 1.2})["min_speedup.tpot_p50"]
    assert (check["limit"], check["found"], check["verdict"]) == (1.2, 1.2, "pass")
    for limit, verdict in ((1.21, "inconclusive"), (1.3, "inconclusive"), (1.31, "fail")):
        check = found({}, min_speedup={"tpot_p50": limit})["min_speedup.tpot_p50"]
        assert check["verdict"] == verdict


def test_the_upper_end_must_keep_to_the_greatest_slowdown() -> None:
    check = found({}, max_slowdown={"ttft_p99": 1.25})["max_slowdown.ttft_p99"]
    assert (check["found"], check["verdict"]) == (1.25, "pass")  # 1 / 0.8
    for limit, verdict in ((1.24, "inconclusive"), (0.81, "inconclusive"), (0.79, "fail")):
        check = found({}, max_slowdown={"ttft_p99": limit})["max_slowdown.ttft_p99"]
        assert check["verdict"] == verdict


@pytest.mark.parametrize("kind", ["min_speedup", "max_slowdown"])
@pytest.mark.parametrize(
    "ends",
    [
        {"ratio": None, "low": None, "high": None},
        {"ratio": None, "low": 1.5, "high": None},
    ],
)
def test_what_failed_requests_leave_unknown_does_not_pass(kind: str, ends: dict[str, Any]) -> None:
    check = found({"speedups": {"e2e_p99": ends}}, **{kind: {"e2e_p99": 1.1}})[f"{kind}.e2e_p99"]
    assert (check["found"], check["verdict"]) == (None, "inconclusive")
    assert "too many requests failed" in check["why"]


def test_a_figure_among_the_candidates_failed_requests_fails() -> None:
    """It is beyond any limit, so no more block pairs would help."""
    ends = {"ratio": 0.0, "low": 0.0, "high": 0.0}
    for guard in ({"max_slowdown": {"ttft_p99": 1.1}}, {"min_speedup": {"ttft_p99": 0.1}}):
        (name,) = guard
        check = found({"speedups": {"ttft_p99": ends}}, **guard)[f"{name}.ttft_p99"]
        assert check["verdict"] == "fail"
    some = {"ratio": 0.9, "low": 0.0, "high": 1.2}
    check = found({"speedups": {"ttft_p99": some}}, max_slowdown={"ttft_p99": 1.1})
    assert check["max_slowdown.ttft_p99"]["verdict"] == "inconclusive"
    assert "(0.833 to inf)" in check["max_slowdown.ttft_p99"]["why"]
    assert check["max_slowdown.ttft_p99"]["why"].endswith("; more block pairs may settle it")


@pytest.mark.parametrize(
    ("speedup", "change", "expected"),
    [
        (SPEEDUP, {}, True),
        ({"ratio": 1.3, "low": None, "high": None}, {}, True),  # too few pairs yet
        ({"ratio": None, "low": None, "high": None}, {}, False),  # a pair without a value
        ({"ratio": 1.4, "low": 1.3, "high": 1.5}, {}, False),
        (SPEEDUP, RESULT, False),  # a request failed
        (SPEEDUP, {"num_unequal_lengths": 1}, False),
    ],
)
def test_a_run_goes_on_only_while_its_verdict_may_change(
    speedup: dict[str, Any], change: dict[str, Any], expected: bool
) -> None:
    result = {**FINE, **change, "speedups": {"tpot_p50": speedup}}
    judged = judge(result, Guard.of({"min_speedup": {"tpot_p50": 1.25}}))
    assert is_open({**result, **judged}) == expected


def test_token_agreement() -> None:
    agreement = {"mean": 0.7, "low": 0.6, "high": 0.8}
    measured = {"quality": {"token_agreement": agreement, "num_scored": 9}}
    check = found(measured, min_token_agreement=0.6)["min_token_agreement"]
    assert (check["found"], check["verdict"]) == (0.6, "pass")
    assert "over 9 prompts" in check["why"]
    for limit, verdict in ((0.61, "inconclusive"), (0.8, "inconclusive"), (0.81, "fail")):
        check = found(measured, min_token_agreement=limit)["min_token_agreement"]
        assert check["verdict"] == verdict
    one = {"quality": {**measured["quality"], "num_scored": 1}}
    check = found(one, min_token_agreement=0.0)["min_token_agreement"]
    assert check["verdict"] == "inconclusive"
    unmeasured = found({}, min_token_agreement=0.6)["min_token_agreement"]
    assert (unmeasured["found"], unmeasured["verdict"]) == (None, "inconclusive")
    assert "give --quality-prompts" in unmeasured["why"]
