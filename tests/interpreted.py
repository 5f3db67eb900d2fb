"""Triton's interpreter, spared half of its work."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter

ORIGINAL = interpreter._patch_lang


class _Launch:
    """What a launch puts back when it ends; and what was noted of it is void then."""

    def __init__(self, scope: Any, noted: set[tuple[int, ...]]) -> None:
        self.scope, self.noted = scope, noted

    def restore(self) -> None:
        self.noted.clear()
        self.scope.restore()


def patch_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter replaces the functions of `triton.language` when a kernel is launched, puts them back when it
    has ended, and replaces them by the same ones again at each call of a function within the kernel: half of the
    time of a test. Here only the first call from each namespace of a launch does; a kernel runs on the same ones."""
    noted = set[tuple[int, ...]]()

    @functools.cache
    def languages(fn: Any) -> tuple[int, ...]:
        """Which modules a call of this function replaces."""
        seen = [id(value) for value in fn.__globals__.values() if inspect.ismodule(value)]
        return tuple(n for n, module in enumerate((tl, tl.core)) if id(module) in seen)

    def patch(fn: Any) -> Any:
        key = languages(fn)
        if key in noted:
            return None  # of a call, which ignores it: only a launch puts back
        launches, scope = not noted, ORIGINAL(fn)
        noted.add(key)
        return _Launch(scope, noted) if launches else scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
