import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.record import CheckpointError, sha256
from cast_serve.sparsity.bitmask import decompress
from cast_serve.sparsity.pattern import PatternError, hard_mask
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama


def all_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_gated_is_hardened_by_its_gates(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    summary = convert(source, tmp_path / "out")
    assert summary["kind"] == "compressed"
    assert summary["num_sparse_layers"] == 14
    assert summary["linear_bytes_ratio"] == 0.5625
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert not [name for name in after if name.endswith(".gate")]
    for name in json.loads((source / "cast.json").read_text())["targets"]:
        weight, gate = before[f"{name}.weight"], before[f"{name}.gate"]
        assert f"{name}.weight" not in after
        assert after[f"{name}.shape"].flatten().tolist() == list(weight.shape)
        dense = decompress(
            after[f"{name}.compressed"], after[f"{name}.bitmask"], weight.shape[1], name
        )
        assert torch.equal(dense, weight * hard_mask(gate))
    others = [name for name in before if "norm" in name or "embed" in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_config_is_what_old_readers_expect(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    convert(source, tmp_path / "out")
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["sparsity_config"] == {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "registry_requires_subclass": False,
    }
    cast = json.loads((tmp_path / "out/cast.json").read_text())
    assert cast["method"] == "gates"
    assert cast["converted_from"] == {"model.safetensors": sha256(source / "model.safetensors")}
    assert "source" not in cast  # the fixture says nothing of training


def test_what_training_read_is_kept(save_gated: Save, tmp_path: Path) -> None:
    """From cast.json alone it can be told what a served directory was made from."""
    trained = {
        "model": "m",
        "model_sha256": {"model.safetensors": "a"},
        "text": [{"name": "t", "sha256": "b"}],
        "teacher": "t",
        "teacher_sha256": {"model.safetensors": "c"},
    }
    source = save_gated(tiny_llama(), source=trained)
    convert(source, tmp_path / "out", tmp_path / "twin")
    for folder in ("out", "twin"):
        cast = json.loads((tmp_path / folder / "cast.json").read_text())
        assert cast["source"] == trained
        assert list(cast["converted_from"]) == ["model.safetensors"]
        assert list(cast["sha256"]) == ["model.safetensors"]


def test_another_source_than_was_converted_is_named(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tiny_llama()), tmp_path / "out"
    convert(source, out)
    check_converted(source, out)
    model = tiny_llama()
    torch.manual_seed(1)
    save_gated(model)  # trained anew: other gates under the same name
    message = r"not converted from what .*gated holds now: model\.safetensors differ; remove"
    with pytest.raises(CheckpointError, match=message):
        check_converted(source, out)
    cast = json.loads((out / "cast.json").read_text())
    cast["source"] = cast.pop("converted_from")  # as earlier releases wrote it
    (out / "cast.json").write_text(json.dumps(cast))
    assert inspect(out)["kind"] == "compressed"
    with pytest.raises(CheckpointError, match="has no converted_from.*convert .* again"):
        check_converted(source, out)


def test_the_dense_twin_computes_the_same_model(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama(), max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "out", tmp_path / "twin")
    assert count_sparse(tmp_path / "out") == (14, False)
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(
            torch.arange(12)[None]
        ).logits
        for folder in (source, tmp_path / "twin")
    ]
    assert torch.equal(*logits)
    assert inspect(tmp_path / "twin")["kind"] == "pruned"


def test_gpt2_stores_its_weights_the_other_way_round(save_gated: Save, tmp_path: Path) -> None:
    model = tiny_gpt2()
    source = save_gated(model)
    tensors = all_tensors(source)
    name = "transformer.h.0.attn.c_attn"
    tensors[f"{name}.gate"] = torch.randn(32, 96)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cast = json.loads((source / "cast.json").read_text())
    del cast["sha256"]
    (source / "cast.json").write_text(json.dumps(cast))
    convert(source, tmp_path / "out", tmp_path / "twin")
    expected = tensors[f"{name}.weight"].T * hard_mask(tensors[f"{name}.gate"].T)
    out = all_tensors(tmp_path / "out")
    assert out[f"{name}.shape"].flatten().tolist() == [96, 32]
    dense = decompress(out[f"{name}.compressed"], out[f"{name}.bitmask"], 32)
    assert torch.equal(dense, expected)
    assert torch.equal(all_tensors(tmp_path / "twin")[f"{name}.weight"], expected.T)


def assert_refused(source: Path, tmp_path: Path, error: type[Exception], message: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out", tmp_path / "twin")
    assert sorted(tmp_path.iterdir()) == before


def test_refuses_a_group_that_is_not_two_of_four(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama())
    tensors = all_tensors(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:8] = 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = r"model.layers.1.mlp.up_proj: 1 of 512 groups .* row 3, group 1"
    assert_refused(source, tmp_path, PatternError, message)


def test_all_that_belongs_to_the_model_is_carried_over(save_pruned: Save, tmp_path: Path) -> None:
    """Of a sharded source; other formats' weights are not copied."""
    source = save_pruned(tiny_llama(), max_shard_size="20KB")
    small = {
        "generation_config.json": '{"do_sample": true, "temperature": 0.5}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "a b",
        "LICENSE": "terms",
    }
    for name, text in small.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("A card.")
    (source / "README.md").chmod(0o444)  # which a card that is written anew must not keep
    for name in ("model.gguf", "model.onnx", "pytorch_model.bin", ".env", "train.log"):
        (source / name).write_bytes(b"other weights")
    convert(source, tmp_path / "out", tmp_path / "twin")
    for folder in (tmp_path / "out", tmp_path / "twin"):
        assert {name: (folder / name).read_text() for name in small} == small
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = all_tensors(folder)
        assert set(index["weight_map"]) == set(tensors)
        assert len(set(index["weight_map"].values())) > 1
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert index["metadata"]["total_size"] == total
        assert not [path for path in folder.iterdir() if path.read_bytes() == b"other weights"]


def test_a_shard_of_gates_alone_leaves_an_index_behind(save_gated: Save, tmp_path: Path) -> None:
    """What is left then is one shard with another name than readers look for."""
    source = save_gated(tiny_llama())
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    hashes = {}
    for number, is_gate in ((1, False), (2, True)):
        name = f"model-{number:05}-of-00002.safetensors"
        part = {key: t for key, t in tensors.items() if key.endswith(".gate") == is_gate}
        save_file(part, source / name, metadata={"format": "pt"})
        hashes[name] = sha256(source / name)
    edit_json(source / "cast.json", sha256=hashes)
    convert(source, tmp_path / "out", tmp_path / "twin")
    assert len(list((tmp_path / "twin").glob("*.safetensors"))) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.bfloat16)
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])


def test_refuses_a_changed_shard(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    tensors = all_tensors(source)
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(source, tmp_path, CheckpointError, "was changed or damaged")


def test_refuses_nan_gates(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(), sha256={})
    tensors = all_tensors(source)
    tensors["model.layers.0.mlp.up_proj.gate"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(
        source, tmp_path, PatternError, "model.layers.0.mlp.up_proj.gate: scores hold NaN"
    )


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_gate_may_be_the_mask_itself(save_gated: Save, tmp_path: Path, is_whole: bool) -> None:
    source = save_gated(tiny_llama(), sha256={})
    convert(source, tmp_path / "of logits")
    tensors = all_tensors(source)
    for name in [name for name in tensors if name.endswith(".gate")]:
        tensors[name] = hard_mask(tensors[name])
    if not is_whole:
        tensors["model.layers.0.mlp.up_proj.gate"][0, :4] = True
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if not is_whole:
        wanted = "up_proj.gate is a mask that does not keep 2 of every 4 weights"
        assert_refused(source, tmp_path, PatternError, wanted)
        return
    convert(source, tmp_path / "of masks")
    of_logits, of_masks = (all_tensors(tmp_path / f"of {kind}") for kind in ("logits", "masks"))
    assert of_logits.keys() == of_masks.keys()
    assert all(torch.equal(value, of_masks[name]) for name, value in of_logits.items())


def test_refuses_another_format_version(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(), format_version=7)
    assert_refused(source, tmp_path, CheckpointError, "format_version 7, but this program reads 1")


def test_refuses_columns_and_groups_that_have_no_compressed_form(
    save_gated: Save, tmp_path: Path
) -> None:
    """As earlier releases trained them: groups of 8 in 32 columns, and groups of 16 / 3."""
    source = save_gated(tiny_llama())
    edit_json(source / "cast.json", n=4, m=8)
    message = (
        r"_proj: in_features 32 is not a positive multiple of 64, so it cannot be stored as 32:64; "
    )
    assert_refused(source, tmp_path, PatternError, message)
    edit_json(source / "cast.json", n=3, m=5)
    assert_refused(source, tmp_path, PatternError, "3:5 has no .* 5 does not divide 64")


def test_refuses_a_missing_gate(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(), sha256={})
    tensors = all_tensors(source)
    del tensors["model.layers.0.mlp.up_proj.gate"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(source, tmp_path, CheckpointError, "no tensor model.layers.0.mlp.up_proj.gate")


def test_refuses_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is neither a directory nor a model's name"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no config.json"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        convert(tmp_path, tmp_path / "out")


def test_refuses_an_existing_output_and_a_compressed_source(
    save_gated: Save, tmp_path: Path
) -> None:
    source = save_gated(tiny_llama())
    convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is compressed already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_refuses_a_quantised_source(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama())
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq"})
    assert_refused(source, tmp_path, CheckpointError, r"is quantised \(gptq\)")
