"""scripts/random-llama: the twins of one model hold the same numbers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from cast_serve.checkpoint.inspect import inspect
from cast_serve.sparsity.bitmask import decompress
from cast_serve.sparsity.quantize import dequantize
from tests.cast_train.conftest import llama_dir
from tests.scripts import load_script

__all__ = ["llama_dir"]


def test_the_twins_hold_the_same_numbers(llama_dir: Path, tmp_path: Path) -> None:
    script = load_script("random-llama")

    shutil.copytree(llama_dir, tmp_path / "random")
    script.write_twins(tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["dense", "dense-int8", "int4", "int8", "sparse"]
    dense, dense_int8, int4, int8, sparse = (
        load_file(tmp_path / folder / "model.safetensors") for folder in folders
    )
    for bits in ("int8", "int4"):
        summary = inspect(tmp_path / bits)
        assert (summary["quantized"], summary["head"]) == (bits, "int8")
    names = json.loads((tmp_path / "dense/cast.json").read_text())["targets"]
    assert len(names) == 14
    for name in names:
        weight = dense[f"{name}.weight"]
        assert int(weight.count_nonzero()) * 2 == weight.numel()
        for twin in (sparse, int8):
            kept = decompress(
                twin[f"{name}.compressed"], twin[f"{name}.bitmask"], weight.shape[1], name
            )
            stored = dense if twin is sparse else dense_int8
            assert torch.equal(kept, stored[f"{name}.weight"])
        assert torch.equal(int4[f"{name}.bitmask"], int8[f"{name}.bitmask"])
        scale = dense_int8[f"{name}.weight_scale"]
        assert torch.equal(scale, int8[f"{name}.weight_scale"])
        assert scale.dtype == weight.dtype
        error = dequantize(dense_int8[f"{name}.weight"], scale).float() - weight.float()
        assert error.norm() < 0.02 * weight.float().norm()
    others = {name for name in dense if name.removesuffix(".weight") not in names}
    assert others == set(dense_int8) - {
        f"{n}.{p}" for n in names for p in ("weight", "weight_scale")
    }
    assert all(torch.equal(dense[name], dense_int8[name]) for name in others)

    config = json.loads((tmp_path / "dense-int8/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert "sparsity_config" not in quantization
    assert (quantization["format"], quantization["ignore"]) == ("int-quantized", ["lm_head"])
    assert config == json.loads((tmp_path / "dense/config.json").read_text())
    files = {path.name for path in (tmp_path / "dense").iterdir()} - {"cast.json"}
    assert {path.name for path in (tmp_path / "dense-int8").iterdir()} == files
