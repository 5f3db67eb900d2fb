"""A trainer of several ranks: this process becomes their torchrun, which starts them and ends them together.

There is one place that restarts, and it is not here: when a rank ends, however, all end, and this process with them,
with a last line that names the rank and the reason. Whoever watches it starts the trainer again from its checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import NoReturn

from mgrpo.errors import CheckpointError, ConfigError, CorruptionError, MgrpoError


def run_ranks(size: int, arguments: Sequence[str], threads: int, stop_seconds: float) -> None:
    """Run `python -m mgrpo *arguments` as `size` ranks until they end. stop_seconds: for a last checkpoint, once the
    ranks have got SIGTERM.

    Raises MgrpoError, or ConfigError for a rank that ended with status 2, naming the first that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Rank 0 serves the ranks' key-value store itself: with torchrun's, every other start after a kill has failed.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=math.ceil(stop_seconds),
    )
    command = ["-m", "mgrpo", *arguments, "--parent", str(os.getpid())]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = 2 if failure.exitcode == 2 else 1
        text = f"rank {rank} of {size}: {_reason(failure.exitcode, failure.message)}"
        raise (ConfigError if status == 2 else MgrpoError)(text) from None
    except SignalException:
        raise SystemExit(0) from None  # SIGTERM, and the ranks have stopped


def as_rank(work: Callable[[], None]) -> NoReturn:
    """Do `work` as one of torchrun's processes, then end this one.

    An error goes to the file from which torchrun takes its reason. After work that went well the interpreter is not
    taken down: a thread of the process group that still wants the GIL then aborts the process, and a rank that has
    done everything would count as one that failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    record(work)()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _reason(code: int, message: object) -> str:
    if isinstance(message, dict):  # the rank's own word, however it ended afterwards
        message = message.get("message", "")
    elif code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    name, colon, text = str(message).partition(": ")
    plain = {kind.__name__ for kind in (MgrpoError, ConfigError, CorruptionError, CheckpointError)}
    return text if colon and name in plain else str(message)
