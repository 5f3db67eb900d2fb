"""Main memory that tensors have left goes back to the system at once.

glibc keeps freed blocks of up to 32 MB for later, and before version 2.38 it hardly takes one of them again for a block
of the same size and alignment, which is what torch asks for (`memalign`): the heap of a training process grows to a
multiple of its tensors. Blocks above a fixed threshold are mapped, each by itself, and unmapped when they are freed.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # mallopt's name
THRESHOLD = 1 << 20  # bytes; below it a small model's tensors stay on the heap, where they are cheaper


def return_freed_memory() -> None:
    """From now on, for the whole process. Fresh pages cost time: some 0.2 ms a MB. Nothing happens without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, THRESHOLD)
