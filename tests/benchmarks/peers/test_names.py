"""Names of peers."""

import re

import pytest

from benchmarks.peers import names
from benchmarks.peers.names import PeerError


def test_names_of_peers() -> None:
    assert names.parse("q8_0:native+fa") == ("q8_0", "native+fa")
    assert names.title_of("bf16:native+fa") == "llama.cpp's decode, bf16, flash attention"
    assert names.title_of("q4_0:openvino") == "OpenVINO GenAI, q4_0"
    for name in names.DEFAULT.split(","):
        names.parse(name)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(PeerError, match="'q5' is not a type of peer; choose from q4_1, q4_0"):
        names.parse("q5:native")
    for name in ("q8_0:fa", "q8_0", "q8_0:", "q8_0:native+"):
        with pytest.raises(PeerError, match=re.escape(f"{name!r} is not known; write one of q8")):
            names.parse(name)
