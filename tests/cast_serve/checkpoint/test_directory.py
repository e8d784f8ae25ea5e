"""A directory that lacks what its model needs is refused before anything is made of it."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.formats.bitmask import Bitmask
from cast_serve.checkpoint.formats.eight_bits import EightBits
from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.formats.marlin24 import Marlin24
from cast_serve.checkpoint.formats.pack_quantized import PackQuantized
from cast_serve.checkpoint.formats.plain import Gated
from cast_serve.checkpoint.formats.ragged import Ragged
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


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def test_each_fixture_has_the_form_that_its_config_says(name: str) -> None:
    said = json.loads((FIXTURES / name / "config.json").read_text())
    said = said.get("quantization_config") or said["compression_config"]
    forms: dict[str, type[Form]] = {
        "sparse-24-bitmask": Bitmask,
        "sparse-bitmask": Ragged,
        "pack-quantized": PackQuantized,
        "marlin-24": Marlin24,
    }
    found = (said.get("sparsity_config") or said)["format"]
    expected = forms.get(found, EightBits)
    try:
        directory = ModelDirectory(FIXTURES / name)
    except CheckpointError as error:
        assert "asymmetrically" in str(error)  # noqa: PT017
        return
    assert type(directory.form) is expected


def test_a_kind_that_no_release_wrote_is_named(save_gated: Save) -> None:
    source = save_gated(tiny_llama())
    record = json.loads((source / "cast.json").read_text())
    assert type(ModelDirectory(source).form) is Gated
    (source / "cast.json").write_text(json.dumps({**record, "kind": "woven"}))
    with pytest.raises(CheckpointError, match="kind is 'woven', but dense, pruned, gated or"):
        ModelDirectory(source)
