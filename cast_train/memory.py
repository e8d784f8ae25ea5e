"""What the C library does with freed memory: it keeps a step's, and hands back a preparation's."""

import ctypes
import sys


def keep_freed() -> None:
    """Lets glibc reuse freed blocks: a step frees and asks for the same gigabytes, and handing them
    back to the kernel each time costs half of the step in page faults (benchmarks/log.md).

    Of the whole process and for good; nothing happens where there is no glibc.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def hand_back() -> None:
    """Gives the kernel what is free now, of which steps will not need as much."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
