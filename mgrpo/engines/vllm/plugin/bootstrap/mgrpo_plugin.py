"""mgrpo inside a vLLM server's own environment, without an installation there.

A server that a run starts has this folder, and nothing else of ours, on its PYTHONPATH, and takes its worker extension
from here. The package that the run itself uses is then found by MGRPO_PACKAGE (its folder) and MGRPO_CORE (its compiled
core), so plug-in and run are always of one version. The interpreter must be of the same minor version as the run's,
since the core is compiled for one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _load(name: str, file: Path, folder: Path | None = None) -> None:
    places = None if folder is None else [str(folder)]
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module that this interpreter ({sys.executable}) can load")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if "mgrpo" not in sys.modules and "MGRPO_PACKAGE" in os.environ:
    package = Path(os.environ["MGRPO_PACKAGE"])
    _load("mgrpo", package / "__init__.py", package)
    _load("mgrpo._C", Path(os.environ["MGRPO_CORE"]))
    sys.modules["mgrpo"]._C = sys.modules["mgrpo._C"]  # type: ignore[attr-defined]

from mgrpo.engines.vllm.plugin.extension import WorkerExtension  # noqa: E402

__all__ = ["WorkerExtension"]
