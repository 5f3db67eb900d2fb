"""What a process imports is out of the collector's sight, and what it makes later is not."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc, weakref
from mgrpo.run.importing import importing

class Node: pass

def ring():
    node = Node(); node.self = node
    return weakref.ref(node)

gc.collect()
try:
    with importing():
        assert not gc.isenabled()
        with importing():
            kept = Node()
        assert not gc.isenabled()
        raise KeyError("a task that is not there")
except KeyError:
    pass
assert gc.isenabled() and not any(found is kept for found in gc.get_objects())
frozen = gc.get_freeze_count()
assert frozen > 1000
with importing():
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
later = ring()
gc.collect()
assert later() is None
"""


def test_imports_are_left_alone_and_later_garbage_is_not() -> None:
    """In a process of its own, since it lasts: collection rests in the first block, also one that raises, whose objects
    are frozen; afterwards it is on, and cycles are found."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
