"""Texts that end a generation: which sampled token completes one of them.

A stop text has no tokens of its own. It may begin in the middle of one token and end in the middle of another, and a
character of it may be spread over several. So the sampled tokens are decoded as they come, each behind those before it,
as a client that streams them would (special tokens as their text), and looked through once.

    watch = StopTexts(tokenizer, ("Observation:",))
    watch.completed_by(ids[0]) ... -> True at the first token after which the text holds a stop text

Only a window is decoded: the tokens since the last complete character, and those that gave it, which a decoder may need
to see (a space before a word, the bytes of one character). So the cost of a token does not grow with the turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mgrpo.model.tokens import Tokenizer, piece_decoder

INCOMPLETE = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""
PENDING, OPEN = 8, 3
"""Tokens without a complete character at most, and how many of them may still become one: it has four bytes, so what
stands before the last three is none any more."""


class StopTexts:
    """Watches one generation. The window: ids of which the first `seen` are decoded already, to `shown` characters."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        """texts: not empty each."""
        self._decode = piece_decoder(tokenizer)
        self._texts, self._keep = tuple(texts), max(map(len, texts)) - 1
        self._window: list[int] = []
        self._seen = self._shown = 0
        self._tail = ""  # the last characters, which a stop text may begin with

    def completed_by(self, token: int) -> bool:
        """Take the next sampled token; whether the text holds a stop text now."""
        self._window.append(token)
        text = self._decode(self._window)
        said = self._tail + text[self._shown :]
        if len(text) > self._shown and not text.endswith(INCOMPLETE):
            self._advance(said, len(self._window))
        else:
            if len(self._window) - self._seen >= PENDING:
                end = len(self._window) - OPEN
                self._advance(self._tail + self._decode(self._window[:end])[self._shown :], end)
            said = said.rstrip(INCOMPLETE)
        return any(stop in said for stop in self._texts)

    def _advance(self, said: str, end: int) -> None:
        """What was seen before leaves the window; the ids up to `end`, with which the text ends in `said`, are seen."""
        self._tail = said[-self._keep :] if self._keep else ""
        self._window = self._window[self._seen :]
        self._seen = end - self._seen
        self._shown = len(self._decode(self._window[: self._seen]))


def end_at(tokenizer: Tokenizer, texts: Sequence[str], ids: Iterable[int]) -> int | None:
    """How many of `ids` there are up to the one that completes a stop text, with it; None where none does."""
    watch = StopTexts(tokenizer, texts)
    return next((n for n, token in enumerate(ids, 1) if watch.completed_by(int(token))), None)
