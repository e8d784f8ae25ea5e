import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import count_compressed, inspect
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.pattern import PatternError
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama


def test_inspect_counts_linears_and_their_bytes(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    convert(source, tmp_path / "out")
    before, after = inspect(source), inspect(tmp_path / "out")
    assert (before["kind"], after["kind"]) == ("gated", "compressed")
    assert before["pattern"] == after["pattern"] == "2:4"
    assert (before["num_sparse_layers"], after["num_sparse_layers"]) == (0, 14)
    assert before["num_dense_layers"] == after["num_dense_layers"] + 14
    assert before["linear_weight_bytes"] == before["dense_linear_weight_bytes"]
    assert after["dense_linear_weight_bytes"] == before["dense_linear_weight_bytes"]
    assert after["linear_bytes_ratio"] == 0.5625
    assert (count_compressed(source), count_compressed(tmp_path / "out")) == (0, 14)


def test_inspect_finds_damage(save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out")
    record = json.loads((tmp_path / "out/cast.json").read_text())
    (tmp_path / "out/cast.json").write_text(json.dumps(record | {"sha256": {}}))
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bitmask"][5, 1] = 0xFF
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PatternError, match=r"up_proj: 2 groups .* row 5, group 2"):
        inspect(tmp_path / "out")


def test_a_directory_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save the model with safetensors first"):
        count_compressed(tmp_path)
