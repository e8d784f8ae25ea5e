"""The Triton kernel without a GPU: in Triton's interpreter, and compiled for two architectures."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cast_serve.kernels.gpu import triton24  # noqa: E402


def run_in_the_interpreter(name: str) -> None:
    """Runs a file of this folder by pytest in a process of its own; it must pass."""
    file = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def compiled(
    kernel: Any,
    capability: int,
    blocks: dict[str, int],
    pointers: dict[str, str],
    constants: dict[str, Any],
) -> Any:
    """A kernel compiled for a GPU that need not be here.

    Args:
        capability: of the GPU, 90 for 9.0.
        blocks: sizes and num_... as of blocks_of.
        pointers: argument -> type; all others are i32.
        constants: constexpr -> value.
    """
    constants = {name: size for name, size in blocks.items() if name.startswith("B")} | constants
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As at run time: torch's memory begins at multiples of 16 bytes.
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=places, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: size for name, size in blocks.items() if name.startswith("num_")},
    )


def assert_fits_a_gpu(compiled: Any, capability: int) -> None:
    assert compiled.asm["cubin"]
    # Consecutive products of a tile stay on tensor cores.
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 << 10  # a program's shared memory on the smallest SM8x


def test_parity_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_triton24.py")


@pytest.mark.parametrize("num_tokens", [1, 64, 256])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: int, num_tokens: int
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as ever, without a warning
    pointers = {"quads": "*i64", "words": "*i32", "bias": "*bf16", "out": "*bf16"}
    constants = {"DTYPE": tl.bfloat16, "DOT_DTYPE": tl.bfloat16, "HAS_BIAS": True}
    kernel, blocks = triton24._linear24_kernel, triton24.blocks_of(num_tokens)
    assert_fits_a_gpu(compiled(kernel, capability, blocks, pointers, constants), capability)
