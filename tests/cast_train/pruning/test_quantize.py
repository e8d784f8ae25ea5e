import json

import pytest
import torch

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask
from cast_train.checkpoint.compressed import load_compressed
from cast_train.checkpoint.models import load_any, load_tokenizer
from cast_train.config import Fixed, TrainConfig
from cast_train.pruning import oneshot, quantize
from cast_train.pruning.quantize import DAMPING, quantize_linear, write_quantized
from tests.cast_train.pruning.test_solve import random_problem


@pytest.fixture
def few_blocks(monkeypatch):
    settings = Fixed(block_size=32, calibration_blocks=4)
    monkeypatch.setattr(oneshot, "Fixed", lambda: settings)


def compressed(num_columns=160, pattern=TWO_FOUR):
    weight, inputs = random_problem(8, num_columns)
    inputs[:, 1] = 0  # an input that says nothing
    weight = (weight * hard_mask(weight.abs(), pattern)).bfloat16()
    return CompressedLinear.from_weight("q", weight, pattern), inputs.float()


@pytest.mark.parametrize(
    ("kind", "scale_group", "share"),
    [("int4", 128, 0.6), ("int4", 32, 0.6), ("int8", 128, 0.6)],
)
@pytest.mark.parametrize(("columns", "pattern"), [(160, TWO_FOUR), (192, Pattern(40, 64))])
def test_the_outputs_are_nearer_than_those_of_rounding(kind, scale_group, share, columns, pattern):
    linear, inputs = compressed(columns, pattern)
    asked = Quantization(kind, scale_group)
    found = quantize_linear(linear, inputs.t() @ inputs, asked)
    nearest = linear.quantize(asked)

    def errors(candidate):
        difference = candidate.dense(torch.float32) - linear.dense().float()
        return (inputs @ difference.t()).square().sum(0)

    assert errors(found).sum() < share * errors(nearest).sum()
    assert found.scale_group == nearest.scale_group
    assert (found.values.dtype, found.scale.shape) == (torch.int8, nearest.scale.shape)
    assert torch.equal(found.bitmask, linear.bitmask)
    assert found.values.abs().max() <= (7 if kind == "int4" else 127)


def test_no_single_integer_could_be_better(monkeypatch):
    """Where the descent has ended, no step of one integer by one lowers the error."""
    monkeypatch.setattr(quantize, "SWEEPS", 50)
    linear, inputs = compressed(32)
    hessian = inputs.t() @ inputs + 5 * torch.eye(32)
    found = quantize_linear(linear, hessian, Quantization("int4", 32))
    weight, mask = linear.dense().float(), linear.dense() != 0
    step = found.scale.float()

    def error(candidate, row):
        difference = candidate - weight[row]
        damping = DAMPING * hessian.diagonal().mean()
        return difference @ (hessian + damping * torch.eye(32)) @ difference

    tried = 0
    for row in range(8):
        best = found.dense(torch.float32)[row]
        for column in mask[row].nonzero()[:, 0].tolist():
            for sign in (-1, 1):
                other = best.clone()
                other[column] += sign * step[row, 0]
                if (other[column] / step[row, 0]).abs().round() <= 7:
                    tried += 1
                    assert error(other, row) >= error(best, row) * (1 - 1e-4)
    assert tried > 200


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_is_written_is_what_convert_would_but_for_the_values(
    few_blocks, model_dir, text_file, tmp_path, kind
):
    """Also of weights that are stored transposed, and of an output layer that is tied."""
    source, out, nearest = (tmp_path / name for name in ("source", "out", "nearest"))
    oneshot.write_pruned(model_dir, [], source, "magnitude")
    asked = Quantization(kind, head="int8")
    summary = write_quantized(source, [text_file], out, asked)
    longer = write_quantized(source, [text_file], tmp_path / "longer", asked, 8)
    assert longer == summary
    record = json.loads((tmp_path / "longer/cast.json").read_text())
    assert record["quantization"]["calibration"]["num_tokens"] == 256
    convert(source, nearest, quantization=asked)
    assert summary == inspect(nearest)
    check_converted(source, out, quantization=asked)
    record = json.loads((out / "cast.json").read_text())
    calibration = record["quantization"].pop("calibration")
    assert calibration["text"][0]["name"] == text_file.name
    assert calibration["num_tokens"] == 128
    assert record["quantization"] == json.loads((nearest / "cast.json").read_text())["quantization"]

    tokens = torch.tensor([load_tokenizer(source)(text_file.read_text()[:128]).input_ids])
    pruned = load_any(source, torch.float32)
    with torch.no_grad():
        wanted = pruned(tokens).logits
        errors = [
            (load_compressed(folder, torch.float32)(tokens).logits - wanted).norm()
            for folder in (out, nearest)
        ]
    assert errors[0] < errors[1]


def test_every_kind_of_source_gives_the_same(
    few_blocks, llama_dir, text_file, settings_file, tmp_path
):
    from cast_train.training.run import train

    train(llama_dir, [text_file], tmp_path / "gated", TrainConfig.from_toml(settings_file, steps=1))
    convert(tmp_path / "gated", tmp_path / "compressed")
    found = []
    for kind in ("gated", "compressed"):
        write_quantized(
            tmp_path / kind, [text_file], tmp_path / f"{kind}4", Quantization("int4", 32)
        )
        found.append(load_compressed(tmp_path / f"{kind}4").state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_dense_model_is_64_of_64(few_blocks, words_dir, text_file, tmp_path):
    asked, pattern = Quantization("int4", 64, "int4"), Pattern(64, 64)
    found = write_quantized(words_dir, [text_file], tmp_path / "out", asked, pattern=pattern)
    assert (found["pattern"], found["zeros"]) == ("64:64", 0)
    assert found == convert(words_dir, tmp_path / "near", quantization=asked, pattern=pattern)
    with pytest.raises(ValueError, match="64:64, which keeps every weight.* in 4 bits only"):
        convert(words_dir, tmp_path / "int8", quantization=Quantization("int8"), pattern=pattern)
    with pytest.raises(ValueError, match="64:64, which keeps every weight.* in 4 bits only"):
        convert(words_dir, tmp_path / "bf16", pattern=pattern)


def test_wrong_use_leaves_nothing(few_blocks, llama_dir, text_file, tmp_path):
    oneshot.write_pruned(llama_dir, [], tmp_path / "pruned", "magnitude")
    convert(tmp_path / "pruned", tmp_path / "int8", quantization=Quantization("int8"))
    there = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"is already quantised \(int8\)"):
        write_quantized(tmp_path / "int8", [text_file], tmp_path / "out", Quantization("int4"))
    with pytest.raises(ValueError, match="--scale-group 64 is not served"):
        Quantization("int8", 64)
    with pytest.raises(ValueError, match="groups do not have at most 2"):
        write_quantized(llama_dir, [text_file], tmp_path / "out", Quantization("int4"))
    assert set(tmp_path.iterdir()) == there
