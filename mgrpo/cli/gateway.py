"""`mgrpo gateway`: plays the rollouts of a run whose harness is elsewhere (task.options.remote)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgrpo.errors import ConfigError


def gateway(
    urls: Annotated[
        list[str],
        typer.Argument(metavar="URL...", help="Gateways, one a rollout worker, e.g. http://10.0.0.5:8700.",
                       show_default=False),
    ],
    command: Annotated[
        str, typer.Option("--command", help='Started for each rollout, e.g. "python my_team.py".', show_default=False)
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Rollouts at once.")] = 4,
    folder: Annotated[
        Path | None, typer.Option(help="The command's working folder; default: this one.", show_default=False)
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the harness key, where the run asks for one.")
    ] = "MGRPO_HARNESS_KEY",
    patience: Annotated[float, typer.Option(min=1.0, help="Seconds that a gateway may not answer.")] = 600.0,
    output_mb: Annotated[float, typer.Option(min=0.001, help="Most that one command may write, in MB.")] = 16.0,
) -> None:  # fmt: skip
    """Claim rollouts of a run, start a command for each, give its answers back; ends when the run does."""
    import asyncio
    import os
    import shlex
    import shutil
    import signal

    from mgrpo.gateway.claimer import Claimer
    from mgrpo.gateway.command import Command

    for url in urls:
        scheme, _, rest = url.partition("://")
        if scheme not in ("http", "https") or not rest.strip("/"):
            raise ConfigError(f"{url!r}: expected the address of a gateway, e.g. http://10.0.0.5:8700")
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"--command {command!r}: {error}") from None
    program = words[0] if words else ""
    if "/" in program:
        program = str(Path(folder or ".") / program)
    if not program or shutil.which(program) is None:
        raise ConfigError(f"--command {command!r}: there is no such program")
    started = Command(words, None if folder is None else str(folder), (), int(output_mb * 1e6))
    key = os.environ.get(key_env, "").strip() or None
    claimer = Claimer(started, key, concurrency, patience, lambda line: print(line, flush=True))

    async def play() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await claimer.play(urls)

    try:
        asyncio.run(play())
    except asyncio.CancelledError:
        raise typer.Exit(130) from None
