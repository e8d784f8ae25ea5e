"""Shares of a batch do together what the batch does alone."""

import pytest

from loadtest.send.batch import Batch
from tests.loadtest.conftest import conversations

TEN = conversations((f"prompt {number}" for number in range(10)), 8)


def test_an_open_loop_is_dealt_out_with_its_times() -> None:
    times_s = tuple(number / 2 for number in range(10))
    shares = Batch("dense", TEN, 1, times_s).shares(3)
    assert [[one.index for one in share.conversations] for share in shares] == [
        [0, 3, 6, 9],
        [1, 4, 7],
        [2, 5, 8],
    ]
    assert shares[1].due_s == (0.5, 2.0, 3.5)


def test_a_closed_loop_deals_out_places_and_prompts_in_proportion() -> None:
    shares = Batch("dense", TEN, 5).shares(2)
    assert [share.concurrency for share in shares] == [3, 2]
    # Places 0, 2, 4 and 1, 3 of every five.
    assert [[one.index for one in share.conversations] for share in shares] == [
        [0, 2, 4, 5, 7, 9],
        [1, 3, 6, 8],
    ]
    assert all(share.due_s is None for share in shares)


@pytest.mark.parametrize("concurrency", [1, 2, 7, 128])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_nothing_is_lost(concurrency: int, num: int) -> None:
    shares = Batch("dense", TEN, concurrency).shares(num)
    assert {one for share in shares for one in share.conversations} == set(TEN)
    assert sum(len(share.conversations) for share in shares) == 10
    assert sum(share.concurrency for share in shares) == concurrency
    assert all(share.concurrency for share in shares if share.conversations)
