"""Text and ids inside a conversation: pieces join to exactly what was said, whatever the tokenizer does at a start."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.errors import ConfigError
from mgrpo.model.tokens import decode_piece, encode_piece, encode_start

SPACE = "\u2581"
STARTS = ("prepend", "always", "first", "byte_prefix")
"""Ways in which a tokenizer marks the start of a text."""


def tokenizer(start: str) -> Any:
    """Characters and a few merges, some of them with the space in front; `start`: STARTS, "never" or "byte"."""
    words = ["<unk>", SPACE, *(chr(i) for i in range(33, 127)), SPACE + "f", "ji", SPACE + "a"]
    merges = [(SPACE, "f"), ("j", "i"), (SPACE, "a")]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    if start == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    elif start.startswith("byte"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=start == "byte_prefix")
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=start, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=start)
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("start", [*STARTS, "never", "byte"])
def test_pieces_join_to_what_was_said(start: str) -> None:
    """No piece brings a space with it and none loses its own, before and behind words and added tokens."""
    t = tokenizer(start)
    pieces = ["find(Fi", "ji)", " a fi", "</s>", "a", " ", "</s> f", "  x"]
    ids = encode_start(t, pieces[0]) + [i for piece in pieces[1:] for i in encode_piece(t, piece)]
    assert t.decode(ids) == "".join(pieces)
    for piece in pieces:
        assert decode_piece(t, encode_piece(t, piece)) == piece


@pytest.mark.parametrize("start", ["prepend", "always", "first"])
def test_a_start_is_encoded_as_the_model_knows_it(start: str) -> None:
    """The first text of a conversation keeps the space that its tokenizer was trained with."""
    t = tokenizer(start)
    assert encode_start(t, "fiji") == t.encode("fiji", add_special_tokens=False)
    assert encode_start(t, "fiji") != encode_piece(t, "fiji")


@pytest.mark.parametrize("start", ["never", "byte"])
def test_tokenizers_that_mark_no_start_are_used_as_they_are(start: str) -> None:
    """The ids of a piece are those of the tokenizer itself."""
    t = tokenizer(start)
    for text in ("ji a", " a", "</s>a", ""):
        assert encode_piece(t, text) == encode_start(t, text) == t.encode(text, add_special_tokens=False)


def test_tokens_that_are_added_later_are_known() -> None:
    """A conversation encodes with the vocabulary that the tokenizer has now."""
    t = tokenizer("always")
    assert len(encode_piece(t, "<call>")) == 6
    t.add_tokens([AddedToken("<call>", normalized=False)])
    assert encode_piece(t, "<call>") == [t.convert_tokens_to_ids("<call>")]


def test_ids_that_are_remembered_are_the_callers_own() -> None:
    """What a conversation does to the ids of a text changes nothing for the next one that has it."""
    t = tokenizer("always")
    ids = encode_piece(t, "fiji")
    expected = list(ids)
    ids.append(0)
    assert encode_piece(t, "fiji") == expected


def test_spaces_are_not_cleaned_up() -> None:
    """A tokenizer that tidies the text it decodes would make turns read otherwise than they were sampled."""
    t = tokenizer("byte")
    t.clean_up_tokenization_spaces = True
    assert decode_piece(t, encode_piece(t, "Suva , Fiji .")) == "Suva , Fiji ."


def test_what_cannot_be_encoded_is_named() -> None:
    """A lone surrogate by its place, another type by its name."""
    with pytest.raises(ValueError, match=r"character 2 of a text of 3 is the lone surrogate U\+D800"):
        encode_piece(tokenizer("byte"), "ab\ud800")
    with pytest.raises(TypeError, match="NoneType, expected str"):
        encode_start(tokenizer("first"), None)  # type: ignore[arg-type]


def test_a_slow_tokenizer_that_adds_a_space_is_refused() -> None:
    """Without a fast version the space cannot be left out, so the tokenizer is refused by its name."""

    class Slow:
        name_or_path = "old-model"
        sp_model = object()

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in f" {text}"]

        def decode(self, token_ids: list[int]) -> str:
            return "".join(map(chr, token_ids)).strip()

    with pytest.raises(ConfigError, match=r"old-model.*tokenizer\.json"):
        encode_piece(Slow(), "x")
