"""The picture of a comparison."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.peers import picture


def test_those_that_tell_a_perplexity_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **more: Any) -> None:
        suptitle = figure.get_suptitle()
        drawn.extend([suptitle, figure.axes[0].get_ylabel(), *map(written, figure.axes)])
        save(figure, *arguments, **more)

    def written(axes: Any) -> str:
        return "; ".join(text.get_text() for text in axes.texts)

    monkeypatch.setattr(Figure, "savefig", saved)
    ours = {"title": "vLLM, sparse", "weight_bytes": 176e6, "tpot_ms": 20.0, "perplexity": 47.5}
    rival = {"title": "OpenVINO GenAI, q8_0", "weight_bytes": 145e6, "tpot_ms": 12.0}
    found = {
        "shape": "smollm2-135m",
        "cores": 1,
        "machine": {"cpu": "AMD EPYC", "family": "25", "model": "17"},
        "plan": {"blocks": 16, "block_size": 512},
        "date": "2026-11-27T10:00:00+00:00",
        "servers": {"sparse": ours, "q8_0:openvino": rival},
    }
    picture.write_png(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    title, perplexity, *names = drawn
    assert "of AMD EPYC (family 25, model 17), 2026-11-27" in title
    assert "tell no perplexity, not drawn: OpenVINO GenAI, q8_0" in title
    assert perplexity == "perplexity, first 8,176 tokens"
    assert names == ["vLLM, sparse"] * 2
    with pytest.raises(ValueError, match="no server has a perplexity; measure with --text FILE"):
        picture.write_png({**found, "servers": {"q8_0:openvino": rival}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
