"""k8s.json: what serves for ever is a Deployment, what ends with the run a Job; one volume, claimed by all."""

from __future__ import annotations

import math
from typing import Any

from mgrpo.cli.cluster.plan import Part, Plan
from mgrpo.cli.cluster.text import document

RETRIES = 5


def k8s(plan: Plan, image: str, vllm_image: str, claim: str) -> str:
    """The file's text, for `kubectl apply -f`. claim: name of a ReadWriteMany volume claim."""
    items: list[dict[str, Any]] = []
    for part in plan.parts:
        if part.ports:
            items.append(_service(part))
        pod = _pod(part, vllm_image if part.is_server else image, claim, str(plan.site.root))
        pod["terminationGracePeriodSeconds"] = math.ceil(plan.config.trainer.stop_timeout)
        items.append(_workload(part, pod))
    return document({"apiVersion": "v1", "kind": "List", "items": items})


def _service(part: Part) -> dict[str, Any]:
    """Headless: the name is the pod's own address, and there is before the pod is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": part.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"mgrpo-part": part.name},
            "ports": [{"name": f"p{port}", "port": port} for port in part.ports],
        },
    }


def _workload(part: Part, pod: dict[str, Any]) -> dict[str, Any]:
    labels = {"mgrpo-part": part.name}
    template = {"metadata": {"labels": labels}, "spec": pod}
    if part.serves_for_ever:
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": part.name},
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},  # never two stores on one file
                "selector": {"matchLabels": labels},
                "template": template,
            },
        }
    template["spec"]["restartPolicy"] = "OnFailure"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": part.name},
        "spec": {"backoffLimit": RETRIES, "template": template},
    }


def _pod(part: Part, image: str, claim: str, root: str) -> dict[str, Any]:
    resources: dict[str, Any] = {"requests": {"cpu": part.cpus}}
    if part.gpus:
        resources["limits"] = {"nvidia.com/gpu": part.gpus}
    mounts = [{"name": "run", "mountPath": root}, {"name": "shm", "mountPath": "/dev/shm"}]
    container: dict[str, Any] = {
        "name": part.name,
        "image": image,
        "command": list(part.command),
        "workingDir": root,
        "resources": resources,
        "volumeMounts": mounts,
    }
    if part.environment:
        container["env"] = [{"name": name, "value": value} for name, value in part.environment.items()]
    return {
        "containers": [container],
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
