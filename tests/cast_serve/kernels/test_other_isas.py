"""The tests of the CPU kernels, once more with each other kernel that this CPU can run.

A kernel is picked once per process, so each has a process of its own, two at a time.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cast_serve import kernels

OTHERS = [isa for isa in kernels.supported_isas() if isa != kernels.isa()]
TESTS = [
    "test_linear24.py",
    "test_linear24_int8.py",
    "test_linear64.py",
    "test_linear_int8.py",
    # Of the library's tests those that depend on how a kernel expands weights.
    "test_library.py::test_parity",
    "test_library.py::test_sums_of_integers_that_are_exact_are_equal_bit_for_bit",
]
# Leaves out what is the same for every kernel.
SELECTED = "not opcheck and not compile and not absent_isa"


def run(isa: str) -> subprocess.CompletedProcess[str]:
    forced = {"CAST_CPU_ISA": isa, "CAST_TEST_EXPECTED_ISA": isa, "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED),
            *(str(folder / test) for test in TESTS),
        ],
        env={**os.environ, **forced},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, subprocess.CompletedProcess[str]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(OTHERS, pool.map(run, OTHERS), strict=True))


@pytest.mark.parametrize("isa", OTHERS)
def test_every_other_kernel_passes(
    isa: str, runs: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    assert runs[isa].returncode == 0, runs[isa].stdout.rpartition("= FAILURES =")[2]
    assert " passed" in runs[isa].stdout
