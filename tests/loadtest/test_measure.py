"""What several launches of the servers leave, also where one of them fails."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from loadtest import measure
from loadtest.measure import Job
from loadtest.record import Recorded
from loadtest.send.launches import LaunchError
from loadtest.send.paired import Plan
from loadtest.send.schedule import Schedule
from loadtest.send.sweep import Load
from loadtest.send.workload import Workload
from tests.loadtest.recordings import simulated


@pytest.mark.parametrize(
    "error", [LaunchError("launch 3: the port is taken"), KeyboardInterrupt("launch 3")]
)
def test_a_launch_that_fails_leaves_what_the_earlier_ones_measured(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def served(models: object, number: int, flags: object) -> AbstractContextManager[str]:
        if number == 2:
            raise error
        return nullcontext("http://server")

    async def run(job: Job, url: str, load: Load, workload: Workload) -> Recorded:
        return simulated(1, num_block_pairs=2, plan={"num_warmup": 1})

    def provenance(url: str, load_average: float) -> Mapping[str, Any]:
        return {"url": url}

    monkeypatch.setattr(measure, "served", served)
    monkeypatch.setattr(measure, "_run", run)
    loads = [Load(name, Plan(), Schedule("closed")) for name in ("one", "two")]
    workload = Workload(16)
    job = Job(loads, workload, 1.0, None, 1, workload, 0, [], None, {}, 3, [])
    found: dict[str, Recorded] = {}
    with pytest.raises(type(error), match="launch 3"):
        found.update(
            (str(load.name), recorded) for load, recorded in measure.measure(job, provenance)
        )
    assert sorted(found) == ["one", "two"]
    for recorded in found.values():
        assert {block.launch for block in recorded.blocks} == {0, 1}
