"""What messages say, marked before a chat template renders it and found again in what it rendered.

Each text that a message must deliver stands between two copies of a private-use character of its own, inside its outer
white space, which templates may trim. A message that arrives is there once, in its place in the order, and unchanged.

Tags and control tokens that a message spells are broken by one more such character: templates look for some of them
("</think>" in a turn, "<tool_response>" in a page) and would cut the message there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mgrpo.errors import ChatError
from mgrpo.model.chat_ids import PRIVATE, Rendered

Message = Mapping[str, Any]

_TAG = re.compile(r"""<[^<>\s'"{}%]{1,40}>|\[/?[A-Z_]{2,30}\]""")
_OPTIONAL = ("reasoning_content", "reasoning", "thinking")  # templates drop the thoughts of old turns


def tags_in(template: str, tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the texts that a template may look for in a message: the tags that it spells, and control tokens."""
    texts = {*_TAG.findall(template), *(t for t in tokens if len(t) > 1)}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@dataclass(slots=True)
class _Leaf:
    """One text of message number `message`."""

    message: int
    role: str
    text: str  # without its outer white space
    required: bool


@dataclass(slots=True)
class Marks:
    """The marks of one chat."""

    tags: re.Pattern[str]
    is_control: Callable[[str], bool]
    """Whether the tokenizer finds a control token in a text."""
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    """After find(): message number -> (start, end) of what it says."""
    _leaves: dict[str, _Leaf] = field(default_factory=dict)
    _break: str = ""
    _forged: bool = False  # a key, name or schema holds a control token
    _free: Iterator[str] = field(default_factory=lambda: iter(()))

    def mark(self, messages: Sequence[Message], tools: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(messages, tools) with their marks."""
        seen = "".join(_strings([messages, tools]))
        self._free = (c for c in map(chr, PRIVATE) if c not in seen)
        self._break = next(self._free)
        # What messages say is marked in any case; the rest is small, and asked about in one go.
        rest = [{k: v for k, v in m.items() if k != "content" or not isinstance(v, str)} for m in messages]
        self._forged = self.is_control("\n".join(_strings([rest, tools])))
        marked = [
            {self._key(k): self._field(number, m, k, v) for k, v in m.items()}
            for number, m in enumerate(messages)
        ]
        return marked, [self._broken(tool) for tool in tools]

    def find(self, rendered: str, name: str) -> Rendered:
        """The chat without its marks. name: of the template, for errors. Raises ChatError where a message's text did
        not arrive."""
        pieces = re.split(f"([{self._break}{''.join(self._leaves)}])", rendered)
        parts: list[str] = []
        said: list[tuple[int, int]] = []
        opened: dict[str, int] = {}
        found: dict[str, list[tuple[int, int]]] = {mark: [] for mark in self._leaves}
        at = 0
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                parts.append(piece)
                at += len(piece)
            elif piece == self._break:
                if not opened:
                    said.append((at, at))
            elif piece in opened:
                found[piece].append((opened.pop(piece), at))
                said.append(found[piece][-1])
            else:
                opened[piece] = at
        text = "".join(parts)
        self._check(text, found, opened, name)
        return Rendered(text, tuple(sorted(said)))

    # -- before --

    def _field(self, number: int, message: Message, key: str, value: Any) -> Any:
        if key == "content" or key in _OPTIONAL:
            return self._said(number, str(message.get("role")), value, key == "content")
        return self._broken(value)

    def _said(self, number: int, role: str, value: Any, required: bool) -> Any:
        """`value` with each of its texts marked, at any depth."""
        if isinstance(value, str):
            inner = value.strip()
            if not inner:
                return value
            mark = next(islice(self._free, 1), "")
            if not mark:
                raise ChatError(f"a chat of more than {len(PRIVATE)} texts cannot be rendered")
            self._leaves[mark] = _Leaf(number, role, inner, required)
            at = value.index(inner)
            broken = self.tags.sub(lambda m: m[0][:1] + self._break + m[0][1:], inner)
            return value[:at] + mark + broken + mark + value[at + len(inner) :]
        if isinstance(value, Mapping):
            return {
                self._key(k): self._broken(v) if k == "type" else self._said(number, role, v, required)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._said(number, role, v, required) for v in value]
        return value

    def _broken(self, value: Any) -> Any:
        """`value` with breaks between all characters of the texts that hold a control token, at any depth."""
        if isinstance(value, str):
            return self._key(value)
        if isinstance(value, Mapping):
            return {self._key(k): self._broken(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken(v) for v in value]
        return value

    def _key(self, text: Any) -> Any:
        if not self._forged or not isinstance(text, str) or not self.is_control(text):
            return text
        return self._break + self._break.join(text) + self._break

    # -- after --

    def _check(
        self, text: str, found: Mapping[str, list[tuple[int, int]]], opened: Mapping[str, int], name: str
    ) -> None:
        last = -1
        for mark, leaf in self._leaves.items():
            places = found[mark]
            whole = mark not in opened and all(_same(text[a:b], leaf.text) for a, b in places)
            if not whole or (leaf.required and len(places) != 1):
                how = "has no place for" if not places and mark not in opened else "changes or repeats"
                raise ChatError(
                    f"the chat template of {name!r} {how} the message of role {leaf.role!r} "
                    f"({leaf.text[:40]!r}): what it says would not reach the policy as it stands"
                )
            if leaf.required:
                if places[0][0] < last:
                    raise ChatError(
                        f"the chat template of {name!r} puts the message of role {leaf.role!r} "
                        f"({leaf.text[:40]!r}) before an earlier one: a history that is only extended cannot do that"
                    )
                last = places[0][0]
                start = self.places.get(leaf.message, places[0])[0]
                self.places[leaf.message] = start, places[0][1]


def _same(arrived: str, said: str) -> bool:
    """As it was said, or as JSON writes it."""
    return arrived == said or arrived in (json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
