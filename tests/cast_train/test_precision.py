import subprocess
import sys

import pytest
import torch

from cast_train.precision import arithmetic, autocast


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32),
        ({"cpu_name": "Intel Xeon", "amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_is_what_the_machine_is_fastest_with(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert arithmetic() == expected
    assert (arithmetic("fp32"), arithmetic("bf16")) == (torch.float32, torch.bfloat16)


def test_a_product_is_computed_in_the_precision_asked_for():
    found = {}
    for precision in ("fp32", "bf16"):
        with autocast(precision, "cpu"):
            found[precision] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert found == {"fp32": torch.float32, "bf16": torch.bfloat16}


def test_denormal_numbers_are_zero_in_threads_too():
    # In a process of its own, since the mode stays.
    program = """
import torch
from cast_train.precision import flush_denormals

flush_denormals()
torch.set_num_threads(2)
assert not (torch.full((1 << 20,), 1e-38) * 0.5).any()
assert (torch.full((8,), 1.2e-38) * 1.0).all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
