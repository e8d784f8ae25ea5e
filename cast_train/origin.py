"""This process -> where a run's or a measurement's figures come from, stamped before it begins."""

from typing import Any

import torch

from cast_serve import provenance
from cast_train.precision import arithmetic


def origin(precision: str = "auto") -> dict[str, Any]:
    """Code, machine and load, as `cast_serve.provenance.origin`, and how this process computes.

    Args:
        precision: as in TrainConfig; what ``auto`` stands for depends on the machine.
    """
    return {
        **provenance.origin(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision": "bf16" if arithmetic(precision) == torch.bfloat16 else "fp32",
    }
