"""The picture of a comparison."""

from pathlib import Path

import pytest

from loadtest.bench.peers import picture


def test_those_that_tell_a_perplexity_are_drawn(tmp_path: Path) -> None:
    ours = {"title": "vLLM, sparse", "weight_bytes": 176e6, "tpot_ms": 20.0, "perplexity": 47.5}
    rival = {"title": "OpenVINO GenAI, q8_0", "weight_bytes": 145e6, "tpot_ms": 12.0}
    found = {
        "shape": "smollm2-135m",
        "cores": 1,
        "machine": {"cpu": "a CPU"},
        "date": "2026-11-27T10:00:00+00:00",
        "servers": {"sparse": ours, "q8_0:openvino": rival},
    }
    picture.write_png(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no server has a perplexity; measure with --text FILE"):
        picture.write_png({**found, "servers": {"q8_0:openvino": rival}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
