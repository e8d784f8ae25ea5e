"""Which checkpoints the vLLM plugin claims, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from vllm.model_executor.layers.quantization import (  # noqa: E402
    QUANTIZATION_METHODS,
    get_quantization_config,
)

from cast_serve.engine import plugin  # noqa: E402

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHECKPOINT: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "sparsity_config": {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    },
}


EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
INT8: dict[str, Any] = {
    **CHECKPOINT,
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture(scope="module")
def config_class() -> Any:
    plugin.register()
    plugin.register()  # vLLM calls it in every process, some twice
    assert QUANTIZATION_METHODS.count("cast_sparse24") == 1
    return get_quantization_config("cast_sparse24")


def test_claims_our_format_and_no_other(config_class: Any) -> None:
    claim = config_class.override_quantization_method
    assert claim(CHECKPOINT, None) == claim(INT8, None) == "cast_sparse24"
    zeros = {"quant_method": "compressed-tensors", "format": "int-quantized", "sparsity_config": {}}
    assert claim(zeros, None) is None
    assert claim(zeros, "cast_sparse24") == "cast_sparse24"
    refused_by_vllm = zeros | {"sparsity_config": {"format": "dense", "targets": ["Linear"]}}
    assert claim(refused_by_vllm, None) == "cast_sparse24"
    assert claim(refused_by_vllm, "compressed-tensors") is None
    wide = {"sparsity_config": {"format": "sparse-64-bitmask"}}
    assert claim(CHECKPOINT | wide, None) == "cast_sparse24"
    assert claim({"quant_method": "gptq"}, "cast_sparse24") is None
    assert claim({"quant_method": "gptq", "sparsity_config": None}, None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "marlin-24"}, r"sparse and quantised \(marlin-24\); .*convert"),
        ({"format": "pack-quantized"}, r"sparse and quantised \(pack-quantized\)"),
        ({"format": "float-quantized"}, r"sparse and quantised \(float-quantized\)"),
        ({"format": "int-quantized"}, r"sparse and quantised \(int-quantized\)"),
        ({"config_groups": {"group_0": {}}}, "sparse and quantised"),
        ({"sparsity_config": {"targets": []}}, r"targets \[\] is not served"),
        ({"sparsity_config": {"sparsity_structure": "4:8"}}, "'4:8' and targets"),
        (
            {"sparsity_config": {"format": "dense"}},
            "stores the zeros of its weights, in the format 'dense', .*; run `cast-serve convert",
        ),
    ],
)
def test_refuses(config_class: Any, changes: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(CHECKPOINT)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        config_class.from_config(config)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("weights", "num_bits", 4),
        ("weights", "symmetric", False),
        ("weights", "strategy", "group"),
        ("input_activations", "type", "float"),
        ("input_activations", None, None),
    ],
)
def test_refuses_another_scheme(config_class: Any, part: str, key: str | None, value: Any) -> None:
    config = copy.deepcopy(INT8)
    group = config["config_groups"]["group_0"]
    if key is None:
        group[part] = None
    else:
        group[part][key] = value
    with pytest.raises(ValueError, match=rf"{part}\.{key or 'num_bits'} is {value!r}"):
        config_class.from_config(config)


@pytest.mark.parametrize(
    ("unquantized", "is_quantized", "head"),
    [([], True, "HeadMethod"), (["lm_head"], True, None), (["re:.*"], False, None)],
)
def test_what_int8_is_asked_for(
    config_class: Any, unquantized: list[str], is_quantized: bool, head: str | None
) -> None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config = config_class.from_config({**INT8, "ignore": unquantized})
    linear, output = LinearBase.__new__(LinearBase), ParallelLMHead.__new__(ParallelLMHead)
    stored = config.get_quant_method(linear, "model.layers.0.mlp.down_proj").stored
    assert stored.dtype == (torch.int8 if is_quantized else None)
    for name in ("lm_head", ".lm_head"):  # as vLLM names GPT-2's
        found = config.get_quant_method(output, name)
        assert (None if found is None else type(found).__name__) == head
    with pytest.raises(
        ValueError, match="lm_head is quantised and not sparse; only the he"
    ) as error:
        config_class.from_config(INT8).get_quant_method(linear, "lm_head")
    assert "convert" in str(error.value)


def test_nothing_to_ignore_may_be_null(config_class: Any) -> None:
    sparsity = {**INT8["sparsity_config"], "ignore": None}
    config = config_class.from_config({**INT8, "ignore": None, "sparsity_config": sparsity})
    assert (config.ignore, config.unquantized) == ([], [])


HEAD = {**INT8["config_groups"]["group_0"], "targets": ["lm_head"]}


def int4(size: int = 64, **groups: Any) -> dict[str, Any]:
    group = copy.deepcopy(INT8["config_groups"]["group_0"])
    group["weights"] |= {"num_bits": 4, "strategy": "group", "group_size": size}
    return {**INT8, "format": "pack-quantized", "config_groups": {"group_0": group, **groups}}


def test_4_bits_and_what_their_head_is(config_class: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from cast_serve.engine.linear import Stored

    head = ParallelLMHead.__new__(ParallelLMHead)
    own = config_class.from_config(int4(group_1=HEAD))
    assert own.stored == Stored(torch.int8, scale_group=64)
    assert type(own.get_quant_method(head, "lm_head")).__name__ == "HeadMethod"
    plain = config_class.from_config({**int4(), "ignore": ["lm_head"]})
    assert plain.get_quant_method(head, "lm_head") is None
    with pytest.raises(ValueError, match="lm_head is quantised, as .*scale_group=64"):
        config_class.from_config(int4()).get_quant_method(head, "lm_head")


@pytest.mark.parametrize("linears", [INT8, int4(32)], ids=lambda config: config["format"])
def test_a_head_of_4_bits_has_a_group_of_its_own(
    linears: dict[str, Any], config_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    from cast_serve.engine.linear import Stored

    own = {**int4(64)["config_groups"]["group_0"], "targets": ["lm_head"]}
    groups = {**linears["config_groups"], "group_1": {**own, "format": "pack-quantized"}}
    config = config_class.from_config({**linears, "config_groups": groups})
    assert config.stored == config_class.from_config(linears).stored
    method = config.get_quant_method(ParallelLMHead.__new__(ParallelLMHead), "lm_head")
    assert (type(method).__name__, method.scale_group) == ("HeadMethod", 64)
    assert config.head == Stored(torch.int8, has_zeros=True, scale_group=64)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match="layer in 4 bits, which only CPUs .*--head int8 for GPUs"):
        config_class.from_config({**linears, "config_groups": groups})


def test_what_is_not_served_of_4_bits_is_named(config_class: Any) -> None:
    with pytest.raises(ValueError, match="group_0.weights.group_size is 96; of 4-bit .*128 or 64"):
        config_class.from_config(int4(96))
    with pytest.raises(ValueError, match=r"differ in weights.group_size: \[32, 64\]"):
        config_class.from_config(int4(group_1=int4(32)["config_groups"]["group_0"]))
    zeros = int4() | {"sparsity_config": {"format": "dense", "targets": ["Linear"]}}
    with pytest.raises(ValueError, match="stores the zeros of its weights, in the format 'pack-q"):
        config_class.from_config(zeros)


@pytest.mark.parametrize("size", [128, 64])
def test_ranks_that_would_cut_a_scale_group_are_refused(config_class: Any, size: int) -> None:
    """SmolLM2's 576 columns over two ranks are 288 each."""
    from cast_serve.engine.linear import SparseLinearMethod, Stored

    with pytest.raises(ValueError, match=f"not a multiple of {size}; .*smaller --scale-group"):
        SparseLinearMethod("o_proj", Stored(torch.int8, scale_group=size)).create_weights(
            nn.Module(), 288, [8], 576, 8, torch.bfloat16, weight_loader=None
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_loads_its_columns_of_4_bits(
    config_class: Any, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor import parameter as vllm_parameter

    from cast_serve.checkpoint.linear import CompressedLinear
    from cast_serve.checkpoint.quantization import Quantization
    from cast_serve.engine.linear import SparseLinearMethod, Stored
    from cast_serve.kernels import unpack_int4
    from cast_serve.sparsity.pattern import hard_mask

    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 2)
    scores = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    whole = CompressedLinear.from_weight("o_proj", (scores * hard_mask(scores.abs())).bfloat16())
    whole = whole.quantize(Quantization("int4", 32))
    layer = nn.Module()
    layer.params_dtype = torch.bfloat16
    method = SparseLinearMethod("o_proj", Stored(torch.int8, scale_group=32))
    method.create_weights(layer, 288, [8], 576, 8, torch.bfloat16, weight_loader=lambda *_: None)
    for name, tensor in whole.tensors().items():
        part = name.rpartition(".")[2]
        if part != "shape":
            getattr(layer, part).load_row_parallel_weight(tensor)
    method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["packed"]
    values, bitmask, scale = unpack_int4(layer.packed, 8, 288, 32)
    found = CompressedLinear("o_proj", values, bitmask, 288, scale, 32).dense()
    assert torch.equal(found, whole.dense()[:, 288 * rank : 288 * (rank + 1)])


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def float8(**group: Any) -> dict[str, Any]:
    groups = {"group_0": {"weights": FLOAT8 | {"strategy": "channel"}, **group}}
    return {**INT8, "format": "float-quantized", "config_groups": groups}


def test_static_activations_are_left_out_and_warned_of(
    config_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from cast_serve.engine.linear import Stored

    assert config_class.from_config(float8()).stored == Stored(torch.float8_e4m3fn)
    assert caplog.text == ""
    static = {**FLOAT8, "strategy": "tensor", "dynamic": False}
    stored = config_class.from_config(float8(input_activations=static)).stored
    assert stored.has_input_scale
    assert "input_scale of the checkpoint is left out: activations are not quant" in caplog.text


def test_what_is_not_served_of_float8_is_named(config_class: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with pytest.raises(ValueError, match="strategy is 'block'; .* 'channel' or 'tensor' is served"):
        config_class.from_config(float8(weights=FLOAT8 | {"strategy": "block"}))
    mixed = float8()
    mixed["config_groups"]["group_1"] = {"weights": FLOAT8 | {"strategy": "tensor"}}
    with pytest.raises(ValueError, match=r"differ in weights.strategy: \['channel', 'tensor'\]"):
        config_class.from_config(mixed)
    head = ParallelLMHead.__new__(ParallelLMHead)
    with pytest.raises(
        ValueError, match="lm_head is quantised, as .*float8.*; a head is served un"
    ):
        config_class.from_config(float8()).get_quant_method(head, "lm_head")


def test_only_linears_are_touched(config_class: Any) -> None:
    assert config_class.from_config(CHECKPOINT).get_quant_method(nn.Embedding(2, 2), "x") is None


def test_a_shard_that_breaks_a_bitmask_byte_is_refused(config_class: Any) -> None:
    from cast_serve.engine.linear import SparseLinearMethod

    with pytest.raises(ValueError, match=r"o_proj: in_features 24 over 2 .* leaves 12 per rank"):
        SparseLinearMethod("o_proj").create_weights(
            nn.Module(), 12, [8], 24, 8, torch.bfloat16, weight_loader=None
        )


@pytest.mark.parametrize(
    ("kind", "op"),
    [("bf16", "linear24"), ("int8", "linear24_int8"), ("head", "linear_int8")],
)
def test_on_a_gpu_the_same_ops_run(kind: str, op: str) -> None:
    """A fake GPU: its tensors have shapes and a device, and the ops are those that vLLM traces."""
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from cast_serve import kernels
    from cast_serve.engine.head import HeadMethod
    from cast_serve.engine.linear import SparseLinearMethod, Stored
    from cast_serve.kernels.gpu import dispatch

    called = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            called.append(str(op))
            return op(*args, **(kwargs or {}))

    kernels.load()
    dispatch.register()
    stored = Stored(torch.int8 if kind == "int8" else None)
    method: Any = HeadMethod("lm_head", Stored(torch.int8))
    if kind != "head":
        method = SparseLinearMethod("o_proj", stored)
    with FakeTensorMode(), Recording():
        layer = nn.Module()
        shape = (5, 1, {"bf16": 576, "int8": 640, "head": 1024}[kind])
        layer.packed = torch.empty(shape, dtype=torch.uint8, device="cuda")
        if kind != "bf16":
            layer.scale = torch.empty(40, device="cuda")
        layer.cast_out_features = 40
        out = method.apply(layer, torch.empty(3, 64, dtype=torch.bfloat16, device="cuda"))
    assert (out.shape, out.device.type, out.dtype) == ((3, 40), "cuda", torch.bfloat16)
    assert [name for name in called if name.startswith("cast.")] == [f"cast.{op}.default"]


def test_8_bits_in_fp32_on_a_gpu_are_refused_when_they_are_loaded() -> None:
    from torch._subclasses import FakeTensorMode

    from cast_serve.engine.packing import keep_scales

    with FakeTensorMode():
        layer = nn.Module()
        layer.params_dtype = torch.float32
        with pytest.raises(ValueError, match="lm_head has .* in torch.float32; .*--dtype bfloat16"):
            keep_scales(layer, "lm_head", torch.ones(40, device="cuda"))


def test_what_a_layer_holds_on_a_cpu() -> None:
    from cast_serve.engine.linear import SparseLinearMethod
    from cast_serve.sparsity.bitmask import compress
    from cast_serve.sparsity.pattern import hard_mask

    layer, scores = nn.Module(), torch.randn(40, 64)
    loaded = (*compress((scores * hard_mask(scores.abs())).bfloat16()), torch.tensor([40, 64]))
    for name, tensor in zip(("compressed", "bitmask", "shape"), loaded, strict=True):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    layer.cast_out_features, layer.cast_in_features = 40, 64
    layer.params_dtype = torch.bfloat16
    SparseLinearMethod("o_proj").process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["packed"]
