"""The processes of a run, one function each."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

from mgrpo.algorithms import open_algorithm
from mgrpo.config import RunConfig, config_digest, load_config, view_of
from mgrpo.config.evaluation import OWN
from mgrpo.config.profile import ProfileConfig
from mgrpo.credit import check_names
from mgrpo.engines.process import run_server
from mgrpo.engines.registry import find_engine
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.losses.registry import find_loss
from mgrpo.profiling.window import profiling
from mgrpo.run.folder import RunFolder
from mgrpo.run.importing import importing
from mgrpo.run.nsys import check_nsys, inside_nsys, is_inside, run_under_nsys
from mgrpo.run.supervisor import die_with_parent
from mgrpo.sinks.registry import find_sinks
from mgrpo.store.records import RunParams
from mgrpo.trainers.registry import check_trainer


def check_plugins(config: RunConfig) -> None:
    """Raise ConfigError for a part that the config names and that does not exist, refuses its settings, or does not fit
    another."""
    find_sinks(config.metrics.sinks)
    for role in config.policy_roles:
        view = view_of(config, role)
        find_engine(view)
        check_trainer(view)
    for role in config.training_roles:
        algorithm, loss = (
            open_algorithm(config, role),
            find_loss(config.agents[role].loss, f"agents.{role}.loss"),
        )
        if algorithm.per_token and loss.has_sequence_ratio:
            raise ConfigError(
                f"agents.{role}: algorithm {config.agents[role].algorithm.type!r} gives every token an advantage of "
                f"its own, and the ratio of loss {config.agents[role].loss.type!r} is the whole trajectory's; set "
                f'agents.{role}.loss.ratio_level = "token" or choose another loss'
            )


def load_run_task(config: RunConfig) -> Task:
    """The task of a config. Raises ConfigError when its options, the config's roles, their rewards or its evaluation
    sets do not fit it."""
    from mgrpo.environments.stages import load_staged, tasks_of_stages

    task = load_staged(config)
    for stage, of_stage in enumerate(tasks_of_stages(task, config.task.last_stage + 1)):
        for role, names in of_stage.scores.items():
            if role not in config.agents:
                continue
            try:
                check_names(role, config.stage_reward(role, stage), names)
            except ConfigError as error:
                raise ConfigError(
                    f"task.stages.{stage}: {error}" if config.task.stages else str(error)
                ) from None
    for number, evaluation in enumerate(config.eval.sets):
        if evaluation.source == OWN and evaluation.name not in task.evaluation_sets:
            known = ", ".join(task.evaluation_sets) or "none"
            raise ConfigError(
                f"eval.sets.{number}.name {evaluation.name!r}: task {config.task.label!r} has no such set "
                f"(its sets: {known})"
            )
    return task


def run_params(config: RunConfig) -> RunParams:
    """What the store must know of a run to admit, deliver and refuse."""
    return RunParams(
        run=config.task.label,
        digest=config_digest(config),
        roles=list(config.roles),
        training_roles=list(config.training_roles),
        k=config.trainer.group_size,
        batch=config.trainer.questions,
        max_lag=config.trainer.max_lag,
        pool=config.trainer.pool,
        lease_s=config.store.lease,
        group_timeout_s=config.store.group_timeout,
        in_order=True,
        claim_window=config.trainer.claim_window,
        heartbeat_timeout_s=config.store.heartbeat_timeout,
    )


def run_store_process(config_path: Path, out: Path, overrides: Sequence[str], parent: int | None) -> None:
    """The run's store, until SIGTERM. Raises MgrpoError when its serving thread ends by itself."""
    from mgrpo.store.server import run_store
    from mgrpo.transport.keys import server_keys

    config = _begin(config_path, overrides, parent, _leave_at_once)
    folder = RunFolder(out)
    folder.make_socket_folder(config)
    out.mkdir(parents=True, exist_ok=True)
    addresses = folder.addresses(config)
    run_store(
        addresses.store,
        folder.database,
        run_params(config),
        security=server_keys(addresses),
        insecure=addresses.insecure,
        metrics_port=config.store.metrics_port,
    )


def run_trainer_process(
    config_path: Path, role: str, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One agent's trainer, until the run is over."""
    config = _begin(config_path, overrides, parent, _leave_at_once)
    signal.signal(signal.SIGINT, _leave_at_once)
    if role not in config.agents:
        raise ConfigError(f"--agent {role}: unknown role; the config has {', '.join(config.roles)}")
    if config.policy_of(role) != role:
        raise ConfigError(
            f"--agent {role}: it shares a policy; start the trainer of {config.policy_of(role)!r}"
        )
    folder = RunFolder(out)
    folder.make_socket_folder(config)
    sets = [f"--set={o}" for o in overrides]
    arguments = ["trainer", str(config_path), "--agent", role, "--out", str(out), *sets]
    with _under_nsys(config, f"trainer-{role}", arguments, folder, config.profile.looks_at_trainer(role)):
        if config.ranks(role) == 1:
            _train(config, role, folder)
            return
        from mgrpo.run.torchrun import as_rank, run_ranks
        from mgrpo.trainers.torch.ranks import under_torchrun

        if under_torchrun():
            as_rank(lambda: _train(config, role, folder))
        else:
            run_ranks(config.ranks(role), arguments, config.trainer.threads, config.trainer.stop_timeout)


def _train(config: RunConfig, role: str, folder: RunFolder) -> None:
    """Rank 0 of a trainer, or one of the others."""
    rank = int(os.environ.get("RANK", "0")) if config.ranks(role) > 1 else 0
    with importing():
        from mgrpo.pipeline.trainer_loop import run_trainer
        from mgrpo.trainers.registry import open_trainer

        task = load_run_task(config) if rank == 0 else None
    wanted = config.profile if config.profile.looks_at_trainer(role) else ProfileConfig()
    with (
        profiling(wanted, f"{role}-rank{rank}", folder.profile, looks=rank in config.profile.ranks),
        open_trainer(view_of(config, role), folder.agent(role)) as trainer,
    ):
        if not trainer.is_main:
            trainer.run_commands()
            return
        if task is None:  # of a trainer whose first rank is not the main one
            task = load_run_task(config)
        run_trainer(config, role, task, folder.agents, folder.addresses(config), trainer)


def run_worker_process(
    config_path: Path, worker: int, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One rollout worker, until the run is over."""
    config = _begin(config_path, overrides, parent, _unwind)
    if not 0 <= worker < config.rollout.workers:
        raise ConfigError(f"--worker {worker}: expected 0 to {config.rollout.workers - 1} (rollout.workers)")
    folder, profiled = RunFolder(out), config.profile.looks_at_worker(worker)
    sets = [f"--set={o}" for o in overrides]
    arguments = ["rollout", str(config_path), "--worker", str(worker), "--out", str(out), *sets]
    with (
        _under_nsys(config, f"rollout-{worker}", arguments, folder, profiled),
        profiling(config.profile if profiled else ProfileConfig(), f"rollout-{worker}", folder.profile),
    ):
        with importing():
            from mgrpo.pipeline.rollout_worker import run_worker

            task = load_run_task(config)
        run_worker(config, worker, task, folder.addresses(config), folder.rollouts(worker))


def _under_nsys(
    config: RunConfig, name: str, arguments: Sequence[str], folder: RunFolder, profiled: bool
) -> AbstractContextManager[None]:
    """Around the work of process `name`, which `python -m mgrpo *arguments` starts; where it is to run under nsys and
    does not yet, that is started here, and this process ends with it. profiled: whether [profile] names it."""
    profile = config.profile
    if profiled and profile.steps is not None and profile.tool == "nsys" and not is_inside():
        check_nsys(profile)
        run_under_nsys(name, [sys.executable, "-m", "mgrpo", *arguments], folder.profile)
    return inside_nsys()


def run_engine_process(
    config_path: Path, role: str, replica: int, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One server of `role`'s policy, until it ends or SIGTERM."""
    config = _begin(config_path, overrides, parent, _unwind)
    if role not in config.policy_roles:
        raise ConfigError(f"--agent {role}: expected one with a policy: {', '.join(config.policy_roles)}")
    if not 0 <= replica < config.agents[role].engine.started_servers:
        raise ConfigError(f"--replica {replica}: the config starts no such server for {role!r}")
    view = view_of(config, role)
    backend = find_engine(view)
    backend.check(view)
    folder = RunFolder(out)
    folder.make_socket_folder(config)
    socket = folder.engine_socket(role, replica)
    code = run_server(backend.command(view, f"unix://{socket}"), socket)
    if code == 0:  # its engine has died, for instance: there was no signal
        raise MgrpoError(f"the server of {role!r} ended by itself; its last lines are above")
    if code < 0:  # end as it ended, so that who watches us sees a signal and no error
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _begin(
    config_path: Path,
    overrides: Sequence[str],
    parent: int | None,
    on_sigterm: Callable[[int, FrameType | None], None],
) -> RunConfig:
    if parent is not None:  # a rank has no use for a last word: those who would hear it end as well
        die_with_parent(parent, signal.SIGKILL if "RANK" in os.environ else signal.SIGTERM)
    signal.signal(signal.SIGTERM, on_sigterm)
    return load_config(config_path, overrides)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """For as long as a part has nothing to save: an exception could come up in any line, even of a library's callback
    that swallows it. A part with something to save replaces this by a mark that its loop looks at."""
    os._exit(0)


def _unwind(number: int, frame: FrameType | None) -> None:
    """For parts whose context managers end other processes. Once: the kernel may send the launcher's death twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)
