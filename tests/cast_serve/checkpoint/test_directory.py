"""A directory that lacks what its model needs is refused before anything is made of it."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.record import CheckpointError
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama

NORM = "model.norm.weight"


def without(file: Path, *names: str, **more: object) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight"])
def test_a_tensor_that_is_no_target_is_missed(name: str, save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama())
    without(source / "model.safetensors", name)
    with pytest.raises(CheckpointError, match=f"has no tensor {re.escape(name)}, and lacks 1 in"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_missed_without_a_record(save_pruned: Save) -> None:
    source = save_pruned(tiny_llama(), max_shard_size="30KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match="copy the whole directory again"):
        ModelDirectory(source)


def test_a_bias_is_missed(save_gated: Save) -> None:
    source = save_gated(tiny_gpt2())
    (source / "cast.json").unlink()
    without(source / "model.safetensors", "transformer.h.0.mlp.c_fc.bias")
    with pytest.raises(CheckpointError, match="has no tensor transformer.h.0.mlp.c_fc.bias"):
        ModelDirectory(source)


def test_names_that_the_model_does_not_know_are_not_judged(save_pruned: Save) -> None:
    """As where experts are stored one by one and transformers keeps them in one parameter."""
    source = save_pruned(tiny_llama())
    file = source / "model.safetensors"
    norm = load_file(file)[NORM]
    without(file, NORM, **{"model.last_norm.weight": norm})
    assert ModelDirectory(source).kind == "dense"
