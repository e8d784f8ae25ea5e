"""What of the GPU's side needs no GPU: dispatch, second forms, crossover, and what is refused."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cast_serve import kernels
from cast_serve.kernels.gpu import dispatch
from tests.cast_serve.kernels.test_linear24 import make

A100 = SimpleNamespace(name="A100", major=8, minor=0, multi_processor_count=108)


@pytest.fixture(autouse=True)
def _nothing_cached() -> None:
    for cached in (dispatch.crossover, dispatch._warn_once):
        cached.cache_clear()


def test_the_ops_have_kernels_under_the_cuda_key() -> None:
    kernels.load()
    dispatch.register()
    dispatch.register()  # a second time changes nothing
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("linear24", "linear24_int8", "linear24_int4", "linear_int8", "linear24_many"):
        assert has_kernel(f"cast::{op}", "CUDA")
    assert not has_kernel("cast::linear24_many", "CPU")


def test_all_ops_trace_on_a_fake_gpu() -> None:
    kernels.load()
    dispatch.register()
    with FakeTensorMode():
        x = torch.empty(3, 2, 64, dtype=torch.bfloat16, device="cuda")
        packed, int8, int4, dense = (
            torch.empty(5, 1, num_bytes, dtype=torch.uint8, device="cuda")
            for num_bytes in (576, 640, 416, 1024)
        )
        scale = torch.empty(40, device="cuda")
        for out in (
            torch.ops.cast.linear24(x, packed, 40, None),
            torch.ops.cast.linear24_many(x, packed, 40, None, [packed], "dense"),
            torch.ops.cast.linear24_int8(x, int8, scale, 40, None),
            torch.ops.cast.linear24_int4(x, int4, 64, 40, None),
            torch.ops.cast.linear_int8(x, dense, scale, 40, None),
        ):
            assert out.shape == (3, 2, 40)
            assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")


@pytest.mark.parametrize("form", ["cusparselt", "cutlass", "dense"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_by_a_second_form(
    monkeypatch: pytest.MonkeyPatch, form: str, has_bias: bool
) -> None:
    """torch's 2:4 ops stand in as what their documentation says they compute."""

    def cslt(weight: Tensor, x: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
        assert x.shape[1] % 16 == 0
        out = weight @ x + (0 if bias is None else bias[:, None])
        return out.t() if transpose_result else out

    def cutlass(values: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        assert x.shape[1] % 16 == 0
        return (values * meta) @ x

    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt, raising=False)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", cutlass)
    weight, x = torch.randn(24, 64), torch.randn(5, 64)
    bias = torch.randn(24) if has_bias else None
    second = [weight / 2, torch.full_like(weight, 2)] if form == "cutlass" else [weight]
    expected = torch.nn.functional.linear(x, weight, bias)
    out = dispatch.product(x, second, form, bias)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()


def test_the_dense_form_is_the_weight() -> None:
    weight, packed = make((40, 64), torch.float16)
    (dense,) = dispatch.second_form(packed, 40, 64, torch.float16, "dense")
    assert torch.equal(dense, weight)
    assert dispatch.second_form(packed, 40, 64, torch.float16, "packed") == []


def test_sizes_that_a_form_cannot_hold_keep_the_packed_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, packed = make((40, 64), torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.second_form(packed, 40, 64, torch.bfloat16, "cusparselt") == []
    (record,) = caplog.records
    assert "linears of [40, 64] are no multiples of [16, 16]" in record.getMessage()


def test_eight_bits_keep_the_packed_kernel(caplog: pytest.LogCaptureFixture) -> None:
    packed = torch.zeros(8, 1, 640, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.second_form(packed, 64, 128, torch.int8, "dense") == []
        assert dispatch.second_form(packed, 64, 128, torch.int8, "packed") == []
    (record,) = caplog.records
    assert "CAST_CUDA_MANY_TOKENS=dense is for weights of 16 bits" in record.getMessage()


def test_a_form_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = make((64, 64), torch.bfloat16)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="has no cuSPARSELt here; set CAST_CUDA_MANY_TOKENS"):
        dispatch.second_form(packed, 64, 64, torch.bfloat16, "cusparselt")
    hopper = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(dispatch, "properties", lambda index: hopper)
    with pytest.raises(RuntimeError, match=r"need compute capability 8.x, but H100 has 9.0"):
        dispatch.second_form(packed, 64, 64, torch.bfloat16, "cutlass")


def test_the_form_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAST_CUDA_MANY_TOKENS", raising=False)
    assert dispatch.wanted_form() == "packed"
    monkeypatch.setenv("CAST_CUDA_MANY_TOKENS", "cusparse")
    with pytest.raises(ValueError, match="cusparse is not known; choose one of packed, cusp"):
        dispatch.wanted_form()


def test_the_crossover_is_the_cards_own_or_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "crossover.json"
    table.write_text(json.dumps({"A100": {"cusparselt": 96}}))
    monkeypatch.setattr(dispatch, "CROSSOVER", table)
    with caplog.at_level(logging.WARNING):
        assert dispatch.crossover("A100", "cusparselt") == 96
        assert not caplog.records
        for _ in range(2):
            assert dispatch.crossover("A100", "dense") == dispatch.UNMEASURED_TOKENS
    (record,) = caplog.records
    assert "dense was not measured on A100" in record.getMessage()


def test_the_shipped_crossover_names_known_forms() -> None:
    for forms in json.loads(dispatch.CROSSOVER.read_text()).values():
        assert set(forms) <= set(dispatch.FORMS)
        assert all(isinstance(tokens, int) and tokens > 0 for tokens in forms.values())


@pytest.mark.parametrize(("num_tokens", "is_second"), [(95, False), (96, True)])
def test_the_second_form_runs_from_the_crossover_on(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, is_second: bool
) -> None:
    weight, packed = make((40, 64), torch.bfloat16)
    monkeypatch.setattr(dispatch, "properties", lambda index: A100)
    monkeypatch.setattr(dispatch, "crossover", lambda card, form: 96)
    monkeypatch.setattr(dispatch, "linear24", lambda x, *_: "packed")
    x = torch.randn(num_tokens, 64).bfloat16()
    out = dispatch.linear24_many(x, packed, 40, None, [weight], "dense")
    assert isinstance(out, Tensor) == is_second


def test_an_old_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: turing)
    with pytest.raises(RuntimeError, match="Tesla T4 has compute capability 7.5; .* 8.0 or later"):
        dispatch.properties(7)


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "error", "message"),
    [
        (torch.zeros(1, 64), 40, None, TypeError, "x is torch.float32; bfloat16 or float16"),
        (torch.zeros(1, 62).bfloat16(), 40, None, ValueError, "in_features 62 is no positive"),
        (torch.zeros(1, 128).bfloat16(), 40, None, ValueError, r"contiguous uint8 \[5, 2, 576\]"),
        (torch.zeros(1, 64).bfloat16(), 41, None, ValueError, r"contiguous uint8 \[6, 1, 576\]"),
        (torch.zeros(1, 64).bfloat16(), 40, torch.zeros(39), ValueError, r"bias is \[39\]"),
        (torch.zeros(()).bfloat16(), 40, None, ValueError, "x has no dimension"),
    ],
)
def test_errors(x: Tensor, out_features: int, bias: Tensor, error: type, message: str) -> None:
    pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
    _, packed = make((40, 64), torch.bfloat16)
    with pytest.raises(error, match=message):
        dispatch.linear24(x, packed, out_features, bias)


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "scale", "error", "message"),
    [
        (torch.zeros(1, 64), 40, None, torch.ones(40), TypeError, "x is torch.float32; bfloat16 o"),
        (torch.zeros(1, 62).bfloat16(), 40, None, torch.ones(40), ValueError, "in_features 62"),
        (torch.zeros(1, 132).bfloat16(), 40, None, torch.ones(40), ValueError, r"uint8 \[5, 2, "),
        (torch.zeros(1, 64).half(), 40, torch.ones(39), torch.ones(40), ValueError, "bias is"),
        (torch.zeros(1, 64).half(), 40, None, torch.ones(39), ValueError, r"\[39\] on cpu; a cont"),
        (torch.zeros(1, 64).half(), 40, None, torch.ones(40).half(), ValueError, r"float16 \[40\]"),
        (
            torch.zeros(1, 64).half(),
            40,
            None,
            torch.ones(80)[::2],
            ValueError,
            r"float32 \[40\] on",
        ),
    ],
)
@pytest.mark.parametrize(("op", "num_bytes"), [("linear24_int8", 640), ("linear_int8", 1024)])
def test_errors_of_8_bits(
    op: str,
    num_bytes: int,
    x: Tensor,
    out_features: int,
    bias: Tensor,
    scale: Tensor,
    error: type,
    message: str,
) -> None:
    pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
    packed = torch.zeros(5, 1, num_bytes, dtype=torch.uint8)
    with pytest.raises(error, match=f"{op}: .*{message}"):
        getattr(dispatch, op)(x, packed, scale, out_features, bias)


@pytest.mark.parametrize(("op", "num_bytes"), [("linear24", 576), ("linear24_int8", 640)])
def test_an_unaligned_weight_is_refused(op: str, num_bytes: int) -> None:
    pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
    packed = torch.zeros(5 * num_bytes + 8, dtype=torch.uint8)[8:].view(5, 1, num_bytes)
    arguments = [torch.ones(40)] if op == "linear24_int8" else []
    with pytest.raises(ValueError, match=f"{op}: packed does not begin at a 16-byte .*clone"):
        getattr(dispatch, op)(torch.zeros(1, 64).bfloat16(), packed, *arguments, 40)
