"""CPU ids as people write them -> the list of them, and each rank's share as vLLM reads it."""

import os
from collections.abc import Sequence

from cast_serve.errors import UsageError


def parse_cores(text: str) -> list[int]:
    """Parses ``0,2-3``.

    Raises:
        UsageError: if it is not a list of CPU ids, or one is listed twice or not available here.
    """
    is_open = os.sched_getaffinity(0)
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"cores {text!r} is not a list of CPU ids; write, for example, 0,2-3")
        own = range(int(first), int(last or first) + 1)
        if not own or own[-1] > max(is_open) or set(own) - is_open:
            raise UsageError(
                f"cores {part.strip()} are not available to this process, which has "
                f"{sorted(is_open)}"
            )
        if twice := set(own) & set(cores):
            raise UsageError(f"cores {text!r} list {min(twice)} twice; list each once")
        cores += own
    return cores


def cores_of_ranks(cores: Sequence[int], num_ranks: int) -> str:
    """Distributes a node's cores to its ranks, in VLLM_CPU_OMP_THREADS_BIND's form: ``0,1|2,3``.

    Raises:
        UsageError: if there are fewer cores than ranks.
    """
    if len(cores) < num_ranks:
        raise UsageError(
            f"--cores has {len(cores)} cores for {num_ranks} ranks on this node; give at least one "
            "each, or leave --cores out and set VLLM_CPU_OMP_THREADS_BIND=nobind"
        )
    ends = [len(cores) * rank // num_ranks for rank in range(num_ranks + 1)]
    return "|".join(
        ",".join(str(core) for core in cores[first:last])
        for first, last in zip(ends, ends[1:], strict=False)
    )
