"""Token ids of a rendered chat in which nobody but the template writes control tokens.

A tokenizer finds its added tokens (special or not: <|im_end|>, <tool_call>, <think>) wherever their text stands. In a
chat that text may come from a page, another agent or the question, whole, or in pieces that only join with what the
template writes beside them, or spelled so that the tokenizer's normalizer makes the token's text of it. So the place
decides and not the text: an added token that overlaps what a message says is text.

1. The tokenizer encodes the chat. Where every added token that it found stands in what the template wrote, these are
   the ids, the same as apply_chat_template's.
2. Otherwise the chat is encoded once more with every message shortened to a character that belongs to no token: what is
   found now is the template's own. The texts between them are encoded by a tokenizer of the same model that knows no
   added tokens.

Added tokens of white space alone (runs of spaces or newlines, as some vocabularies have them) cannot be structure and
stay as they are.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mgrpo.errors import ConfigError

_LETTER = (
    "\ua66e"  # stands for what a message says: in no token's text, and a letter as single_word tokens see it
)
_OTHER = "\uf8ff"  # likewise, and no letter


PRIVATE = [*range(0xE000, 0xF8FF), *range(0xF0000, 0xFFFFE)]
"""Code points that mean nothing to anybody, and that templates write nowhere."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat. said: spans (start, end) of `text` that the template did not write, in order; an empty one
    stands inside a text that is no control token although it reads like one."""

    text: str
    said: tuple[tuple[int, int], ...] = ()

    def behind(self, start: int) -> Rendered:
        """The chat from character `start` on."""
        moved = ((max(a, start) - start, b - start) for a, b in self.said if b > start)
        return Rendered(self.text[start:], tuple(moved))


class _Places:
    """Spans (start, end) in order of their starts; whether one overlaps another is a search, not a walk: a long history
    has thousands of messages, and several control tokens each."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in spans]
        self._ends = list(itertools.accumulate((end for _, end in spans), max))  # the last end so far

    def overlap(self, start: int, end: int) -> bool:
        """Whether any of them begins before `end` and ends behind `start`."""
        before = bisect_left(self._starts, end)
        return before > 0 and self._ends[before - 1] > start


class ChatEncoder:
    """Encodes rendered chats. Raises ConfigError for a tokenizer without a fast (Rust) implementation: there control
    tokens cannot be told from their text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(self._backend, Backend):
            raise ConfigError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} ({type(tokenizer).__name__}) has no fast "
                "implementation, so control tokens cannot be told from their text; save its fast version "
                "(tokenizer.json) into the model's folder"
            )
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        self._blank = {i: t for i, t in added.items() if not t.special and not t.content.strip(" \t\r\n▁")}
        self.control = frozenset(added.keys() - self._blank.keys()) | frozenset(tokenizer.all_special_ids)
        """Ids that only a template may write."""
        self._unknown = tokenizer.unk_token_id

    def encode(self, rendered: Rendered, skip: int = 0) -> list[int]:
        """Ids of the chat behind its first `skip` characters, which hold no control token. Raises ConfigError where a
        token reaches across that border."""
        found, said = list(self._found(rendered.text)), _Places(rendered.said)
        if not any(
            said.overlap(*_core(rendered.text, start, end)) for i, start, end in found if i in self.control
        ):
            pieces: Sequence[tuple[int, int, int]] = found
        else:
            pieces = list(self._guarded(rendered))
        if any(start < skip < end for _, start, end in pieces):
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path!r} writes text that merges with what the "
                "assistant said: its turns cannot be continued"
            )
        return [token for token, start, _ in pieces if start >= skip]

    def controls(self, text: str) -> bool:
        """Whether the tokenizer finds a control token in `text`."""
        return any(token in self.control for token, _, _ in self._found(text))

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token, as the tokenizer encodes a text."""
        if not text:
            return
        out = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for token, (start, end) in zip(out["input_ids"], out["offset_mapping"], strict=True):
            yield int(token), start, end

    def _guarded(self, rendered: Rendered) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) with the template's control tokens alone; places are those in a text in which each of them
        is one character long."""
        wall = unused(rendered.text)  # stands for a control token that the template wrote
        parts, controls, at = [], [], 0
        for token, start, end in self._templates_own(rendered):
            parts += [rendered.text[at:start], wall]
            controls.append(token)
            at = end
        own = iter(controls)
        blank = {t.content: i for i, t in self._blank.items()}
        encoding = self._bare(wall).encode("".join(parts) + rendered.text[at:], add_special_tokens=False)
        for token, name, (start, end) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            if name == wall:
                yield next(own), start, end
            elif name in blank:
                yield blank[name], start, end
            elif token in self.control and token != self._unknown:
                for spelled in self._spelled(name):
                    yield spelled, start, end
            else:
                yield token, start, end

    def _templates_own(self, rendered: Rendered) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of the control tokens that the tokenizer finds in what the template wrote."""
        parts: list[str] = []
        origin: list[int] = []  # of each character: where it stands in the chat, -1 for a stand-in
        at = 0
        for start, end in rendered.said:
            parts.append(rendered.text[at:start])
            origin += range(at, start)
            inside = rendered.text[start:end]
            masks = "".join(_LETTER if c.isalnum() or c == "_" else _OTHER for c in (inside[:1], inside[-1:]))
            parts.append(masks)
            origin += [-1] * len(masks)
            at = end
        parts.append(rendered.text[at:])
        origin += range(at, len(rendered.text))
        text = "".join(parts)
        for token, start, end in self._found(text):
            if token not in self.control:
                continue
            first, last = _core(text, start, end)
            if first < last and min(origin[first:last]) >= 0:
                yield token, origin[start], origin[end - 1] + 1

    def _bare(self, wall: str) -> Backend:
        """The tokenizer's model and its steps, which know no added tokens but `wall`; the vocabulary is shared."""
        backend: Any = self._backend
        bare = Backend(backend.model)
        for step in ("normalizer", "pre_tokenizer"):
            if getattr(backend, step) is not None:
                setattr(bare, step, getattr(backend, step))
        bare.add_special_tokens([AddedToken(wall, special=True, normalized=False)])
        bare.add_tokens(list(self._blank.values()))
        return bare

    def _spelled(self, name: str) -> list[int]:
        """Ids of the characters of a control token that the model makes of plain text."""
        model: Any = self._backend.model  # type: ignore[union-attr]
        return [int(token.id) for token in itertools.chain(*(model.tokenize(c) for c in name))]


def unused(text: str) -> str:
    """A private-use character that `text` does not hold."""
    return next(c for c in map(chr, PRIVATE) if c not in text)


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the white space at its ends, which tokens with lstrip or rstrip take in."""
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())
