"""Whole versions and patches from files, in a server's worker."""

from __future__ import annotations

from typing import Any


class WeightLoading:
    """Mixed into the worker."""

    vllm_config: Any  # the worker's own
    model_runner: Any

    def mgrpo_info(self) -> dict[str, object]:
        """What this worker holds."""
        return {}
