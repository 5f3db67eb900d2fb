"""`mgrpo keys`: make the keys that encrypted links need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Keys for encrypted links between servers.", no_args_is_help=True, pretty_exceptions_enable=False
)
Folder = Annotated[Path, typer.Option("--dir", help="Folder of the server's keys.")]


@app.command()
def init(folder: Folder = Path("keys")) -> None:
    """Make a server's key pair and an empty allow-list."""
    from mgrpo.transport.keys import init_keys

    print(f"{init_keys(folder)}: keep it on this server; allow peers with `mgrpo keys add NAME --role ROLE`")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the peer, for people.", show_default=False)],
    role: Annotated[
        str, typer.Option(help="worker, launcher, observer or trainer:AGENT.", show_default=False)
    ],
    folder: Folder = Path("keys"),
    out: Annotated[Path | None, typer.Option(help="Where to write the peer's key file.")] = None,
) -> None:
    """Allow a peer: writes its key file and lists its public key. Running servers notice by themselves."""
    from mgrpo.transport.keys import add_key

    print(f"{add_key(folder, name, role, out)}: move it to {name}; it is the peer's only copy")
