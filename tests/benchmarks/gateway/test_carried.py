"""A whole measurement has every load and way, with medians between least and greatest."""

import pytest

from benchmarks.gateway import carried
from benchmarks.gateway.fake_worker import Load
from benchmarks.gateway.limit import Search
from benchmarks.gateway.ways import DIRECT, WAYS
from tests.benchmarks.conftest import LoadOf

LOAD = Load(3, 2)


def test_a_whole_measurement(load_of: LoadOf) -> None:
    plan = carried.Plan(
        rounds=2,
        loads=(LOAD,),
        load_s=0.4,  # a busy machine sends few tokens in less
        flood=Load(2, 1),
        flood_tokens=10,
        requests=4,
        at_once=2,
        search=Search((2, 3), step_ms=2, tokens=100, limit_ms=1e6),
    )
    steps: list[None] = []
    check_stamp = load_of(steps)
    found = carried.measure(plan, lambda: steps.append(None))
    assert len(steps) == plan.num_steps
    check_stamp(found)
    (load,) = found["loads"]
    assert (load["streams"], load["step_ms"]) == (3, 2)
    assert set(load["cpu_us_per_token"]) == set(WAYS) == set(load["added_delay_ms"])
    for spread in (*load["cpu_us_per_token"].values(), *load["cpu_ratio"].values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert set(found["flood"]["tokens_per_s"]) == {DIRECT, *WAYS}
    assert found["flood"]["offered_tokens_per_s"] == 2000
    assert [tried["streams"] for tried in found["limit"]["tried"]] == [2, 3]
    assert (found["limit"]["streams"], found["limit"]["tokens_per_s"]) == (3, 1500)


@pytest.mark.parametrize("plan", [carried.Plan(rounds=1), carried.Plan(load_s=0)])
def test_too_little_is_refused(plan: carried.Plan) -> None:
    with pytest.raises(ValueError, match="are too few"):
        carried.measure(plan, lambda: None)


@pytest.mark.parametrize("name", ["", "64", "0x5ms", "64x20", "ax20ms", "64x20ms\n"])
def test_a_name_that_is_no_load_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a load; write, for example, 64x20ms"):
        Load.parse(name)
