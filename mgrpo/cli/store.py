"""`mgrpo store`: serve a run's store on a machine of its own, look into it, mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgrpo.errors import ConfigError

app = typer.Typer(help="The shared store of a run.", pretty_exceptions_enable=False)
Keys = Annotated[Path | None, typer.Option("--keys", help="Folder of the server's keys (mgrpo keys init).")]
Key = Annotated[
    Path | None, typer.Option("--key", help="Key file of a launcher, where the link is encrypted.")
]


@app.callback(invoke_without_command=True)
def store(
    context: typer.Context,
    bind: Annotated[str | None, typer.Option("--bind", help="tcp://HOST:PORT or ipc://PATH.")] = None,
    db: Annotated[
        Path | None, typer.Option("--db", help="The store's file; made when it is missing.")
    ] = None,
    keys: Keys = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without encryption.")
    ] = False,
    metrics: Annotated[int | None, typer.Option("--metrics", help="Port of the Prometheus endpoint.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's TOML file, instead of --bind and --db.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="That run's folder.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve a store until SIGTERM: mgrpo store --config run.toml --out runs/a"""
    if context.invoked_subcommand is not None:
        return
    if config is not None and out is not None:  # as a part of a run on one machine
        from mgrpo.run.processes import run_store_process

        run_store_process(config, out, overrides or [], parent)
        return
    if bind is None or db is None:
        raise ConfigError("mgrpo store needs --config FILE and --out FOLDER, or --bind URL and --db FILE")
    from mgrpo.store.server import run_store
    from mgrpo.transport.keys import ServerKeys

    security = ServerKeys(keys) if keys is not None else None
    run_store(bind, db, security=security, insecure=insecure, metrics_port=metrics, announce=print)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="The store's file.", show_default=False)]) -> None:
    """Groups by state, the oldest, stuck leases, quarantined ones with reasons. Safe while the store runs."""
    from mgrpo.store.inspect import inspect as look

    for line in look(file).lines():
        print(line)


@app.command()
def requeue(
    queries: Annotated[list[str], typer.Argument(help="Quarantined groups.", show_default=False)],
    url: Annotated[str, typer.Option("--url", help="Address of the running store.", show_default=False)],
    role: Annotated[str, typer.Option(help="The role that is to try them again.", show_default=False)],
    key: Key = None,
) -> None:
    """Make quarantined groups ready again."""
    from mgrpo.store.client import LauncherClient
    from mgrpo.transport.keys import ClientKeys

    keys = ClientKeys.load(key) if key is not None else None
    with LauncherClient(url, "launcher", key=keys, name="requeue") as client:
        client.attach()
        for query, state in zip(queries, client.requeue(role, queries), strict=True):
            print(f"{query}: {state}")


@app.command()
def backup(
    target: Annotated[str, typer.Argument(help="New file on the store's machine.", show_default=False)],
    url: Annotated[str, typer.Option("--url", help="Address of the running store.", show_default=False)],
    key: Key = None,
) -> None:
    """Write a consistent copy of a running store."""
    from mgrpo.store.client import LauncherClient
    from mgrpo.transport.keys import ClientKeys

    keys = ClientKeys.load(key) if key is not None else None
    with LauncherClient(url, "launcher", key=keys, name="backup") as client:
        client.attach()
        client.backup(target)
    print(target)
