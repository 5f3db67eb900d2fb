"""Text and token ids in the middle of a conversation.

A tokenizer encodes a text as if nothing stood before it. Many of them write down that start: SentencePiece's dummy
space (normalizer Prepend, pre-tokenizer Metaspace with prepend_scheme "always" or "first"), ByteLevel with
add_prefix_space, a normalizer that strips. Their decoders take the first space of what they are given away again. Both
are wrong for a piece of a conversation: "find(Fi" and "ji)" must not become "find(Fi ji)", and a turn that the policy
began with a space must not lose it.

Therefore pieces are encoded and decoded by a copy of the tokenizer that has these steps switched off: same vocabulary,
merges and added tokens, and nothing is merged with a neighbour. Tokenizers without such a step are used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mgrpo.errors import ConfigError


class Tokenizer(Protocol):
    """What a conversation needs of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` behind other tokens: nothing is put before it. The texts of added tokens become their ids, as in
    tokenizer.encode.

    Raises TypeError for what is no str, ValueError for a lone surrogate, and ConfigError for a tokenizer that puts a
    space before every text and has no fast (Rust) implementation, where this could be switched off.
    """
    check_text(text)
    known = _pieces_of(tokenizer)
    if known is None or len(text) > SHORT:
        return _encoded(tokenizer, known and known.piece, text)
    ids = known.ids.get(text)
    if ids is None:
        if len(known.ids) >= REMEMBERED:
            known.ids.clear()
        ids = known.ids[text] = tuple(_encoded(tokenizer, known.piece, text))
    return list(ids)


def encode_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` where nothing stands before it: the tokenizer's own encoding if its decoder gives `text` back,
    otherwise encode_piece. Raises as encode_piece."""
    check_text(text)
    if _piece_tokenizer(tokenizer) is None:
        return encode_piece(tokenizer, text)
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    return (
        ids
        if _backend(tokenizer).decode(ids, skip_special_tokens=False) == text
        else encode_piece(tokenizer, text)
    )


def decode_piece(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of `ids` behind other tokens: a leading space stays, and no space is cleaned up."""
    return piece_decoder(tokenizer)([int(i) for i in ids])


def piece_decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """decode_piece of this tokenizer as it is now, for whoever decodes many short pieces."""
    backend = _piece_tokenizer(tokenizer) or _backend(tokenizer)
    if backend is None:
        return tokenizer.decode
    return partial(backend.decode, skip_special_tokens=False)


def check_text(text: object) -> None:
    """Refuse what no tokenizer can encode: TypeError for what is no str, ValueError for a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"the text to encode is of type {type(text).__name__}, expected str: {text!r:.100}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of a text of {len(text)} is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which no tokenizer can encode; decode what tools return with errors='replace'"
        ) from None


# -- the copy with the steps of a text's start switched off --

SHORT, REMEMBERED = 128, 4096
"""Characters of a text whose ids are remembered, and how many are: stops, and calls and answers that come again and
again, take most of the time of a conversation of few tokens."""


@dataclass(slots=True)
class _Pieces:
    """What one tokenizer makes of pieces. size: its tokens when this was made. piece: the copy, None where the
    tokenizer itself is the one. ids: of short texts."""

    size: int
    piece: Any
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)


_pieces: WeakKeyDictionary[Any, _Pieces] = WeakKeyDictionary()


def _encoded(tokenizer: Tokenizer, piece: Any, text: str) -> list[int]:
    if piece is None:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    return list(piece.encode(text, add_special_tokens=False).ids)


def _backend(tokenizer: Any) -> Any:
    """The fast tokenizer (tokenizers.Tokenizer) behind one of transformers; None where it is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if hasattr(backend, "to_str") else None


def _piece_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer for pieces; None where the tokenizer itself is the one."""
    known = _pieces_of(tokenizer)
    return known and known.piece


def _pieces_of(tokenizer: Any) -> _Pieces | None:
    """None where nothing can be kept of a tokenizer, which then serves for pieces itself."""
    try:
        known = _pieces.get(tokenizer)
    except TypeError:  # cannot be referred to weakly: no tokenizer of Hugging Face
        return None
    if known is None or known.size != _size(tokenizer):  # tokens may have been added since
        known = _pieces[tokenizer] = _Pieces(_size(tokenizer), _without_start(tokenizer))
    return known


def _size(tokenizer: Any) -> int:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0


def _without_start(tokenizer: Any) -> Any:
    backend = _backend(tokenizer)
    if backend is None:
        _refuse_added_space(tokenizer)
        return None
    parts = {name: _state(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    edited = {
        "normalizer": _edited(parts["normalizer"], _NORMALIZER),
        "pre_tokenizer": _edited(parts["pre_tokenizer"], _PRE_TOKENIZER),
        "decoder": _edited(parts["decoder"], _DECODER),
    }
    if edited == parts:
        return None
    piece = type(backend).from_str(json.dumps(json.loads(backend.to_str()) | edited))
    piece.no_truncation()
    piece.no_padding()
    return piece


def _refuse_added_space(tokenizer: Any) -> None:
    """A tokenizer in Python cannot be edited; one that does not need it is used as it is."""
    if getattr(tokenizer, "sp_model", None) is None:
        return
    twice = tokenizer.decode([*tokenizer.encode("ab", add_special_tokens=False)] * 2)
    if twice != "abab":
        raise ConfigError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} ({type(tokenizer).__name__}) puts a space "
            f"before every text: 'ab' behind 'ab' reads {twice!r}. Save its fast version (tokenizer.json) into the "
            "model's folder"
        )


def _state(component: Any) -> Any:
    return None if component is None else json.loads(component.__getstate__())


_NORMALIZER = {"Prepend": None, "Strip": None}
_PRE_TOKENIZER = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
_DECODER = {"Metaspace": {"prepend_scheme": "never"}, "Strip": {"start": 0}}
"""Kind of a component -> the settings that a piece needs; None: it goes. Decoders of ByteLevel take nothing away."""


def _edited(state: Any, settings: dict[str, Any]) -> Any:
    """The state of a component, of a Sequence of components too, for pieces."""
    if state is None:
        return None
    for inside in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(state.get(inside), list):
            kept = [_edited(part, settings) for part in state[inside]]
            return state | {inside: [part for part in kept if part is not None]}
    if state["type"] not in settings:
        return state
    wanted = settings[state["type"]]
    return None if wanted is None else state | wanted
