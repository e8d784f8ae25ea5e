"""The mock keeps to what it was told."""

import pytest

from loadtest.mock import MockVariant


def test_parse() -> None:
    assert MockVariant.parse("0.1,0.02") == MockVariant(ttft_s=0.1, itl_s=0.02)


@pytest.mark.parametrize("text", ["", "0.1", "a,b", "1,2,3"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not TTFT_S,ITL_S"):
        MockVariant.parse(text)
