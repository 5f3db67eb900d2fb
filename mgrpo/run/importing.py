"""Starting a process of a run without looking for garbage among what it imports.

torch and transformers make hundreds of thousands of objects that stay. Python's collector walks through them again and
again while they are made, and in every full collection afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Nothing is collected inside the block, and what exists at its end is never looked at again: for imports and what
    a process keeps to its end. The first block of a process counts, others do nothing."""
    if gc.get_freeze_count() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
