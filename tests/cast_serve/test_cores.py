import os
import re

import pytest

from cast_serve.cores import cores_of_ranks, parse_cores


@pytest.fixture
def open_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 4, 7})


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0", [0]),
        ("0,2-3", [0, 2, 3]),
        ("2-4", [2, 3, 4]),
        ("3-3", [3]),
        (" 7 , 2-3", [7, 2, 3]),  # in the order given: the first are the first rank's
    ],
)
@pytest.mark.usefixtures("open_cores")
def test_cores_as_people_write_them(text: str, cores: list[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    "text", ["", "a", "0,,2", "0,", "-2", "2-x", "2-", "2:4", "0 2", "2-3-4", "1.5"]
)
@pytest.mark.usefixtures("open_cores")
def test_what_is_no_list_of_cpu_ids_is_refused(text: str) -> None:
    wanted = f"cores {text!r} is not a list of CPU ids; write, for example, 0,2-3"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        parse_cores(text)


@pytest.mark.parametrize(
    ("text", "part"), [("1", "1"), ("0,2-5", "2-5"), ("0, 8", "8"), ("6-7", "6-7"), ("4-2", "4-2")]
)
@pytest.mark.usefixtures("open_cores")
def test_cores_that_this_process_does_not_have_are_refused(text: str, part: str) -> None:
    wanted = f"cores {part} are not available to this process, which has [0, 2, 3, 4, 7]"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        parse_cores(text)


@pytest.mark.usefixtures("open_cores")
def test_a_core_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="cores '3,2-3' list 3 twice"):
        parse_cores("3,2-3")


@pytest.mark.parametrize(
    ("cores", "num_ranks", "dealt"),
    [([0], 1, "0"), ([4, 5], 1, "4,5"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([0, 1, 2], 2, "0|1,2")],
)
def test_cores_are_dealt_out_to_ranks(cores: list[int], num_ranks: int, dealt: str) -> None:
    assert cores_of_ranks(cores, num_ranks) == dealt


def test_fewer_cores_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cores for 2 ranks .*nobind"):
        cores_of_ranks([7], 2)
