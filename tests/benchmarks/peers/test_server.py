"""A server for a comparison; compare.py's tests have what it answers."""

from pathlib import Path

import pytest

from benchmarks.peers.names import PeerError
from benchmarks.peers.server import serving


def test_a_server_that_ends_is_told_with_its_log(
    fake_library: None, tmp_path: Path, core: int
) -> None:
    message = r"nobody ended with 2; see .*nobody\.log"
    with pytest.raises(PeerError, match=message), serving("nobody", tmp_path, [core], 64, []):
        pass
    assert "holds no model" in (tmp_path / "work/nobody.log").read_text()
