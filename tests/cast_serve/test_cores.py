import pytest

from cast_serve.cores import cores_of_ranks


@pytest.mark.parametrize(
    ("cores", "num_ranks", "dealt"),
    [([0], 1, "0"), ([4, 5], 1, "4,5"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([0, 1, 2], 2, "0|1,2")],
)
def test_cores_are_dealt_out_to_ranks(cores: list[int], num_ranks: int, dealt: str) -> None:
    assert cores_of_ranks(cores, num_ranks) == dealt


def test_fewer_cores_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cores for 2 ranks .*nobind"):
        cores_of_ranks([7], 2)
