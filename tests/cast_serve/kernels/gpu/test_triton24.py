"""The Triton kernel without a GPU: in Triton's interpreter, and compiled for two architectures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="comes with the cpu and gpu extras")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cast_serve.kernels.gpu import triton24  # noqa: E402


def test_parity_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_triton24.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("num_tokens", [1, 64, 256])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: int, num_tokens: int
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as ever, without a warning
    kernel = triton24._linear24_kernel
    blocks = triton24.blocks_of(num_tokens)
    constants = {name: size for name, size in blocks.items() if name.startswith("BLOCK")}
    constants |= {"DTYPE": tl.bfloat16, "DOT_DTYPE": tl.bfloat16, "HAS_BIAS": True}
    pointers = {"quads": "*i64", "words": "*i32", "bias": "*bf16", "out": "*bf16"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=places),
        target=GPUTarget("cuda", capability, 32),
        options={name: size for name, size in blocks.items() if name.startswith("num_")},
    )
    assert compiled.asm["cubin"]
    # Consecutive products of a tile stay on tensor cores.
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 << 10  # a program's shared memory on the smallest SM8x
