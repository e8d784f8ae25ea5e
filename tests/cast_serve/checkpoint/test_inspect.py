import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.quantization import Quantization
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
    assert (count_sparse(source)[0], count_sparse(tmp_path / "out")) == (0, (14, False))


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
        count_sparse(tmp_path)


UP = "model.layers.0.mlp.up_proj"
Damage = Callable[[dict[str, Tensor]], None]


def test_inspect_counts_int8_and_scales(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    plain = convert(source, tmp_path / "bf16")
    assert (plain["quantized"], plain["head"], plain["bits_per_weight"]) == (None, None, 9)
    convert(source, tmp_path / "out", quantization=Quantization("int8", head="int8"))
    summary = inspect(tmp_path / "out")
    assert (summary["kind"], summary["quantized"], summary["head"]) == (
        "compressed",
        "int8",
        "int8",
    )
    assert (summary["num_sparse_layers"], summary["num_dense_layers"]) == (14, 1)
    num_weights = inspect(source)["linear_weight_bytes"] // 2
    num_rows = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)  # q k v o gate up down, two layers
    stored = num_weights * 5 // 8 + num_rows * 2
    assert summary["linear_weight_bytes"] == stored
    assert summary["dense_linear_weight_bytes"] == num_weights * 2
    assert summary["bits_per_weight"] == round(8 * stored / num_weights, 4)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert summary["total_weight_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert inspect(source)["bits_per_weight"] == 16


def damaged(folder: Path, damage: Damage) -> Path:
    record = json.loads((folder / "cast.json").read_text())
    (folder / "cast.json").write_text(json.dumps(record | {"sha256": {}}))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def put(name: str, row: int, value: float) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][row, 0] = value

    return damage


def drop(name: str) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return damage


def replace(name: str, tensor: Tensor) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(f"{UP}.weight_scale"), f"{UP} is in 8 bits, but has no {UP}.weight_scale"),
        (drop(f"{UP}.bitmask"), f"{UP} lacks bitmask"),
        (put(f"{UP}.weight_scale", 5, torch.nan), f"{UP}.weight_scale: scale 0 of row 5 is nan"),
        (put(f"{UP}.weight_scale", 6, torch.inf), f"{UP}.weight_scale: scale 0 of row 6 is inf"),
        (put(f"{UP}.weight_scale", 7, 0), f"{UP}.weight_scale: scale 0 of row 7 is 0.0, but a"),
        (put(f"{UP}.weight_scale", 8, -1), f"{UP}.weight_scale: scale 0 of row 8 is -1.0"),
        (replace(f"{UP}.weight_scale", torch.ones(1)), r"\[1\], but \[64, 1\] .*cast-serve conv"),
        (put(f"{UP}.compressed", 9, -128), f"{UP}.compressed: row 9 holds -128"),
        (put(f"{UP}.bitmask", 3, 0xF3), f"{UP}: 1 groups of the bitmask .* row 3, group 1"),
        (replace(f"{UP}.shape", torch.tensor([[64], [64]])), r"belong to shape \[64, 64\]"),
        (replace(f"{UP}.compressed", torch.ones(64, 16)), "float32 with a scale, but int8"),
        (drop("lm_head.weight_scale"), "lm_head is in 8 bits, but has no lm_head.weight_scale"),
        (put("lm_head.weight_scale", 4, 0), "lm_head.weight_scale: scale 0 of row 4 is 0.0"),
        (put("lm_head.weight", 11, -128), "lm_head.weight: row 11 holds -128"),
    ],
)
def test_inspect_finds_damage_in_int8(
    damage: Damage, message: str, save_gated: Save, tmp_path: Path
) -> None:
    convert(
        save_gated(tiny_llama()), tmp_path / "out", quantization=Quantization("int8", head="int8")
    )
    with pytest.raises((CheckpointError, PatternError), match=message):
        inspect(damaged(tmp_path / "out", damage))


def test_minus_128_is_read_where_another_program_quantised(
    save_gated: Save, tmp_path: Path
) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out", quantization=Quantization("int8"))
    folder = damaged(tmp_path / "out", put(f"{UP}.compressed", 9, -128))
    (folder / "cast.json").unlink()
    assert inspect(folder)["quantized"] == "int8"
