"""What of the GPU's side needs no GPU: dispatch, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cast_serve import kernels
from cast_serve.kernels.gpu import dispatch
from tests.cast_serve.kernels.test_linear24 import make


def test_the_ops_have_kernels_under_the_cuda_key() -> None:
    kernels.load()
    dispatch.register()
    dispatch.register()  # a second time changes nothing
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("linear24", "linear24_int8", "linear24_int4", "linear_int8"):
        assert has_kernel(f"cast::{op}", "CUDA")


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
            torch.ops.cast.linear24_int8(x, int8, scale, 40, None),
            torch.ops.cast.linear24_int4(x, int4, 64, 40, None),
            torch.ops.cast.linear_int8(x, dense, scale, 40, None),
        ):
            assert out.shape == (3, 2, 40)
            assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")


def test_an_old_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: turing)
    with pytest.raises(RuntimeError, match="Tesla T4 has compute capability 7.5; .* 8.0 or later"):
        dispatch.properties(7)


@pytest.mark.parametrize(
    ("x", "out_features", "bias", "error", "message"),
    [
        (torch.zeros(1, 64), 40, None, TypeError, "x is torch.float32; bfloat16 or float16"),
        (torch.zeros(1, 62).bfloat16(), 40, None, ValueError, "in_features 62 is not a positive"),
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
