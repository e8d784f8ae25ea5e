"""``auto``, ``fp32`` or ``bf16`` -> the dtype that a model multiplies in, and a context for it.

`flush_denormals` keeps numbers that are almost zero from slowing a CPU down.
"""

from collections.abc import Mapping
from typing import Any

import torch


def arithmetic(precision: str = "auto") -> torch.dtype:
    """The dtype that a model multiplies in; ``auto``: bf16 where the machine is fastest with it.

    That is GPUs, CPUs with AMX and AMD's with AVX-512 BF16 (2.8 times as fast as fp32 on Zen 5);
    Intel's without AMX multiply fp32 faster (benchmarks/log.md).

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
    """
    if precision == "auto":
        is_native = torch.cuda.is_available() or _cpu_prefers_bf16(torch.cpu.get_capabilities())
        return torch.bfloat16 if is_native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: str, device_type: str) -> torch.autocast:
    """A context in which a model of fp32 weights multiplies in `arithmetic(precision)`.

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
        device_type: where the model is, as in ``tensor.device.type``.
    """
    is_bf16 = arithmetic(precision) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_bf16)


def flush_denormals() -> None:
    """Lets the CPU take denormal numbers, below 1.2e-38 in fp32 and bf16, for zero.

    As gates grow certain most of their gradients become denormal, and many of the weights' with
    them, which Intel's CPUs compute with in microcode (benchmarks/log.md).

    Of the calling thread and those that it starts later, for good.
    """
    torch.set_flush_denormal(True)


def _cpu_prefers_bf16(capabilities: Mapping[str, Any]) -> bool:
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return bool(capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16")))
