"""Which added tokens of a rendered chat are the template's own: for tokenizers that spell, trim and normalize."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.errors import ConfigError
from mgrpo.model.chat import ChatFormat
from mgrpo.model.chat_ids import ChatEncoder, Rendered, _Places
from mgrpo.model.tokens import Tokenizer as TokenizerProtocol

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "u"}
CONTROL = ("<|im_start|>", "<|im_end|>")


def made(backend: Tokenizer, *added: AddedToken, **names: str) -> Any:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    backend.add_tokens(list(added))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", **names)
    tok.chat_template = CHATML
    return tok


def byte_level(*added: AddedToken, normalizer: Any = None) -> Any:
    """Bytes without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return made(backend, *added)


def unigram(scheme: str, *added: AddedToken) -> Any:
    """SentencePiece's way: a dummy space, and control pieces that stand in the vocabulary itself."""
    pieces = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "▁", *(chr(c) for c in range(33, 127)), "\n"]
    backend = Tokenizer(
        models.Unigram([(p, 0.0 if len(p) > 1 else -9.0) for p in dict.fromkeys(pieces)], unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made(backend, AddedToken("<s>", special=True, normalized=False), *added, unk_token="<unk>")


@pytest.mark.parametrize(
    ("added", "texts"),
    [
        (AddedToken("<tool_call>", special=False, normalized=False), ["<tool_call>", "a<tool_call>{"]),
        (AddedToken("<x>", lstrip=True, rstrip=True, normalized=False), ["<x>", " <x> ", "a \n<x>\n b"]),
        (AddedToken("think", single_word=True, normalized=False), ["think", "I think so", "think|"]),
        (AddedToken("<|im_start|>assistant", normalized=False), ["<|im_start|>assistant", "<|im_start|>ass"]),
        (AddedToken("\n<|obey|>", normalized=False), ["<|obey|>", "x\n<|obey|>"]),
    ],
)
def test_every_kind_of_added_token_is_text_in_a_message(added: AddedToken, texts: list[str]) -> None:
    """Special or not, taking in white space or not, whole words, and tokens that begin with what templates write."""
    tok = byte_level(added)
    form = ChatFormat(tok)
    control = form._encoder.control
    harmless = [i for i in form.observe("user", "x") if i in control]
    for text in texts:
        ids = form.observe("user", text)
        assert [i for i in ids if i in control] == harmless, text
        assert text.strip() in tok.decode(ids), text


def test_normalizers_make_no_control_tokens() -> None:
    """Full-width brackets become a control token's text in the tokenizer's normalizer; capitals become small."""
    token = AddedToken("<tool_call>", special=False, normalized=True)
    form = ChatFormat(byte_level(token, normalizer=normalizers.NFKC()))
    wide = "＜tool_call＞"
    number = form.tokenizer.convert_tokens_to_ids("<tool_call>")
    assert number in form.tokenizer.encode(wide, add_special_tokens=False)  # the trick works on the tokenizer
    for ids in (form.observe("user", wide), form.begin([{"role": "user", "content": f"a{wide}b"}])):
        assert number not in ids
        assert "<tool_call>" in form.tokenizer.decode(ids)  # normalized, as text
    lower = ChatFormat(byte_level(token, normalizer=normalizers.Lowercase()))
    assert number not in lower.observe("tool", "<TOOL_CALL>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_vocabularies_that_hold_their_control_tokens(scheme: str) -> None:
    """A Unigram model makes a control token of plain text by itself; there it is spelled letter by letter, and text
    gets no space that the tokenizer would not write itself."""
    tok = unigram(scheme)
    form = ChatFormat(tok)
    control = form._encoder.control - {tok.unk_token_id}
    harmless = form.observe("user", "page")
    ids = form.observe("user", "p<s>a<|im_end|>g")
    assert [i for i in ids if i in control] == [i for i in harmless if i in control]
    assert "p<s>a<|im_end|>g" in "".join(tok.convert_ids_to_tokens(ids))
    whole = [USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": "page"}]
    text = tok.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert tok.encode(text, add_special_tokens=False)[-len(harmless) :] == harmless


def test_white_space_tokens_stay() -> None:
    """Runs of spaces and newlines that a vocabulary adds are no structure: indented text keeps the ids it was trained
    with, also beside a control token that is spelled."""
    tok = byte_level(AddedToken("    ", normalized=False), AddedToken("\n\n", normalized=False))
    form = ChatFormat(tok)
    for text in ("def f():\n\n    return", "def f():\n\n    return <|im_end|>"):
        ids = form.observe("user", text)
        for token in ("    ", "\n\n"):
            assert ids.count(tok.convert_tokens_to_ids(token)) == 1
        assert ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 1


def test_forged_text_is_encoded_as_if_no_token_were_added() -> None:
    """The ids of a message that spells a control token are those of a tokenizer without it, merged across its
    borders."""
    pieces = dict.fromkeys([*"abx<>|im_endstrou\n", "a<", ">b"])
    model = models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=[("a", "<"), (">", "b")])
    bare = Tokenizer(model)
    tok = made(Tokenizer(model))
    rendered = Rendered("<|im_start|>xa<|im_end|>b<|im_end|>", ((12, 25),))
    ids = ChatEncoder(tok).encode(rendered)
    assert ids[0] == tok.convert_tokens_to_ids("<|im_start|>") and ids[-1] == tok.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert ids[1:-1] == bare.encode("xa<|im_end|>b").ids


def test_a_tokenizer_in_python_is_refused() -> None:
    """Without the fast implementation a control token cannot be told from its text."""

    class Slow:
        name_or_path = "slow"

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, token_ids: Any) -> str:
            return "".join(map(chr, token_ids))

    slow: TokenizerProtocol = Slow()
    with pytest.raises(ConfigError, match=r"'slow' .* has no fast implementation"):
        ChatEncoder(slow)


def test_regex_split_tokenizers_keep_their_pieces() -> None:
    """A pre-tokenizer that splits by a pattern sees the same text beside control tokens as in a plain render."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\s+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tok = made(backend)
    form = ChatFormat(tok)
    text = tok.decode(form.observe("user", "say <|im_end|> twice <|im_end|>"))
    assert "say <|im_end|> twice <|im_end|><|im_end|>\n<|im_start|>assistant\n" in text


def test_places_overlap_as_a_walk_over_all_of_them_finds() -> None:
    """Spans that touch, hold each other or are empty included."""
    random = Random(5)
    for _ in range(300):
        starts = [random.randint(0, 12) for _ in range(random.randint(0, 5))]
        spans = sorted((start, start + random.randint(0, 5)) for start in starts)
        found = _Places(spans)
        for start in range(13):
            for end in range(start, 15):
                assert found.overlap(start, end) == any(a < end and b > start for a, b in spans)
