"""When a conversation, its turns and its tools began and ended, for the record of spans.

They are kept until the attempt has ended: only then does the conversation have the number by which the rollout's record
names it (Episode.renumber), and only then has its last turn ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mgrpo.engines.base import Engine, Generation
from mgrpo.record import spans


@dataclass(slots=True)
class ConversationSpans:
    """Of one conversation; times are those of spans.now()."""

    opened: int = field(default_factory=spans.now)
    closed: int = 0
    _ended: list[tuple[str, str, int, int, spans.Args]] = field(default_factory=list)  # turns and tools

    def close(self) -> None:
        """The conversation has ended; the last call counts."""
        self.closed = spans.now()

    def turn(self, number: int, start: int, context: int, out: Generation | None, engine: Engine) -> None:
        """A request to the engine has ended; out: None where it raised. context: tokens."""
        if spans.recording():
            sampled = 0 if out is None else len(out.token_ids)
            version = int(out.versions[-1]) if out is not None and len(out.versions) else engine.version
            args: spans.Args = {"turn": number, "context": context, "sampled": sampled, "version": version}
            self._ended.append(("turn", "", start, spans.now(), args))

    @contextlib.contextmanager
    def tool(self, name: str) -> Iterator[None]:
        """Around a tool's work; also kept where it raises."""
        start, failed = spans.now(), 1
        try:
            yield
            failed = 0
        finally:
            if spans.recording():
                self._ended.append(("tool", name, start, spans.now(), {"retries": 0, "failed": failed}))

    def keep(self, lane: str, role: str, invocation: int, attempt: int) -> None:
        """Record them, once."""
        if not spans.recording() or not self.opened:
            return
        place: spans.Args = {"role": role, "invocation": invocation, "attempt": attempt}
        last = max([self.closed or spans.now(), *(end for _, _, _, end, _ in self._ended)])
        for kind, name, start, end, args in self._ended:
            where: spans.Args = place if kind == "turn" else {"attempt": attempt}
            spans.add(kind, name or role, lane, start, end, where | args)
        spans.add("invocation", role, lane, self.opened, last, place)
        self._ended, self.opened = [], 0
