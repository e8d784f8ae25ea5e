"""``sparse-bitmask`` of compressed-tensors 0.12.2 (fixtures/README.md) becomes N of 64, exactly."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.formats.ragged import unpacked
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.model import load
from cast_serve.sparsity.bitmask import pack_mask
from cast_serve.sparsity.pattern import Pattern, PatternError, hard_mask
from cast_serve.sparsity.quantize import SCALES_TAKEN_OVER
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json

FIXTURES = Path(__file__).parents[1] / "fixtures"
DECOMPRESSED: dict[str, dict[str, str]] = json.loads((FIXTURES / "decompressed.json").read_text())
LAYER = "model.layers.0"
DOWN, UP = f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj"
TOKENS = torch.arange(12)[None]
Copy = Callable[..., Path]


def ragged(weight: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors stores it."""
    counts = (weight != 0).sum(-1).view(-1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[weight != 0],
        "bitmask": pack_mask(weight != 0),
        "row_offsets": counts.cumsum(0) - counts,
    }


def replace_parts(folder: Path, module: str, parts: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if not k.startswith(f"{module}.")}
    tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def parts_of(folder: Path, module: str) -> dict[str, Tensor]:
    tensors = all_tensors(folder)
    return {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{module}.")}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """`folder = copy()`: a fixture that may be changed."""
    return lambda name="bf16-ragged": Path(shutil.copytree(FIXTURES / name, tmp_path / name))


@pytest.mark.parametrize("name", DECOMPRESSED)
def test_weights_are_those_that_compressed_tensors_decompresses(name: str, tmp_path: Path) -> None:
    summary = convert(FIXTURES / name, tmp_path / "out", tmp_path / "twin")
    assert (summary["kind"], summary["num_sparse_layers"]) == ("compressed", 7)
    assert summary["quantized"] == ("int8" if name == "int8-ragged" else None)
    out, twin = ModelDirectory(tmp_path / "out"), all_tensors(tmp_path / "twin")
    for linear, expected in DECOMPRESSED[name].items():
        stored = out.target(linear)
        unscaled = replace(stored, scale=None)
        data = unscaled.dense().contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == expected, linear
        assert torch.equal(stored.dense(), twin[f"{linear}.weight"])
        nonzeros = (unscaled.dense() != 0).unflatten(1, (-1, 64)).sum(-1)
        assert stored.pattern.m == 64
        assert stored.pattern.n >= int(nonzeros.max())
    assert not [key for key in all_tensors(tmp_path / "out") if key.endswith("row_offsets")]
    assert inspect(tmp_path / "out") == summary
    check_converted(FIXTURES / name, tmp_path / "out")


def test_a_constant_count_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = convert(FIXTURES / "bf16-ragged-16-32", tmp_path / "out")
    assert (summary["pattern"], summary["bits_per_weight"], summary["zeros"]) == ("32:64", 9.0, 0.5)
    assert caplog.text == ""


def test_other_counts_are_stored_in_the_least_n_and_the_cost_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = convert(FIXTURES / "bf16-ragged", tmp_path / "out")
    assert len(caplog.records) == 1
    assert "zeros are stored among the kept values of 36,864 weights" in caplog.text
    assert "where 50.0% are not zero" in caplog.text
    out = ModelDirectory(tmp_path / "out")
    kept = {name.rpartition(".")[2]: out.pattern_of(name).n for name in out.targets}
    assert all(n % 4 == 0 for n in kept.values())
    assert kept["q_proj"] == kept["k_proj"] == kept["v_proj"]  # vLLM merges them
    assert kept["gate_proj"] == kept["up_proj"]
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",)):
        most = max(
            int((out.target(name).dense() != 0).unflatten(1, (-1, 64)).sum(-1).max())
            for name in out.targets
            if name.endswith(group)
        )
        assert most <= kept[group[0]] < most + 4
    assert summary["zeros"] < 0.5
    assert json.loads((tmp_path / "out/cast.json").read_text())["m"] == 64


def test_int8_keeps_its_integers_and_scales(tmp_path: Path) -> None:
    convert(FIXTURES / "int8-ragged", tmp_path / "out")
    record = json.loads((tmp_path / "out/cast.json").read_text())["quantization"]
    assert record == {"quantize": "int8", "head": None, "scales": SCALES_TAKEN_OVER}
    before, after = all_tensors(FIXTURES / "int8-ragged"), all_tensors(tmp_path / "out")
    assert torch.equal(after[f"{UP}.weight_scale"], before[f"{UP}.weight_scale"])
    with pytest.raises(CheckpointError, match=r"is already quantised \(int8\)"):
        convert(FIXTURES / "int8-ragged", tmp_path / "int4", quantization=Quantization("int4"))


def test_float8_is_widened(copy: Copy, tmp_path: Path) -> None:
    source = copy("int8-ragged")
    tensors = all_tensors(source)
    for name in DECOMPRESSED["int8-ragged"]:
        tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", quantization_config=config | {"format": "float-quantized"})
    summary = convert(source, tmp_path / "out")
    assert (summary["quantized"], summary["num_sparse_layers"]) == (None, 7)
    parts = parts_of(source, UP)
    wide = unpacked(UP, parts).float() * parts["weight_scale"].float()
    assert torch.equal(ModelDirectory(tmp_path / "out").target(UP).dense(), wide.bfloat16())


def test_it_answers_as_its_twin_and_can_be_quantised(tmp_path: Path) -> None:
    source = FIXTURES / "bf16-ragged"
    convert(source, tmp_path / "out", tmp_path / "twin")
    model = load(tmp_path / "out", torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    torch.testing.assert_close(model(TOKENS).logits, twin(TOKENS).logits)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **asked), twin.generate(TOKENS, **asked))
    for way in (source, tmp_path / "out"):
        summary = convert(way, tmp_path / f"{way.name}-int4", quantization=Quantization("int4"))
        assert summary["quantized"] == "int4"


def test_two_of_four_is_stored_as_that(copy: Copy, tmp_path: Path) -> None:
    """So a GPU can serve it."""
    source = copy()
    for name in DECOMPRESSED["bf16-ragged"]:
        weight = unpacked(name, parts_of(source, name))
        weight = weight * hard_mask(weight.abs())
        weight[0, :64] = 0  # fewer than two
        replace_parts(source, name, ragged(weight))
    summary = convert(source, tmp_path / "out")
    assert (summary["pattern"], summary["bits_per_weight"]) == ("2:4", 9.0)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"


def test_full_words_and_other_modules_become_dense(
    copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Above 56 of 64; and embeddings and norms, which compressed-tensors may compress too."""
    source = copy()
    tensors = all_tensors(source)
    full = unpacked(DOWN, parts_of(source, DOWN))
    full[3, 64:124] = 2
    replace_parts(source, DOWN, ragged(full))
    for name in ("model.embed_tokens", "model.norm"):
        replace_parts(source, name, ragged(tensors[f"{name}.weight"]))
    with caplog.at_level(logging.WARNING):
        summary = convert(source, tmp_path / "out", tmp_path / "twin")
    assert f"1 linears become dense, such as {DOWN}: more than 56 of 64" in caplog.text
    assert (summary["num_sparse_layers"], summary["num_dense_layers"]) == (6, 2)
    for folder in ("out", "twin"):
        after = all_tensors(tmp_path / folder)
        assert torch.equal(after[f"{DOWN}.weight"], full)
        for name in ("model.embed_tokens", "model.norm"):
            assert torch.equal(after[f"{name}.weight"], tensors[f"{name}.weight"])
    load(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["ignore"] == ["lm_head", DOWN]
    with pytest.raises(CheckpointError, match="embed_tokens.weight as a bitmask; convert it with"):
        convert(source, tmp_path / "int8", quantization=Quantization("int8", head="int8"))


def test_a_model_without_zeros_is_refused(copy: Copy, tmp_path: Path) -> None:
    source = copy()
    for name in DECOMPRESSED["bf16-ragged"]:
        shape = parts_of(source, name)["shape"].tolist()
        replace_parts(source, name, ragged(torch.ones(shape).bfloat16()))
    with pytest.raises(PatternError, match="in each linear, a word of 64 columns keeps more than"):
        convert(source, tmp_path / "out")


def test_the_oldest_key(copy: Copy, tmp_path: Path) -> None:
    source = copy("bf16-ragged-16-32")
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")["sparsity_config"]
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out")["pattern"] == "32:64"
    assert "compression_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("row_offsets", lambda t: t + (torch.arange(128) == 5), "up_proj.row_offsets .* row is 5;"),
        ("row_offsets", lambda t: t[:-1], "up_proj.row_offsets do not belong"),
        ("compressed", lambda t: t[:-1], r"up_proj.compressed is \[4095\], .* has 4096 bits"),
        (
            "compressed",
            lambda t: t.view(torch.int16),
            "up_proj.compressed is torch.int16, but bf16",
        ),
        ("compressed", None, "up_proj lacks compressed of sparse-bitmask"),
        ("bitmask", None, "up_proj lacks bitmask of sparse-bitmask"),
        ("bitmask", lambda t: t[:-1], "up_proj.bitmask has 127 rows, but its shape 128"),
        ("bitmask", lambda t: t[:, :-1], "up_proj: torch.uint8 .* not a bitmask of 64 columns"),
        ("shape", lambda t: t * 0, r"up_proj.shape holds \[0, 0\], but one or two sizes"),
    ],
)
def test_damage_is_named(
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    message: str,
    copy: Copy,
    tmp_path: Path,
) -> None:
    source = copy()
    parts = parts_of(source, UP)
    found = parts.pop(part)
    replace_parts(source, UP, parts if change is None else parts | {part: change(found)})
    with pytest.raises((CheckpointError, PatternError), match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_converted_before_it_is_served_or_counted(copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="format sparse-bitmask, which vLLM does not .*conv"):
        count_sparse(FIXTURES / "bf16-ragged")
    with pytest.raises(
        CheckpointError, match="is ragged, in the form of another program; convert it first"
    ):
        inspect(FIXTURES / "bf16-ragged")
    with pytest.raises(CheckpointError, match="is ragged; convert it first"):
        load(FIXTURES / "bf16-ragged")
    with pytest.raises(
        CheckpointError, match="where N is counted from the weights; leave --sparsity out"
    ):
        convert(FIXTURES / "bf16-ragged", tmp_path / "out", pattern=Pattern(32, 64))
    source = copy("int8-zeros")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    config["sparsity_config"] = {"format": "sparse-bitmask"}
    edit_json(source / "config.json", quantization_config=config)
    with pytest.raises(CheckpointError, match="names the format sparse-bitmask, but no tensor is"):
        convert(source, tmp_path / "out")
