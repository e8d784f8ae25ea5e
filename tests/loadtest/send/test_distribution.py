"""Lengths: by hand, by count, and what is refused."""

import statistics

import pytest

from loadtest.send.distribution import Distribution, lengths


def test_the_same_number_always_and_evenly_between_two() -> None:
    assert {Distribution("32").whole(str(n)) for n in range(9)} == {32}
    counts = [Distribution("16-18").whole(str(n)) for n in range(3000)]
    assert sorted(set(counts)) == [16, 17, 18]
    assert all(900 < counts.count(n) < 1100 for n in (16, 17, 18))
    seconds = [Distribution("0.5-2").number(str(n)) for n in range(3000)]
    assert 0.5 <= min(seconds) < 0.51
    assert 1.99 < max(seconds) <= 2


def test_a_lognormal_has_its_median_and_is_cut_at_three_sigmas() -> None:
    drawn = [Distribution("lognormal:100:0.5").whole(str(n)) for n in range(4000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.03)
    quarter = statistics.quantiles(drawn, n=4)[2]
    assert quarter == pytest.approx(100 * 2.71828 ** (0.6745 * 0.5), rel=0.03)
    assert Distribution("lognormal:100:0.5").high == pytest.approx(448.17, rel=1e-4)
    assert min(drawn) >= 22
    assert max(drawn) <= 448


def test_a_record_has_a_number_where_there_is_one() -> None:
    assert Distribution("32").about() == 32
    assert Distribution("1-6").about() == "1-6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "--output-tokens 'many' is not a length; write 32, 16-256, or lognormal:"),
        ("", "--output-tokens '' is not a length"),
        ("9-3", "'9-3' is not a length"),
        ("nan", "'nan' is not a length"),
        ("1-inf", "'1-inf' is not a length"),
        ("-4", "'-4' is not a length"),
        ("lognormal:100", "'lognormal:100' is not a length"),
        ("lognormal:100:0", "'lognormal:100:0' is not a length"),
        ("lognormal:100:999", "'lognormal:100:999' is not a length"),
        ("1-20", "--output-tokens 1-20 may be less than 2; raise it"),
        ("2.5-9", "--output-tokens 2.5-9 is not whole numbers of at least 2; raise it"),
        ("lognormal:10:0.8", "--output-tokens lognormal:10:0.8 may be less than 2"),
    ],
)
def test_what_is_no_length_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lengths("--output-tokens", text, 2)
