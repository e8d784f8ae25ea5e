"""What compressed-tensors 0.12.2 wrote (fixtures/README.md) is read bit for bit."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.formats.eight_bits import read
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import decompress, unpack_mask
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import SCALES_TAKEN_OVER
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json

FIXTURES = Path(__file__).parents[1] / "fixtures"
UP = "model.layers.0.mlp.up_proj"
NAMES = [
    *(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
    *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
]
Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """`folder = copy("int8-zeros")`: a fixture that may be changed."""

    def call(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return call


def unpacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    values, bitmask = tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"]
    return decompress(values, bitmask, values.shape[1] * 2, name)


def test_int8_with_zeros_stays_int8(tmp_path: Path) -> None:
    summary = convert(FIXTURES / "int8-zeros", tmp_path / "out")
    assert (summary["kind"], summary["quantized"], summary["head"]) == ("compressed", "int8", None)
    assert (summary["num_sparse_layers"], summary["num_dense_layers"]) == (7, 1)
    before, after = all_tensors(FIXTURES / "int8-zeros"), all_tensors(tmp_path / "out")
    for name in NAMES:
        assert after[f"{name}.compressed"].dtype == torch.int8
        assert torch.equal(unpacked(after, name), before[f"{name}.weight"])
        assert torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
    assert sum(int((after[f"{name}.compressed"] == -128).sum()) for name in NAMES) == 27
    cast = json.loads((tmp_path / "out/cast.json").read_text())
    assert cast["quantization"] == {"quantize": "int8", "head": None, "scales": SCALES_TAKEN_OVER}
    assert cast["targets"] == sorted(NAMES)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["format"], config["ignore"]) == ("int-quantized", ["lm_head"])
    check_converted(FIXTURES / "int8-zeros", tmp_path / "out")


def test_the_bitmask_form_is_already_ours_and_lost_minus_128(tmp_path: Path) -> None:
    source = FIXTURES / "int8-bitmask"
    assert inspect(source)["quantized"] == "int8"
    with pytest.raises(CheckpointError, match="is compressed already; serve it as it is"):
        convert(source, tmp_path / "out")
    found, zeros = all_tensors(source), all_tensors(FIXTURES / "int8-zeros")
    for name in NAMES:
        expected = zeros[f"{name}.weight"]
        expected = torch.where(expected == -128, torch.zeros_like(expected), expected)
        assert torch.equal(unpacked(found, name), expected)


def test_a_scale_for_the_whole_weight_is_repeated_and_static_activations_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FIXTURES / "int8-bitmask-static"
    with pytest.raises(CheckpointError, match=r"is torch.bfloat16 \[1\], .* convert the directory"):
        inspect(source)
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "out")
    assert "the input_scale of 7 linears is left out" in caplog.text
    assert "quantised for each token" in caplog.text
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert f"{UP}.input_scale" in before
    assert not [name for name in after if name.endswith("input_scale")]
    for name in NAMES:
        for part in ("compressed", "bitmask"):
            assert torch.equal(after[f"{name}.{part}"], before[f"{name}.{part}"])
        assert after[f"{name}.weight_scale"].shape == (after[f"{name}.compressed"].shape[0], 1)
        assert (after[f"{name}.weight_scale"] == before[f"{name}.weight_scale"]).all()


@pytest.mark.parametrize("name", ["float8-bitmask", "float8-zeros"])
def test_float8_becomes_bf16(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FIXTURES / name
    with pytest.raises(CheckpointError, match="cast-serve convert SRC OUT"):
        inspect(source)
    summary = convert(source, tmp_path / "out", tmp_path / "twin")
    assert (summary["quantized"], summary["linear_bytes_ratio"]) == (None, 0.5625)
    assert caplog.text == ""
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for linear in NAMES:
        stored = before.get(f"{linear}.weight")
        if stored is None:
            values, bitmask = before[f"{linear}.compressed"], before[f"{linear}.bitmask"]
            assert torch.equal(after[f"{linear}.bitmask"], bitmask)
            dense = decompress(values.float(), bitmask, values.shape[1] * 2)
        else:
            dense = stored.float()
        expected = (dense * before[f"{linear}.weight_scale"].float()).bfloat16()
        assert after[f"{linear}.compressed"].dtype == torch.bfloat16
        assert torch.equal(unpacked(after, linear), expected)
        assert torch.equal(all_tensors(tmp_path / "twin")[f"{linear}.weight"], expected)
        assert expected.count_nonzero() > expected.numel() // 3
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["format"], config["config_groups"]) == ("dense", {})
    assert json.loads((tmp_path / "out/cast.json").read_text())["quantization"] is None
    convert(tmp_path / "out", tmp_path / "int8", quantization=Quantization("int8"))


def test_groups_with_fewer_than_two_values_keep_the_lowest_columns(
    copy: Copy, tmp_path: Path
) -> None:
    source = copy("int8-zeros")
    tensors = all_tensors(source)
    row = torch.tensor([0, 0, 0, 0, 0, 0, 0, 9, 0, 5, 0, 0, 7, 0, 0, 0], dtype=torch.int8)
    tensors[f"{UP}.weight"][2] = row
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    after = all_tensors(tmp_path / "out")
    assert after[f"{UP}.compressed"][2].tolist() == [0, 0, 0, 9, 0, 5, 7, 0]
    mask = unpack_mask(after[f"{UP}.bitmask"], 16)[2].view(4, 4)
    assert [group.nonzero().flatten().tolist() for group in mask] == [
        [0, 1],
        [0, 3],
        [0, 1],
        [0, 1],
    ]
    assert torch.equal(unpacked(after, UP)[2], row)


@pytest.mark.parametrize("name", ["int8-zeros", "float8-zeros"])
def test_a_group_with_three_values_is_named(name: str, copy: Copy, tmp_path: Path) -> None:
    source = copy(name)
    tensors = all_tensors(source)
    weight = tensors[f"{UP}.weight"].float()
    weight[4, 8:11] = 1
    tensors[f"{UP}.weight"] = weight.to(tensors[f"{UP}.weight"].dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PatternError, match=f"{UP}: 1 of 96 groups .* row 4, group 2"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["int8-zeros", "int8-bitmask", "float8-zeros"])
def test_the_older_key_is_read(name: str, copy: Copy, tmp_path: Path) -> None:
    source = copy(name)
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", tmp_path / "twin")
    for folder in ("out", "twin"):
        assert "compression_config" not in json.loads(
            (tmp_path / folder / "config.json").read_text()
        )
    if name != "int8-bitmask":
        convert(FIXTURES / name, tmp_path / "expected")
    expected = all_tensors(tmp_path / "expected" if name != "int8-bitmask" else FIXTURES / name)
    found = all_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_where_sparsity_is_said_to_be_dense_the_values_decide(copy: Copy, tmp_path: Path) -> None:
    source = copy("int8-zeros")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"format": "dense", "targets": ["Linear"]}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out")["num_sparse_layers"] == 7
    # The same without quantisation.
    twin = tmp_path / "twin"
    convert(FIXTURES / "float8-zeros", tmp_path / "bf16", twin)
    (twin / "cast.json").unlink()
    sparsity = {"format": "dense", "targets": ["Linear"], "sparsity_structure": "2:4"}
    edit_json(
        twin / "config.json",
        quantization_config={"quant_method": "compressed-tensors", "sparsity_config": sparsity},
    )
    convert(twin, tmp_path / "again")
    assert all(
        torch.equal(tensor, all_tensors(tmp_path / "bf16")[name])
        for name, tensor in all_tensors(tmp_path / "again").items()
    )


def test_unquantised_activations_are_warned_of(
    copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = copy("int8-zeros")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out")
    assert "activations are not quantised, but serving quantises them" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mixed-precision"}, "in the format mixed-precision, but only dense, .*start"),
        ({"format": "nvfp4-pack-quantized"}, "in the format nvfp4-pack-quantized, but only"),
        ({"sparsity_config": {"format": "sparse-blocks"}}, "in the format sparse-blocks, but only"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantised KV cache; start from"),
        ({"quant_method": "gptq"}, r"is quantised \(gptq\), which is not read"),
        ({"config_groups": {"a": {"weights": {"strategy": "group"}}}}, "a scale for each group of"),
        ({"config_groups": {"a": {"weights": {"symmetric": False}}}}, "asymmetrically"),
    ],
)
def test_what_is_not_read_is_named(
    changes: dict[str, object], message: str, copy: Copy, tmp_path: Path
) -> None:
    source = copy("int8-zeros")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", quantization_config=config | changes)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_asymmetric_weights_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantised asymmetrically"):
        convert(FIXTURES / "int8-zeros-asymmetric", tmp_path / "out")


def test_quantised_directories_are_not_quantised_or_inspected(tmp_path: Path) -> None:
    for name, dtype in (("int8-zeros", "int8"), ("float8-zeros", "float8")):
        with pytest.raises(CheckpointError, match=rf"already quantised \({dtype}\)"):
            convert(FIXTURES / name, tmp_path / "out", quantization=Quantization("int8"))
        with pytest.raises(
            CheckpointError, match="in the form of another program; convert it first"
        ):
            inspect(FIXTURES / name)


def test_other_modules_and_mixtures_in_8_bits_are_refused(copy: Copy, tmp_path: Path) -> None:
    source = copy("int8-zeros")
    tensors = all_tensors(source)
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="in int8 and in float8"):
        convert(source, tmp_path / "out")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is I8, but only linears"):
        convert(source, tmp_path / "out")
    tensors = all_tensors(FIXTURES / "int8-zeros")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e5m2)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight is F8_E5M2, but only linears"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("int8-bitmask", (7, False)),
        ("int8-bitmask-static", (7, False)),
        ("float8-bitmask", (7, False)),
        ("int8-zeros", (7, True)),
        ("float8-zeros", (7, True)),
        ("int4-packed", (0, False)),
    ],
)
def test_what_is_served_sparse(name: str, found: tuple[int, bool]) -> None:
    assert count_sparse(FIXTURES / name) == found


def test_what_is_left_to_vllm_is_said(
    copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert count_sparse(FIXTURES / "int8-zeros-asymmetric") == (0, False)
    assert "by vLLM itself, not 2:4-sparse: " in caplog.text
    assert "int8-zeros-asymmetric is quantised asymmetrically, which is not read" in caplog.text
    source = copy("float8-zeros")
    tensors = all_tensors(source)
    down = "model.layers.0.mlp.down_proj.weight"
    tensors[down] = torch.ones_like(tensors[down].float()).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        assert count_sparse(source) == (0, False)
    assert "since it is not 2:4: model.layers.0.mlp.down_proj: 96 of 96 groups" in caplog.text


@pytest.mark.parametrize("name", ["float8-bitmask", "float8-zeros"])
def test_scales_of_another_shape_are_named_before_vllm_starts(name: str, copy: Copy) -> None:
    source = copy(name)
    tensors = all_tensors(source)
    tensors[f"{UP}.weight_scale"] = torch.ones(3, 1, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = rf"{UP}.weight_scale is \[3, 1\], but \[24, 1\] or \[1\] belongs .*; copy the dire"
    with pytest.raises(CheckpointError, match=message):
        count_sparse(source)


def int8_parts(**changes: Tensor) -> dict[str, Tensor]:
    weight = torch.tensor([[1, 0, -2, 0], [0, 3, 0, 4]], dtype=torch.int8)
    return {"weight": weight, "weight_scale": torch.ones(2, 1), **changes}


def test_scales_of_every_shape_that_is_read() -> None:
    for scale in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0, 2.0])):
        found = read("q", int8_parts(weight_scale=scale), torch.bfloat16)
        assert torch.equal(found.dense(), int8_parts()["weight"].float() * 2)
    zero_point = torch.zeros(2, 1, dtype=torch.int8)
    assert read("q", int8_parts(weight_zero_point=zero_point), torch.bfloat16).scale is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": torch.ones(2, 2)}, r"q.weight_scale is \[2, 2\]: scale groups or blocks"),
        ({"weight_scale": torch.ones(3, 1)}, r"q.weight_scale is .* \[3, 1\], but \[2, 1\]"),
        ({"weight_zero_point": torch.ones(2, 1)}, "q.weight_zero_point is not 0: asymmetric"),
    ],
)
def test_tensors_that_are_not_read_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read("q", int8_parts(**changes), torch.bfloat16)
    too_large = {
        "weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        "weight_scale": 7e4 * torch.ones(2, 1),
    }
    too_large["weight"][:, 1:3] = 0
    message = r"q: row 0 of its float8 .* 70000.0 holds NaN, or more than 6.55e\+04, the most of"
    with pytest.raises(CheckpointError, match=message):
        read("q", too_large, torch.float16)
    with pytest.raises(CheckpointError, match="q.weight is missing"):
        read("q", {}, torch.bfloat16)
    with pytest.raises(CheckpointError, match="q is in 8 bits, but has no q.weight_scale"):
        read("q", {"weight": int8_parts()["weight"]}, torch.bfloat16)


def test_the_twin_of_an_int8_head_is_dequantised(copy: Copy, tmp_path: Path) -> None:
    source = copy("int8-zeros")
    edit_json(source / "config.json", tie_word_embeddings=False)
    values = torch.randint(-127, 128, (32, 16), dtype=torch.int8)
    scale = torch.rand(32, 1).bfloat16() + 0.5
    head = {"lm_head.weight": values, "lm_head.weight_scale": scale}
    save_file(
        {**all_tensors(source), **head}, source / "model.safetensors", metadata={"format": "pt"}
    )
    convert(source, tmp_path / "out", tmp_path / "twin")
    sparse, twin = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "twin")
    assert torch.equal(sparse["lm_head.weight"], values)
    assert torch.equal(sparse["lm_head.weight_scale"], scale)
    assert torch.equal(twin["lm_head.weight"], (values.float() * scale.float()).bfloat16())
    assert not [
        name for name, tensor in twin.items() if "scale" in name or not tensor.is_floating_point()
    ]
