"""The int8 Triton kernel without a GPU: in Triton's interpreter, and compiled for SM80 and SM90."""

import pytest

pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
import triton.language as tl  # noqa: E402

from cast_serve.kernels.gpu import launch, triton_int8  # noqa: E402
from tests.cast_serve.kernels.gpu.test_triton24 import (  # noqa: E402
    assert_fits_a_gpu,
    compiled,
    run_in_the_interpreter,
)


def test_parity_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_triton_int8.py")


@pytest.mark.parametrize(
    ("num_tokens", "is_sparse", "dtype"),
    [
        (1, True, "bf16"),
        (1, False, "bf16"),
        (64, True, "fp16"),
        (256, True, "bf16"),
        (256, False, "bf16"),
    ],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: int, num_tokens: int, is_sparse: bool, dtype: str
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as ever, without a warning
    of_x = f"*{dtype}"
    pointers = {"x": of_x, "tiles": "*u8", "scale": "*fp32", "bias": of_x, "out": of_x}
    constants = {"DOT_DTYPE": tl.bfloat16 if dtype == "bf16" else tl.float16}
    constants |= {"IS_SPARSE": is_sparse, "IS_SPLIT": False, "HAS_BIAS": True}
    kernel, blocks = triton_int8._linear_int8_kernel, triton_int8.blocks_of(num_tokens)
    assert_fits_a_gpu(compiled(kernel, capability, blocks, pointers, constants), capability)


def test_what_adds_the_parts_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    pointers = {"parts": "*fp32", "scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    constants = {"HAS_SCALE": True, "HAS_BIAS": True, "BLOCK": 1024}
    assert compiled(launch._add_up_kernel, 80, {}, pointers, constants).asm["cubin"]
