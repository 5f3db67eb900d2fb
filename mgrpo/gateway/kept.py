"""What a rollout's replies leave behind for `previous_response_id` and references to items of the Responses API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgrpo.gateway.errors import GatewayError
from mgrpo.model.chat import Message


@dataclass(frozen=True, slots=True)
class _Link:
    """One reply. previous: the reply that it follows. said: what the program added to it. reply: the answer."""

    previous: _Link | None
    said: Sequence[Message]
    reply: Message


class Kept:
    """The replies of one rollout: at most `replies`, and `characters` in all their texts together. A text that comes
    again, as in a program that sends its whole history each time, is kept and counted once. A reply for which there is
    no room is not kept."""

    def __init__(self, replies: int, characters: int) -> None:
        self._most, self._room = replies, characters
        self._links: dict[str, _Link] = {}
        self._items: dict[str, Mapping[str, object]] = {}
        self._texts: dict[str, str] = {}

    def history(self, identity: str) -> list[Message]:
        """All messages up to and with a reply. Raises GatewayError (404) where it is not kept."""
        link: _Link | None = self._links.get(identity)
        if link is None:
            raise _missing("response", identity)
        found: list[list[Message]] = []
        while link is not None:
            found.append([*link.said, link.reply])
            link = link.previous
        return [message for part in reversed(found) for message in part]

    def item(self, identity: str) -> Mapping[str, object]:
        """An item of a reply's output. Raises GatewayError (404) where it is not kept."""
        found = self._items.get(identity)
        if found is None:
            raise _missing("item", identity)
        return found

    def keep(
        self,
        identity: str,
        previous: str | None,
        said: Sequence[Message],
        reply: Message,
        items: Sequence[Mapping[str, object]],
    ) -> None:
        """Add a reply, once. previous: the id of the one that it follows."""
        if identity in self._links or len(self._links) >= self._most:
            return
        added = {text for text in _texts([*said, reply]) if text not in self._texts}
        size = sum(map(len, added))
        if size > self._room:
            return
        self._room -= size
        self._texts |= {text: text for text in added}
        shared = [self._shared(message) for message in (*said, reply)]
        self._links[identity] = _Link(self._links[previous] if previous else None, shared[:-1], shared[-1])
        self._items |= {str(item["id"]): item for item in items}

    def _shared(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._texts.get(value, value)
        if isinstance(value, dict):
            return {key: self._shared(inner) for key, inner in value.items()}
        return [self._shared(inner) for inner in value] if isinstance(value, list) else value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _missing(what: str, identity: str) -> GatewayError:
    return GatewayError(
        404,
        f"{what}_not_found",
        f"no {what} {identity!r:.100} is kept for this rollout: it was never given, or with store = false, or there "
        "was no room for it",
    )
