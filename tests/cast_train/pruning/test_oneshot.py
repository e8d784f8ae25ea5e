import json

import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError, sha256, verify
from cast_serve.sparsity.pattern import TWO_FOUR, check_weight
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.compressed import load_compressed
from cast_train.checkpoint.models import load_dense
from cast_train.config import Fixed
from cast_train.pruning import oneshot


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_directory_has_exact_zeros(model_dir, text_file, tmp_path, monkeypatch, method):
    monkeypatch.setattr(oneshot, "Fixed", lambda: Fixed(block_size=32, calibration_blocks=4))
    record = oneshot.write_pruned(model_dir, [text_file], tmp_path / "out", method)
    assert (record["kind"], record["method"], record["n"], record["m"]) == ("pruned", method, 2, 4)
    assert verify(tmp_path / "out") == record
    model = load_dense(tmp_path / "out")
    targets, _ = find_targets(model, TWO_FOUR)
    assert record["targets"] == list(targets)
    for name, linear in targets.items():
        check_weight(linear.weight, TWO_FOUR, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_excluded_linears_stay_dense(llama_dir, tmp_path):
    record = oneshot.write_pruned(
        llama_dir, [], tmp_path / "out", "magnitude", exclude=[r"layers\.0\.", "o_proj"]
    )
    model, before = load_dense(tmp_path / "out"), load_dense(llama_dir)
    pruned = {f"model.layers.1.self_attn.{p}_proj" for p in "qkv"}
    pruned |= {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert set(record["targets"]) == pruned
    for name, module in find_targets(before, TWO_FOUR)[0].items():
        is_same = torch.equal(model.get_submodule(name).weight, module.weight)
        assert is_same == (name not in pruned)


def test_the_record_says_whose_mask_was_taken(llama_dir, tmp_path):
    oneshot.write_pruned(llama_dir, [], tmp_path / "pruned", "magnitude")
    record = oneshot.write_pruned(
        llama_dir, [], tmp_path / "out", "mask", mask_dir=tmp_path / "pruned"
    )
    wanted = sha256(tmp_path / "pruned/model.safetensors")
    assert record["mask_of"]["model.safetensors"] == wanted


def test_what_is_dense_in_the_mask_stays_dense(llama_dir, tmp_path):
    oneshot.write_pruned(llama_dir, [], tmp_path / "pruned", "magnitude")
    cast = tmp_path / "pruned/cast.json"
    record = json.loads(cast.read_text())
    record["kept_dense"] = [record["targets"].pop(), "no.linear"]
    cast.write_text(json.dumps(record))
    found = oneshot.write_pruned(
        llama_dir, [], tmp_path / "out", "mask", mask_dir=tmp_path / "pruned"
    )
    assert found["targets"] == record["targets"]
    assert found["kept_dense"] == record["kept_dense"][:1]


def test_wrong_use_is_refused_and_leaves_nothing(llama_dir, tmp_path):
    with pytest.raises(
        ValueError, match="'random' does not exist; choose from magnitude, wanda, sparsegpt, mask"
    ):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "random")
    with pytest.raises(ValueError, match="no text file is given"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "wanda")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "magnitude")


def test_the_mask_of_quantised_weights_is_their_bitmask(large_weights_dir, tmp_path):
    """Of which some kept ones are 0 in 4 bits."""
    oneshot.write_pruned(large_weights_dir, [], tmp_path / "pruned", "magnitude")
    convert(tmp_path / "pruned", tmp_path / "int4", quantization=Quantization("int4"))
    targets, _ = find_targets(load_dense(large_weights_dir, torch.float32), TWO_FOUR)
    wanted = oneshot.read_masks(tmp_path / "pruned", targets, dict.fromkeys(targets, TWO_FOUR))
    found = oneshot.read_masks(tmp_path / "int4", targets, dict.fromkeys(targets, TWO_FOUR))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    values = load_compressed(tmp_path / "int4", torch.float32).state_dict()
    assert any(not values[f"{name}.weight"][mask].all() for name, mask in wanted.items())


@pytest.mark.parametrize("zeros", [45.0, float("nan"), 0.6, 0.0])
def test_a_share_of_zeros_that_there_is_not_is_refused(zeros, llama_dir, tmp_path):
    with pytest.raises(ValueError, match=r"not a share above 0 and up to 0\.5, the most that 2:4"):
        oneshot.write_pruned(llama_dir, [], tmp_path / "out", "magnitude", zeros=zeros)
