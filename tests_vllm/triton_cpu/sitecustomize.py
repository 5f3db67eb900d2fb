"""Lets vLLM's build for CPUs run its Triton kernels by Triton's interpreter, which is slow and exact.

vLLM 0.32 reports the experts of each token by its second model runner alone, whose kernels are Triton's. On a CPU it
switches Triton off unless that has a backend named cpu (vllm/triton_utils/importing.py). Python imports this file at
its start in a process whose PYTHONPATH has this folder; with TRITON_INTERPRET=1 no kernel reaches a backend.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    class _Driver:
        @classmethod
        def is_active(cls) -> bool:
            return True

    class _Backend:
        driver: Any = _Driver

    backends["cpu"] = _Backend  # type: ignore[assignment]
