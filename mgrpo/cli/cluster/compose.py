"""compose.json: every part a service, on one machine with containers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrpo.cli.cluster.plan import Part, Plan
from mgrpo.cli.cluster.text import document

RESTARTS = 5


def compose(plan: Plan, out: Path, image: str, vllm_image: str) -> str:
    """The file's text. out: the run's folder on this machine."""
    models = sorted({a.model for a in plan.config.agents.values() if a.model is not None})
    volumes = [f"{out.resolve()}:{plan.site.root}", *(f"{model}:{model}:ro" for model in models)]
    services: dict[str, Any] = {}
    gpu = 0
    for part in plan.parts:
        services[part.name] = _service(
            part, vllm_image if part.is_server else image, volumes, str(plan.site.root)
        )
        services[part.name]["stop_grace_period"] = f"{math.ceil(plan.config.trainer.stop_timeout)}s"
        if part.gpus:
            # By number: services that ask for a count would all be given the same first ones.
            ids = [str(gpu + i) for i in range(part.gpus)]
            devices = [{"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}]
            services[part.name]["deploy"] = {"resources": {"reservations": {"devices": devices}}}
            gpu += part.gpus
    return document({"services": services})


def _service(part: Part, image: str, volumes: list[str], root: str) -> Mapping[str, Any]:
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": [part.command[0]],
        "command": list(part.command[1:]),
        "working_dir": root,
        "volumes": volumes,
        "restart": f"on-failure:{RESTARTS}",
        "ipc": "host",
    }
    if part.environment:
        service["environment"] = dict(part.environment)
    if part.after:
        service["depends_on"] = list(part.after)
    return service
