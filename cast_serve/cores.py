"""CPU ids as people write them -> the list of them."""

import os


def parse_cores(text: str) -> list[int]:
    """Parses ``0,2-3``.

    Raises:
        ValueError: if it is no list of CPU ids, or one is not open to this process.
    """
    is_open = os.sched_getaffinity(0)
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ValueError(f"cores {text!r} is no list of CPU ids; write for instance 0,2-3")
        own = range(int(first), int(last or first) + 1)
        if not own or own[-1] > max(is_open) or set(own) - is_open:
            raise ValueError(
                f"cores {part.strip()} are not open to this process, which has {sorted(is_open)}"
            )
        cores += own
    return cores
