"""A harness as a command: one process a rollout, which ends with its rollout whatever becomes of either.

    stdin    the question: one line of JSON, {"text", "id", "info", "tags", "attachments"}
    stdout   the answer: the last line that is not empty. A JSON object with the key "answer" is read as such (see
             scores.py), anything else is the answer itself, as text
    stderr   its last lines stand in the reason why a rollout failed
    status   0: answered. 75 (EX_TEMPFAIL): something it needs did not answer, and the rollout is played again.
             Any other: the rollout fails

The process leads a group of its own. When it ends, and when the rollout ends before it, the whole group is killed; only
a process that leaves the group (setsid) escapes. Its id is not free for others until then: the process is reaped last.
Its environment holds what programs need everywhere, the rollout's addresses and what the task's options name: not the
keys of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError, RolloutError
from mgrpo.gateway.scores import Answer, read_answer

COMMON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
)
"""Variables of the worker that every command gets, and those that begin with LC_."""
ANSWER_BYTES = 1 << 20  # of the last line
STDERR_BYTES = 4096  # of what is kept of it
SHOWN = 1000  # characters of it in a failure
TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h
DRAIN_SECONDS = 2.0  # for what a process that left the group still holds open
KILL_SECONDS = 10.0  # for a killed process to be gone
CROWDED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class Command:
    """What is started. output_bytes: most that it may write."""

    words: tuple[str, ...]
    folder: str | None = None
    env: tuple[str, ...] = ()
    output_bytes: int = 16_000_000

    def environment(self, added: Mapping[str, str]) -> dict[str, str]:
        """Of its process. Raises ConfigError for a variable of `env` that is not set."""
        found = {n: v for n, v in os.environ.items() if n in COMMON or n.startswith("LC_")}
        for name in self.env:
            if name not in os.environ:
                raise ConfigError(f"task.options.env: the environment variable {name} is not set")
            found[name] = os.environ[name]
        return found | dict(added)


def question_json(question: Question) -> dict[str, object]:
    """What a harness is given of a question: all but its gold answers."""
    return {
        "text": question.text,
        "id": question.id,
        "info": dict(question.info),
        "tags": dict(question.tags),
        "attachments": list(question.attachments),
    }


def answer_of(output: bytes, where: str) -> Answer:
    """What the last line says that is not empty; no answer (None) where there is none. Raises RolloutError."""
    lines = output.strip().splitlines()
    line = lines[-1].strip() if lines else b""
    if len(line) > ANSWER_BYTES:
        raise RolloutError(f"the last line of {where} is longer than {ANSWER_BYTES} bytes")
    text = line.decode("utf-8", "replace")
    if text.startswith("{"):
        body: object = None
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(text)
        if isinstance(body, dict) and "answer" in body:
            return read_answer(body, where)  # whose error is no text
    return Answer(text or None)


async def run_command(
    command: Command, given: Mapping[str, object], environment: Mapping[str, str]
) -> Answer:
    """Start it, wait for its end, return its answer. given: the question, as JSON values. environment: the whole of it.
    Raises RolloutError for a process that fails, InfrastructureError where it asks for another try or the machine has
    no room for a process, ConfigError where it cannot be started at all."""
    where = f"command {command.words[0]!r:.200}"
    running = _started(command, given, environment, where)
    try:
        await running.wait()
    finally:
        status = await running.end()
    if running.flooded:
        raise RolloutError(
            f"{where} wrote more than {command.output_bytes} bytes; task.options.output_mb bounds it"
        )
    if status is None:
        raise InfrastructureError(f"{where} had not ended {KILL_SECONDS:g} s after it was killed")
    if status:
        raise _failure(where, status, bytes(running.stderr.kept))
    return answer_of(bytes(running.stdout.kept), where)


def _started(
    command: Command, given: Mapping[str, object], environment: Mapping[str, str], where: str
) -> _Running:
    with _question_file(given) as stdin:
        try:
            process = subprocess.Popen(
                command.words,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=command.folder,
                env=dict(environment),
                start_new_session=True,
                bufsize=0,
            )
        except (OSError, ValueError) as error:
            words = f"{where} cannot be started ({getattr(error, 'strerror', None) or error})"
            crowded = isinstance(error, OSError) and error.errno in CROWDED
            raise (InfrastructureError if crowded else ConfigError)(words) from error
    try:
        return _Running(process, os.pidfd_open(process.pid), command.output_bytes)
    except BaseException as error:
        with process:  # closes its pipes and reaps it
            process.kill()
        if isinstance(error, OSError):
            raise InfrastructureError(f"{where} cannot be watched ({error.strerror})") from error
        raise


def _failure(where: str, status: int, stderr: bytes) -> Exception:
    """Of a process that ended with `status`: below 0, the signal that ended it."""
    how = f"status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-status).name
    tail = stderr.decode("utf-8", "replace").strip()[-SHOWN:]
    text = f"{where} ended with {how}" + (f": {tail}" if tail else ", and wrote nothing to stderr")
    return InfrastructureError(text) if status == TEMPORARY else RolloutError(text)


@contextlib.contextmanager
def _question_file(given: Mapping[str, object]) -> Iterator[int]:
    """A file in memory, open at its beginning: a program that does not read it blocks nobody, and no disk holds it."""
    try:
        data = json.dumps(given, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    except (TypeError, ValueError) as error:
        raise RolloutError(f"question {given.get('id')!r} cannot be given to a command: {error}") from None
    try:
        file = os.memfd_create("question")
    except OSError as error:
        raise InfrastructureError(f"no room for a question ({error.strerror})") from error
    try:
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(data)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


class _Tail:
    """Reads a pipe as it fills, and keeps its last bytes. seen: called with the number of bytes of each piece."""

    def __init__(self, pipe: IO[bytes], keep: int, seen: Callable[[int], None]) -> None:
        self.kept = bytearray()
        self._pipe, self._keep, self._seen = pipe, keep, seen
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.stop()
            return
        self.kept += data
        if len(self.kept) > 2 * self._keep:
            del self.kept[: len(self.kept) - self._keep]
        self._seen(len(data))

    def stop(self) -> None:
        """Read no more. Idempotent."""
        if not self.ended.done():
            self._loop.remove_reader(self._pipe.fileno())
            self.ended.set_result(None)

    def close(self) -> None:
        self.stop()
        self._pipe.close()


class _Running:
    """A process that was started, until its end() has been awaited."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, limit: int) -> None:
        """pidfd: readable once the process has ended. limit: bytes that it may write."""
        assert process.stdout is not None and process.stderr is not None
        self._process, self._pidfd, self._left = process, pidfd, limit
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._flood: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._gone)
        self.stdout = _Tail(process.stdout, ANSWER_BYTES + 2, self._count)
        self.stderr = _Tail(process.stderr, STDERR_BYTES, self._count)

    @property
    def flooded(self) -> bool:
        """Whether it has written more than it may."""
        return self._left < 0

    def _count(self, size: int) -> None:
        self._left -= size
        if self.flooded and not self._flood.done():
            self._flood.set_result(None)

    def _gone(self) -> None:
        """The process has ended, and is not reaped yet."""
        self._loop.remove_reader(self._pidfd)
        if not self._exited.done():
            self._exited.set_result(None)

    async def wait(self) -> None:
        """Until it has ended and all it wrote is read, or it has written more than it may."""
        await asyncio.wait({self._exited, self._flood}, return_when=asyncio.FIRST_COMPLETED)
        if not self.flooded:
            self._kill()  # what it started and left behind
            await asyncio.wait({self.stdout.ended, self.stderr.ended}, timeout=DRAIN_SECONDS)

    async def end(self) -> int | None:
        """Kill its group, reap it, close everything. Its status, below 0 the signal that ended it; None where it will
        not end."""
        try:
            self._kill()
            await asyncio.wait({self._exited}, timeout=KILL_SECONDS)
        finally:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.stdout.close()
            self.stderr.close()
            status = self._process.poll()
            if status is None:  # still dying, and this was cancelled meanwhile, or it takes its time
                threading.Thread(target=self._process.wait, name="reap", daemon=True).start()
        return status

    def _kill(self) -> None:
        """Its id is still its own: it is reaped after this."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
