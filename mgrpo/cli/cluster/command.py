"""The command line of `mgrpo launch` and `mgrpo monitor`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from mgrpo.errors import ConfigError


class Target(enum.StrEnum):
    """What the parts are started by."""

    SLURM = "slurm"
    COMPOSE = "compose"
    K8S = "k8s"


def launch(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the run; every machine sees it.", show_default=False)
    ],
    target: Annotated[Target, typer.Option(help="What starts the parts.", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="PART=NODE", help="slurm: node of store, an agent, vllm-AGENT or rollout."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help='slurm: a further option of every job, "--partition=gpu".'),
    ] = None,
    image: Annotated[str, typer.Option(help="compose, k8s: image with mgrpo.")] = "mgrpo:latest",
    vllm_image: Annotated[
        str, typer.Option(help="compose, k8s: image with vLLM.")
    ] = "vllm/vllm-openai:latest",
    claim: Annotated[str, typer.Option(help="k8s: the volume claim that all share.")] = "mgrpo-run",
    port: Annotated[int, typer.Option(help="First of the ports that the parts listen at.")] = 5600,
    gpus_per_node: Annotated[int, typer.Option(help="No part may need more.")] = 8,
    submit: Annotated[bool, typer.Option("--submit", help="slurm: hand the jobs in.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Write what a cluster starts a run with: a job an agent, the store, rollout workers, vLLM servers."""
    from mgrpo.cli.cluster import launcher

    order = launcher.Order(
        config=config, out=out, target=target.value, overrides=overrides or [], hosts=host or [],
        sbatch=sbatch or [], image=image, vllm_image=vllm_image, claim=claim, port=port,
        gpus_per_node=gpus_per_node, submit=submit,
    )  # fmt: skip
    if dry_run and submit:
        raise ConfigError("--dry-run writes nothing, so there is nothing to --submit")
    launcher.launch(order, dry_run)


def monitor(run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]) -> None:
    """Begin and follow a run whose parts were started one by one; writes metrics, curves and the summary."""
    from mgrpo.cli.cluster.follow import follow

    follow(run)
