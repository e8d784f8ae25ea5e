import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError, read_record, sha256, verify
from cast_serve.sparsity.pattern import TWO_FOUR
from cast_serve.sparsity.quantize import rounded
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import conv1d, models
from cast_train.checkpoint.compressed import load_compressed
from cast_train.checkpoint.models import (
    load_dense,
    load_gated,
    load_tokenizer,
    load_unmasked,
)
from cast_train.config import TrainConfig
from cast_train.evaluate.evaluation import evaluate
from cast_train.gates import gating
from cast_train.pruning.oneshot import write_pruned
from cast_train.training.run import train
from tests.cast_train.training.test_architectures import FAMILIES

TOKENS = torch.arange(64).view(2, 32)
END = {"blend": 1.0, "tau": 1e-3, "penalty_weight": 0.0, "is_hard": True}


@pytest.fixture
def gated(model_dir, tmp_path):
    """A gated checkpoint with random logits: its directory, and the logits."""
    model = load_dense(model_dir)
    targets, _ = find_targets(model, TWO_FOUR)
    generator = torch.Generator().manual_seed(0)
    logits = {
        f"{name}.gate": torch.randn(linear.weight.shape, generator=generator)
        for name, linear in targets.items()
    }
    record = {
        "kind": "gated",
        "method": "gates",
        "n": 2,
        "m": 4,
        "targets": list(targets),
        "schedules_end": END,
    }
    models.write(
        tmp_path / "gated", model, load_tokenizer(model_dir), record, logits, source=model_dir
    )
    return tmp_path / "gated", logits


def test_what_is_written_is_read(gated, model_dir):
    folder, logits = gated
    found = models.read_gates(folder, [name.removesuffix(".gate") for name in logits])
    found = conv1d.transposed(load_dense(model_dir), found)
    assert found.keys() == logits.keys()
    assert all(torch.equal(found[name], logits[name]) for name in logits)
    dense = load_dense(model_dir).state_dict()
    assert all(
        torch.equal(tensor, dense[name])
        for name, tensor in load_unmasked(folder).state_dict().items()
    )
    record = verify(folder)
    assert record["format_version"] == 1
    assert set(record["sha256"]) == {"model.safetensors"}
    assert set(record["versions"]) == {"cast-serve", "torch", "transformers", "safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["gated"]


def test_a_gated_directory_is_not_taken_for_a_dense_one(gated):
    folder, _ = gated
    assert AutoConfig.from_pretrained(folder).quantization_config == {"quant_method": "cast_gated"}
    with pytest.raises(CheckpointError, match="gated is gated; give the dense model"):
        load_dense(folder)
    convert(folder, folder.parent / "compressed", folder.parent / "twin")
    with pytest.raises(CheckpointError, match="compressed is compressed; give the dense model"):
        load_dense(folder.parent / "compressed")
    assert load_dense(folder.parent / "twin").config.hidden_size


def test_gates_are_no_news_but_unknown_tensors_are(gated, model_dir, tmp_path, capfd, caplog):
    folder, _ = gated
    load_gated(folder)
    assert "LOAD REPORT" not in "".join(capfd.readouterr()) + caplog.text
    assert "ignoring" not in caplog.text

    odd = tmp_path / "odd"
    shutil.copytree(model_dir, odd)
    tensors = load_file(odd / "model.safetensors")
    save_file(tensors | {"model.extra": torch.ones(1)}, odd / "model.safetensors", {"format": "pt"})
    load_dense(odd)
    assert "ignoring 1 tensors that the model does not use, such as model.extra" in caplog.text


def test_hardened_compressed_and_hard_gates_agree(gated):
    folder, _ = gated
    convert(folder, folder.parent / "compressed")
    model, gate_map, last = load_gated(folder, torch.float32)
    gating.set_phase(gate_map, last)
    compressed = load_compressed(folder.parent / "compressed", torch.float32)
    torch.testing.assert_close(compressed(TOKENS).logits, model(TOKENS).logits)
    kinds = [models.kind_of(folder), models.kind_of(folder.parent / "compressed")]
    assert kinds == ["gated", "compressed"]


@pytest.mark.parametrize("head", [None, "int8"])
def test_int8_is_dequantised_as_in_its_dense_twin(gated, head):
    folder, _ = gated
    out, twin = folder.parent / "int8", folder.parent / "twin"
    convert(folder, out, twin, quantization=Quantization("int8", head=head))
    found, expected = load_compressed(out), load_dense(twin)
    expected_state = expected.state_dict()
    assert found.state_dict().keys() == expected_state.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name
    assert models.kind_of(out) == "compressed"
    assert not torch.equal(found(TOKENS).logits, expected(TOKENS).logits)
    quantized = [*read_record(out)["targets"], *(["lm_head"] if head else [])]
    for name in quantized:  # as served, activations are rounded too
        linear = expected.get_submodule(name)
        linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)
    hardened = load_compressed(convert_plain(folder))
    assert not torch.equal(found(TOKENS).logits, hardened(TOKENS).logits)


def convert_plain(folder):
    convert(folder, folder.parent / "plain")
    return folder.parent / "plain"


def test_int8_without_its_scale_is_refused(gated):
    folder, _ = gated
    out = folder.parent / "int8"
    convert(folder, out, quantization=Quantization("int8"))
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    del tensors[name]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is in 8 bits, but has no {name}"):
        load_compressed(out)


def test_a_changed_shard_is_found(gated):
    folder, _ = gated
    shard = folder / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors has sha256 .* changed or damaged"
    ):
        load_gated(folder)


def test_a_missing_gate_is_named(gated):
    folder, logits = gated
    name = next(iter(logits))
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    record = json.loads((folder / "cast.json").read_text())
    record["sha256"]["model.safetensors"] = sha256(folder / "model.safetensors")
    (folder / "cast.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"no gates for {name.removesuffix('.gate')}"):
        load_gated(folder)


def test_card_and_licence_go_with_the_model(model_dir, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("README.md", "LICENSE.txt", "NOTICE", "pytorch_model.bin"):
        (source / name).write_text(name)
    model, tokenizer = load_dense(model_dir), load_tokenizer(model_dir)
    models.write(tmp_path / "out", model, tokenizer, {"kind": "pruned"}, source=source)
    assert (tmp_path / "out/LICENSE.txt").read_text() == "LICENSE.txt"
    assert {"README.md", "LICENSE.txt", "NOTICE"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_a_failed_write_leaves_nothing(model_dir, tmp_path):
    class NoTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models.write(tmp_path / "out", load_dense(model_dir), NoTokenizer(), {}, source=model_dir)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_the_way_is_refused(gated, model_dir):
    folder, _ = gated
    with pytest.raises(CheckpointError, match="gated exists already; remove it or choose another"):
        models.write(folder, load_dense(model_dir), None, {}, source=model_dir)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_dense(tmp_path / "org" / "model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_dense(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json holds list, not a JSON object"),
        ("config.json", "{", "config.json is not readable JSON"),
        ("model.safetensors", "cut off", "cannot be read as safetensors"),
    ],
)
def test_a_damaged_file_is_named(file, content, message, gated):
    folder = convert_plain(gated[0])
    if file == "config.json":
        (folder / file).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            models.kind_of(folder)
        return
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_compressed(folder)


def test_a_record_without_a_kind_is_of_a_dense_model(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "dense")
    (tmp_path / "dense/cast.json").write_text('{"format_version": 1, "sha256": {}}')
    assert models.kind_of(tmp_path / "dense") == "dense"


def test_a_straight_through_mask_is_never_soft(model_dir, text_file, settings_file, tmp_path):
    config = TrainConfig.from_toml(settings_file, ["start=magnitude"], method="ste", steps=2)
    record = train(model_dir, [text_file], tmp_path / "out", config)
    found, _ = evaluate(tmp_path / "out", [text_file], context=32, max_tokens=128)
    assert found["perplexity_soft"] == found["perplexity_hard"]
    assert record["quality"]["perplexity_soft"] == record["quality"]["perplexity_hard"]


def test_an_output_layer_that_is_missing_is_named(llama_dir, tmp_path):
    """Where it is not tied to the embedding, its weights would be by chance."""
    config = AutoConfig.from_pretrained(llama_dir, tie_word_embeddings=False)
    dense = tmp_path / "dense"
    shutil.copytree(llama_dir, dense)
    LlamaForCausalLM(config).save_pretrained(dense)
    write_pruned(dense, [], tmp_path / "pruned", "magnitude")
    out = tmp_path / "out"
    convert(tmp_path / "pruned", out)
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks \['lm_head.weight'\]"):
        load_compressed(out)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_weight_of_another_shape_is_named(is_compressed, llama_dir, tmp_path):
    folder = tmp_path / "pruned"
    write_pruned(llama_dir, [], folder, "magnitude")
    if is_compressed:
        folder = tmp_path / "compressed"
        convert(tmp_path / "pruned", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    load = load_compressed if is_compressed else load_dense
    with pytest.raises(CheckpointError, match=r"embed_tokens.*copy the whole directory again"):
        load(folder)
    if is_compressed:
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        with pytest.raises(CheckpointError, match=r"layers\.1\..*its config.json does not know"):
            load(folder)


def test_gemma2s_scores_are_capped_as_they_are_served(tmp_path):
    config, _ = FAMILIES["gemma2"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(1000)
    model.save_pretrained(tmp_path / "dense")
    found = load_unmasked(tmp_path / "dense", torch.float32)
    wanted = model.eval()(TOKENS).logits
    torch.testing.assert_close(found(TOKENS).logits, wanted)
    found.set_attn_implementation("sdpa")
    assert not torch.allclose(found(TOKENS).logits, wanted, rtol=1e-2)


def with_other_tokens(llama_dir, folder, num):
    """The model with as many tokens, of which the first `num` are turned round."""
    shutil.copytree(llama_dir, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens[:num] = tokens[:num][::-1]
    content["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_models_whose_tokens_are_other_texts_are_not_compared(
    llama_dir, text_file, settings_file, tmp_path
):
    other = with_other_tokens(llama_dir, tmp_path / "other", 250)
    with pytest.raises(CheckpointError, match="have different tokenizers: 250 of 256 tokens"):
        evaluate(llama_dir, [text_file], 32, 128, reference=other)
    config = TrainConfig.from_toml(settings_file, steps=1)
    with pytest.raises(CheckpointError, match="have different tokenizers"):
        train(llama_dir, [text_file], tmp_path / "out", config, teacher_dir=other)
    renamed = with_other_tokens(llama_dir, tmp_path / "renamed", 10)
    figures, _ = evaluate(llama_dir, [text_file], 32, 128, reference=renamed)
    assert figures["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)


def test_a_text_that_was_trained_on_is_no_test(
    llama_dir, text_file, heldout_file, settings_file, tmp_path, caplog
):
    config = TrainConfig.from_toml(settings_file, steps=1)
    train(llama_dir, [text_file], tmp_path / "out", config)
    evaluate(tmp_path / "out", [heldout_file], 32, 128)
    assert "no test" not in caplog.text
    evaluate(tmp_path / "out", [text_file], 32, 128)
    assert f"was trained on {text_file.name}" in caplog.text
