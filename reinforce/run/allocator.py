"""Memory that a step frees stays with the process, for the next step.

glibc gives a large tensor's pages back to the kernel when it is freed, and the kernel clears them
when they are asked for again: about a million pages a step with a model of 135M parameters. Other C
libraries, and a GPU's allocator, are left as they are.
"""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_... of malloc.h
NEVER = -1


def keep_freed_memory() -> None:
    """From now on, freed memory is kept."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(MMAP_MAX, 0)  # else a tensor beyond 32 MiB has a mapping of its own
    libc.mallopt(TRIM_THRESHOLD, NEVER)
