"""Why a rollout failed, and whose matter that is.

    infrastructure   an engine, tool or judge did not answer (InfrastructureError, ConnectionError, TimeoutError): the
                     rollout is tried again
    length           a trajectory outgrew its agent's max_length (ContextOverflowError)
    deadline         it took longer than rollout.deadline
    task             anything else that the task's code, a tool or a judge raised, and a rollout that cannot be used

What would fail every rollout alike is the program's: ConfigError, MemoryError and our own failed assertions end the
worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mgrpo.environments.stages import StagedTask
from mgrpo.environments.task import Task
from mgrpo.errors import ChatError, ConfigError, ContextOverflowError, InfrastructureError, MgrpoError

Kind = Literal["infrastructure", "length", "deadline", "task"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LONGEST = 2000  # characters of a failure's text
NAME_BYTES = 256  # of a string in the store


@dataclass(frozen=True, slots=True)
class Failure:
    """text: what happened and where (file:line of the task's code). wordless: the same without the error's message,
    which may quote a question; None where the text holds none."""

    kind: Kind
    text: str
    wordless: str | None = None


def failure_of(error: BaseException, task: Task) -> Failure:
    """What `error`, raised by an attempt of `task`, means for its rollout. Raises the error itself where it is the
    program's."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        ends_all = isinstance(leaf, ConfigError | MemoryError) and not isinstance(leaf, ChatError)
        if ends_all or _is_ours(leaf):
            raise leaf
    for leaf in leaves:  # the others may be its consequence
        if isinstance(leaf, InfrastructureError | ConnectionError | TimeoutError):
            return Failure("infrastructure", *_texts(leaf, task))
    first = leaves[0]
    return Failure("length" if isinstance(first, ContextOverflowError) else "task", *_texts(first, task))


def encodable(text: str) -> str:
    """`text` in characters that can be written: a lone surrogate becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str, limit: int = NAME_BYTES, tail: int = 0) -> str:
    """`text` in at most `limit` bytes of UTF-8; what is left out stands before its last `tail` bytes."""
    data = encodable(text).encode()
    if len(data) <= limit:
        return data.decode()
    gap = b" ... " if tail else b""
    head = data[: limit - tail - len(gap)].decode(errors="ignore")
    return head + gap.decode() + (data[-tail:].decode(errors="ignore") if tail else "")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in an exception group (asyncio.TaskGroup raises one), or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _is_ours(error: BaseException) -> bool:
    """An assertion of mgrpo's own, that of a built-in task aside."""
    if not isinstance(error, AssertionError):
        return False
    module = _frames(error)[-1][0]
    return module.startswith("mgrpo.") and not module.startswith("mgrpo.tasks.")


def _texts(error: BaseException, task: Task) -> tuple[str, str]:
    """With the error's message and without it."""
    if isinstance(task, StagedTask):  # its own code is that of its stages
        task = task.stages[-1]
    message = str(error) if isinstance(error, MgrpoError) else f"{type(error).__name__}: {error}"
    frames = _frames(error)
    module = type(task).__module__
    package = module.rpartition(".")[0] or module
    own = [place for name, place in frames if f"{name}.".startswith(f"{package}.")]
    place = own[-1] if own else _place_of_play(task)  # it returned something that cannot be used
    return encodable(f"{message[:LONGEST]} ({place})"), encodable(f"{type(error).__name__} ({place})")


def _place_of_play(task: Task) -> str:
    code = inspect.unwrap(type(task).play).__code__
    return f"{code.co_filename}:{code.co_firstlineno}, in play"


def _frames(error: BaseException) -> list[tuple[str, str]]:
    """(module, "file:line, in function") of each frame the error passed, the innermost last."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name}"
        frames.append((str(trace.tb_frame.f_globals.get("__name__", "")), place))
        trace = trace.tb_next
    return frames
