"""A server for a comparison; compare.py's tests have what it answers."""

from pathlib import Path

import pytest

from benchmarks.peers.names import PeerError
from benchmarks.peers.server import serving
from tests.conftest import Opened


def test_a_peer_of_no_known_name_is_not_started(
    fake_library: None, model: Path, core: int, opened: Opened
) -> None:
    with pytest.raises(PeerError), serving("nobody", model, [core], 64, []):
        pass
    assert opened == []
