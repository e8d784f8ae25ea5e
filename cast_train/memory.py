"""What the C library does with memory that a training step frees: it keeps it for the next one."""

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
