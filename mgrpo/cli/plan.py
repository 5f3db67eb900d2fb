"""The command line of `mgrpo plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mgrpo.errors import ConfigError


def plan(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. trainer.micro_batch=8192."),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="gpus=N", help="Each trained policy on N GPUs, one a rank; mesh.dp grows."),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200 or b200: speed, and memory unless given.")
    ] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU, e.g. 80GB.", show_default=False)
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Main memory of a host, e.g. 2TB; default: this machine's.")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change an assumption of the page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_suggestions: Annotated[
        bool, typer.Option("--no-suggestions", help="Do not compute changes where it does not fit.")
    ] = False,
) -> None:
    """Does it fit, what does it cost, what to change: memory of each trainer, bytes, expected time of a step. Starts
    nothing, and needs no GPU and no weights: a model's config.json is enough."""
    from mgrpo.config import load_config
    from mgrpo.planning.assumptions import GPUS, memory_of
    from mgrpo.planning.assumptions import assume as assumed
    from mgrpo.planning.page import as_dict, render
    from mgrpo.planning.plan import limits_of, plan_agent, planned_roles, suggest

    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu!r}: expected one of {', '.join(GPUS)}")
    limits = limits_of(
        GPUS[gpu],
        memory_of(gpu_memory, "--gpu-memory") if gpu_memory else None,
        memory_of(host_memory, "--host-memory") if host_memory else None,
        assumed(assume or []),
    )
    sets = list(overrides or [])
    roles = planned_roles(load_config(config, sets))
    for change in what_if or []:
        sets += _what_if(change, roles)
    loaded = load_config(config, sets)
    found = []
    for role in roles:
        one = plan_agent(loaded, role, limits)
        too_large = one.needed > one.available and not no_suggestions
        found.append((one, suggest(config, sets, role, limits) if too_large else []))
    print(json.dumps(as_dict(found, limits), indent=1) if as_json else render(found, limits))


def _what_if(change: str, roles: tuple[str, ...]) -> list[str]:
    name, _, value = change.partition("=")
    if name != "gpus" or not value.isdigit() or int(value) < 1:
        raise ConfigError(
            f"--what-if {change!r}: expected gpus=N with N >= 1; other changes are made by --set"
        )
    return [
        text
        for role in roles
        for text in (
            f'agents.{role}.policy.device="cuda"',
            f"agents.{role}.policy.ranks={value}",
            f"agents.{role}.policy.mesh.dp=0",  # what the other sides of the mesh leave
        )
    ]
