"""The 4-bit Triton kernel without a GPU: in Triton's interpreter, compiled for SM80 and SM90."""

import pytest

pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
import triton.language as tl  # noqa: E402

from cast_serve.kernels import int4_packed_shape  # noqa: E402
from cast_serve.kernels.gpu import triton_int4, triton_int8  # noqa: E402
from tests.cast_serve.kernels.gpu.test_triton24 import (  # noqa: E402
    assert_fits_a_gpu,
    compiled,
    run_in_the_interpreter,
)


def test_parity_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_triton_int4.py")


@pytest.mark.parametrize(
    ("num_tokens", "group", "dtype"),
    [(1, 128, "bf16"), (64, 64, "fp16"), (64, 32, "bf16"), (256, 128, "bf16")],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: int, num_tokens: int, group: int, dtype: str
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as ever, without a warning
    of_x = f"*{dtype}"
    pointers = {"x": of_x, "tiles": "*u8", "bias": of_x, "out": of_x}
    constants = {"DOT_DTYPE": tl.bfloat16 if dtype == "bf16" else tl.float16}
    tile_bytes = int4_packed_shape(8, 128, group)[2]
    constants |= {"GROUP": group, "TILE_GROUPS": 128 // group, "TILE_BYTES": tile_bytes}
    constants |= {"HAS_BIAS": True}
    kernel, blocks = triton_int4._linear24_int4_kernel, triton_int8.blocks_of(num_tokens)
    assert_fits_a_gpu(compiled(kernel, capability, blocks, pointers, constants), capability)
