"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from mgrpo.cli.bench import bench
from mgrpo.cli.cluster.command import launch as launch_run
from mgrpo.cli.cluster.command import monitor as follow_run
from mgrpo.cli.filter import filter_questions
from mgrpo.cli.gateway import gateway
from mgrpo.cli.keys import app as keys_app
from mgrpo.cli.plan import plan
from mgrpo.cli.questions import app as questions_app
from mgrpo.cli.store import app as store_app
from mgrpo.cli.tools import app as tools_app
from mgrpo.cli.trace import trace
from mgrpo.errors import CheckpointError, ConfigError, CorruptionError, MgrpoError

# What a file system says of itself, and what starting again does not mend.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})

app = typer.Typer(
    help="Train teams of language models with M-GRPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(store_app, name="store")
app.add_typer(keys_app, name="keys")
app.add_typer(questions_app, name="questions")
app.add_typer(tools_app, name="tools")

Config = Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. trainer.steps=40."),
]
Out = Annotated[Path, typer.Option("--out", help="The run's folder.", show_default=False)]
Parent = Annotated[int | None, typer.Option(hidden=True)]


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="The run's TOML file.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of a new run.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run that --out already holds.")] = False,
) -> None:
    """Train all agents: starts the store, the trainers and the rollout workers, and shows their progress."""
    from mgrpo.run import launch

    if resume is not None:
        if config is not None or out is not None or fresh:
            raise ConfigError("--resume takes no config file, --out or --fresh: the folder knows its own")
        launch.resume(resume, overrides or [])
    elif config is None or out is None:
        raise ConfigError("train needs a config file and --out FOLDER, or --resume FOLDER")
    else:
        launch.start(config, out, overrides or [], fresh=fresh)


@app.command(name="init-task")
def init_task(
    name: Annotated[str, typer.Argument(help="Name of the task and its package.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the package; default: NAME.", show_default=False)
    ] = None,
) -> None:
    """Write a small package with a task that trains at once, to be changed into your own."""
    from mgrpo.cli.scaffold import init_task

    folder = init_task(name, out)
    print(f"{folder}: pip install -e {folder}, then mgrpo train {folder / 'run.toml'} --out runs/{name}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    n: Annotated[int, typer.Option(help="Number of questions.")] = 400,
    split: Annotated[str, typer.Option(help="train, validation or heldout.")] = "heldout",
    seed: Annotated[int, typer.Option(help="Seed of the sampled rollouts.")] = 0,
) -> None:
    """Accuracy of a run's policies, before and after training."""
    from mgrpo.cli.evaluate import evaluate_run

    evaluate_run(run, n, split, seed)


@app.command()
def compare(
    config: Config,
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison.")] = Path("runs/compare"),
    seeds: Annotated[int, typer.Option(help="Seeds 1 to this number.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs side by side; 0: one for each core.")] = 0,
    n: Annotated[int, typer.Option(help="Held-out questions of each score.")] = 400,
    repeats: Annotated[
        int | None,
        typer.Option(help="Sampled rollouts of each held-out question, and of each question of eval.sets."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", "--variants", metavar="NAME,...", show_default=False,
            help="Only these beside cotrain: main-only, single, no-alignment, shared ...; repeatable.",
        ),
    ] = None,
    origin: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", show_default=False,
                     help="A run whose policies after RL every variant begins with."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and start none.")] = False,
    overrides: Overrides = None,
) -> None:  # fmt: skip
    """Co-training beside frozen agents, a single agent and controls at equal rollouts: runs, held-out scores, tables.

    Started again, it goes on."""
    from mgrpo.cli.comparison import command

    request = command.Request(
        config, out, overrides or [], seeds, jobs, n, variants or [], origin, repeats, dry_run
    )
    command.compare(request)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    export: Annotated[
        Path | None,
        typer.Option(help="Write the page as one file instead of serving it.", show_default=False),
    ] = None,
    trees: Annotated[int, typer.Option(help="Rollout trees in the exported file.")] = 2000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback, a token is asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8400,
) -> None:
    """The run page: curves, the alignment of each step, rollout trees with their credit, before and after."""
    from mgrpo.view import server as viewer

    if export is not None:
        viewer.export(run, export, trees)
    else:
        viewer.serve(run, host, port)


@app.command()
def top(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, or the TOML file of one on several addresses.", show_default=False
        ),
    ],
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show the run a single time.")] = False,
) -> None:
    """How all agents of a run stand: reward, accuracy, alignment, speed, lag, queues, time left."""
    from mgrpo.view.top import watch

    watch(run, every, once)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    question: Annotated[
        list[str] | None, typer.Argument(help="Questions; without any they are typed in.", show_default=False)
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="Ask the policies from before RL.")] = False,
    sampled: Annotated[bool, typer.Option("--sampled", help="Sample instead of the likeliest.")] = False,
) -> None:
    """Ask a run's agents a question and watch them work."""
    from mgrpo.cli.chat import converse

    converse(run, before, sampled, question or [])


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    rollout: Annotated[
        list[str] | None, typer.Option(help="A rollout's id, e.g. 12/195/3; repeatable.", show_default=False)
    ] = None,
    sample: Annotated[int, typer.Option(help="Replay so many random rollouts instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
) -> None:
    """Rebuild reward, advantage, alignment, batch and loss of a rollout; are they what training used, bit for bit?"""
    from mgrpo.cli.replay import replay_run

    replay_run(run, rollout or [], sample, seed)


@app.command()
def trainer(
    config: Config,
    agent: Annotated[str, typer.Option(help="The role to train, e.g. main.", show_default=False)],
    out: Out,
    overrides: Overrides = None,
    parent: Parent = None,
) -> None:
    """Run one agent's trainer (the launcher does this for you on one machine)."""
    from mgrpo.run.processes import run_trainer_process

    run_trainer_process(config, agent, out, overrides or [], parent)


@app.command()
def rollout(
    config: Config,
    out: Out,
    worker: Annotated[int, typer.Option(help="Number of this worker, 0 to rollout.workers - 1.")] = 0,
    overrides: Overrides = None,
    parent: Parent = None,
) -> None:
    """Run one rollout worker (the launcher does this for you on one machine)."""
    from mgrpo.run.processes import run_worker_process

    run_worker_process(config, worker, out, overrides or [], parent)


@app.command()
def engine(
    config: Config,
    agent: Annotated[str, typer.Option(help="Role whose policy it serves.", show_default=False)],
    out: Out,
    replica: Annotated[int, typer.Option(help="Number of this server, 0 to engine.replicas - 1.")] = 0,
    overrides: Overrides = None,
    parent: Parent = None,
) -> None:
    """Run one inference server of an agent (the launcher does this for you on one machine)."""
    from mgrpo.run.processes import run_engine_process

    run_engine_process(config, agent, replica, out, overrides or [], parent)


app.command()(plan)
app.command()(bench)
app.command(name="filter")(filter_questions)
app.command()(gateway)
app.command()(trace)
app.command(name="launch")(launch_run)
app.command(name="monitor")(follow_run)


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)  # an interrupt is a status here, not an exception
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (ConfigError, CorruptionError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # click's own usage errors carry their message and status; everything else is a bug and shows its trace
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
