"""What of the GPU benchmark needs no GPU: its arithmetic, its table, and its refusal."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.kernels import gpu
from cast_serve import kernels
from cast_serve.kernels.gpu import dispatch
from loadtest.__main__ import app
from tests.benchmarks.conftest import LoadOf


def row(num_tokens: int, packed_ms: float, cublas_ms: float) -> dict[str, Any]:
    ms = {"packed": packed_ms, "cublas": cublas_ms}
    ops = {
        name: {"ms": value, "weight_gb_s": 500.0, "relative_error": 1e-3}
        for name, value in ms.items()
    }
    return {"in_features": 64, "out_features": 32, "num_tokens": num_tokens, "ops": ops}


def test_the_crossover_is_where_a_form_wins_for_good() -> None:
    rows = [row(1, 1, 2), row(8, 3, 2), row(64, 1, 2), row(256, 3, 2), row(1024, 3, 2)]
    assert gpu._crossovers(rows, ["cublas"]) == {"cublas": 256}
    assert gpu._crossovers([row(1, 1, 2)], ["cublas"]) == {}
    assert gpu._crossovers([row(1, 2, 1), row(4, 2, 1)], ["cublas"]) == {"cublas": 1}


@pytest.mark.parametrize("form", ["cusparselt", "cutlass", "dense"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_by_each_form(monkeypatch: pytest.MonkeyPatch, form: str, has_bias: bool) -> None:
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
    out = gpu.product(x, second, form, bias)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()


def test_with_int8_all_ops_have_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by the CPU's ops; the int8 op rounds x there, which a GPU's does not."""
    kernels.load()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    for name in ("linear24", "linear24_int8"):
        monkeypatch.setattr(dispatch, name, getattr(torch.ops.cast, name))
    weight, ops = gpu._int8_layers(256, 24, num_bytes=20_000)
    assert {name: size for name, (_, size) in ops.items()} == {
        "packed": 256 * 24 * 5 // 8 + 24 * 4,
        "packed_bf16": 256 * 24 * 9 // 8,
        "cublas": 256 * 24 * 2,
    }
    assert {name: len(layers) for name, (layers, _) in ops.items()} == {
        "packed": 6,
        "packed_bf16": 3,
        "cublas": 2,
    }
    x = torch.randn(3, 256).bfloat16()
    expected = x.float() @ weight.T
    for layers, _ in ops.values():
        for layer in layers:
            error = (layer(x).float() - expected).norm() / expected.norm()
            assert error < 2e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_without_a_gpu_it_says_so(weights: str) -> None:
    done = CliRunner().invoke(app, ["kernels", "--device", "cuda", "--weights", weights])
    assert done.exit_code == 1
    assert "no CUDA device is here" in done.stderr


def test_where_a_record_is_from_is_stamped_first(
    monkeypatch: pytest.MonkeyPatch, load_of: LoadOf
) -> None:
    done: list[None] = []
    check_stamp = load_of(done)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = SimpleNamespace(name="A100", L2_cache_size=1)
    monkeypatch.setattr(dispatch, "properties", lambda device: card)
    monkeypatch.setattr(gpu, "_copy_gb_s", lambda: 1000.0)
    monkeypatch.setattr(gpu, "_int8_layers", lambda *_: (torch.zeros(32, 64), {}))
    found = gpu.run([(64, 32)], [1], lambda: done.append(None), "int8")
    assert found["card"] == "A100"
    check_stamp(found)
