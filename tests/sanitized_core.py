"""A pytest plugin: the tests run on the sanitized build of the core that MGRPO_SANITIZED_CORE names, instead of on the
installed one. See tests/test_core_sanitizers.py, which builds it and preloads the sanitizer's runtime."""

from __future__ import annotations

import importlib.util
import os
import sys

import mgrpo

_path = os.environ["MGRPO_SANITIZED_CORE"]
_spec = importlib.util.spec_from_file_location("mgrpo._C", _path)
assert _spec is not None and _spec.loader is not None, _path
_core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_core)
sys.modules["mgrpo._C"] = _core
mgrpo._C = _core  # type: ignore[attr-defined]


def pytest_report_header() -> str:
    """Shows, and lets a test see, which core the tests ran on."""
    return f"core: {_core.__file__}"
