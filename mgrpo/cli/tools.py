"""`mgrpo tools`: make a corpus that agents search without a network, and serve one to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgrpo.errors import ConfigError

app = typer.Typer(help="Corpora for agents' tools.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def index(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of .html, .txt and .md files, or a .jsonl file of documents.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The corpus' file.", show_default=False)],
    base: Annotated[
        str, typer.Option(help="What stands before the files' paths in addresses, e.g. https://docs.org/")
    ] = "",
) -> None:
    """Write a corpus: one SQLite file with all pages and their full-text index."""
    from mgrpo.tools.corpus import Corpus
    from mgrpo.tools.index import read_pages

    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist")
    try:
        corpus = Corpus.build(out, read_pages(source, base))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(f"{out}: {corpus.size} pages, {corpus.passages} passages, digest {corpus.digest}")
    corpus.close()


@app.command()
def serve(
    corpus: Annotated[Path, typer.Argument(help="File of mgrpo tools index.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback, anybody may read the corpus.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    k: Annotated[int, typer.Option(min=1, max=20, help="Results of a search.")] = 5,
    page_chars: Annotated[int, typer.Option(min=200, help="Characters of a part of a page.")] = 4000,
) -> None:
    """Serve a corpus over Search-R1's protocol (POST /retrieve, /access) and over MCP (/mcp)."""
    from mgrpo.tools import serve as server

    server.serve(corpus, host, port, k=k, page_chars=page_chars)
