"""Texts that end a generation: the token that completes one, in every engine, and nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mgrpo.engines.base import MAX_STOP_LENGTH, MAX_STOPS, Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.errors import InfrastructureError
from mgrpo.model.policy import state_of
from mgrpo.model.stop_texts import PENDING, StopTexts, end_at
from mgrpo.model.tokens import decode_piece, encode_piece
from tests.fake_server import words
from tests.fake_sglang import FakeSglang
from tests.fake_vllm import FakeVllm
from tests.models import tiny_policy, tiny_tokenizer
from tests.server_bench import PROMPT, SAMPLED, Bench, expected, on_fakes, on_servers, until, weights
from tests.test_chat import tokenizer as byte_tokenizer
from tests.test_sglang import expected as sglang_expected

pytestmark = pytest.mark.usefixtures("one_thread")
BYTES = byte_tokenizer(None)
WORDS = tiny_tokenizer()


def fallback_tokenizer() -> Any:
    """As SentencePiece's with byte fallback: a space is a letter, characters that it lacks are bytes."""
    letters = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdeO:"]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


FALLBACK = fallback_tokenizer()


def first_end(tokenizer: Any, texts: Sequence[str], ids: Sequence[int]) -> int | None:
    """The definition: the first beginning of ids whose whole text holds a stop text."""
    for n in range(1, len(ids) + 1):
        if any(stop in decode_piece(tokenizer, ids[:n]) for stop in texts):
            return n
    return None


@given(st.data())
def test_the_end_is_where_the_whole_text_first_holds_a_stop_text(data: st.DataObject) -> None:
    """Over ids of a byte-level vocabulary in any order, whole characters or not, control tokens too: the window finds
    the end that decoding everything again after each token finds."""
    ids = data.draw(st.lists(st.integers(0, len(BYTES) - 1), min_size=1, max_size=60))
    text = decode_piece(BYTES, ids)
    at = data.draw(st.integers(0, len(text)))
    some = text[at : at + data.draw(st.integers(1, 12))].strip("\ufffd")
    stops = [s for s in (some, data.draw(st.text(min_size=1, max_size=3))) if s and "\ufffd" not in s]
    assert not stops or end_at(BYTES, stops, ids) == first_end(BYTES, stops, ids)


@given(st.text("abcdeO: \u00e9\u4f60\u597d\U0001f600", min_size=1, max_size=40), st.data())
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte level", "byte fallback"])
def test_a_stop_text_is_found_across_token_borders(tokenizer: Any, text: str, data: st.DataObject) -> None:
    """Any part of any text, characters that are several tokens included, ends at the token that completes its last
    character; what is no part of it never ends anything."""
    ids = encode_piece(tokenizer, text)
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : data.draw(st.integers(at + 1, len(text)))]
    end = end_at(tokenizer, [stop], ids)
    assert end is not None and end == first_end(tokenizer, [stop], ids)
    assert stop in decode_piece(tokenizer, ids[:end]) and stop not in decode_piece(tokenizer, ids[: end - 1])
    assert end_at(tokenizer, ["\u2603", text + "\u2603"], ids) is None


def test_words_and_control_tokens_are_seen_as_text() -> None:
    """Spaces that a decoder puts between tokens are part of the text, and so are control tokens."""
    assert end_at(WORDS, ["w3 w4"], [1, 3, 5, 3, 4, 6]) == 5
    assert end_at(WORDS, ["w34"], [3, 4]) is None
    start = BYTES.convert_tokens_to_ids("<|im_start|>")
    ids = [*encode_piece(BYTES, "a"), start, *encode_piece(BYTES, "user says")]
    assert end_at(BYTES, ["a<|im_start|>"], ids) == 2
    assert end_at(BYTES, ["<|im_start|>user"], ids) == len(encode_piece(BYTES, "user")) + 2


def test_bytes_that_never_become_a_character_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them are sampled, a window of a few tokens is decoded, and a stop text behind them is found."""
    watch = StopTexts(BYTES, ("\u4f60",))
    longest: list[int] = []
    decode = watch._decode
    monkeypatch.setattr(watch, "_decode", lambda ids: longest.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    (broken,) = BYTES.convert_tokens_to_ids(["\u00e4"])  # the byte E4, which begins a character of three
    for _ in range(100):
        assert not watch.completed_by(broken)
    assert max(longest) <= 2 * PENDING
    character = encode_piece(BYTES, "\u4f60")
    assert len(character) > 1
    assert [watch.completed_by(i) for i in character] == [False] * (len(character) - 1) + [True]


@pytest.mark.parametrize("stop", [("",), ("x" * (MAX_STOP_LENGTH + 1),), ("x",) * (MAX_STOPS + 1)])
def test_stop_texts_have_bounds(stop: tuple[str, ...]) -> None:
    """An empty text would end everything, and long or many ones cost each token."""
    with pytest.raises(ValueError, match="stop text"):
        SamplingParams(8, stop=stop)
    with pytest.raises(ValueError, match="lone surrogate"):
        SamplingParams(8, stop=("\ud800",))
    with pytest.raises(TypeError, match="expected a tuple of texts"):
        SamplingParams(8, stop="a text alone")  # type: ignore[arg-type]
    SamplingParams(8, stop=("x" * MAX_STOP_LENGTH,) * MAX_STOPS)


def test_the_engine_in_this_process_ends_at_the_token_that_completes_one() -> None:
    """In one batch with and without stop texts: ids and log-probs are a beginning of what is sampled without, up to the
    token that completes one, and neighbours keep theirs. A stop token that comes first ends first."""
    policy = tiny_policy("llama", 2)
    prompts = [[5, 6, i] for i in range(8)]

    async def all_of(engine: HfEngine, stops: Sequence[tuple[str, ...]], token: int = -1) -> list[Generation]:
        return await asyncio.gather(
            *(
                engine.generate(p, SamplingParams(24, stop_token_ids=(token,), stop=s), seed=i)
                for i, (p, s) in enumerate(zip(prompts, stops, strict=True))
            )
        )

    async def run() -> None:
        engine = HfEngine(policy, slots=8)
        free = await all_of(engine, [()] * 8)
        texts = [words(out.token_ids.tolist()) for out in free]
        for without in range(3):  # each slot serves requests with stop texts and without, in turns
            stops: list[tuple[str, ...]] = [
                () if i % 3 == without else (" ".join(text.split()[i : i + 3]), "absent")
                for i, text in enumerate(texts)
            ]
            for stop, out, whole in zip(stops, await all_of(engine, stops), free, strict=True):
                ids = whole.token_ids.tolist()
                end = first_end(WORDS, stop, ids) if stop else None
                assert (end is None) == (not stop) and out.token_ids.tolist() == ids[:end]
                assert out.finish_reason == ("length" if end is None else "stop")
                np.testing.assert_allclose(out.logprobs, whole.logprobs[:end], atol=1e-5)
        first = free[1].token_ids.tolist()
        sooner = await all_of(engine, [(words(first[2:4]),)] * 8, token=first[1])
        assert sooner[1].token_ids.tolist() == first[: first.index(first[1]) + 1]
        await engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_turn_that_ended_at_a_stop_text_is_continued_and_survives_an_update() -> None:
    """The session goes on from all that was sampled; weights that arrive in the middle do not make the engine forget
    what the turn has said so far."""
    policy = tiny_policy("llama", 2)

    async def run() -> None:
        engine = HfEngine(policy, slots=2)
        ids = (await engine.generate(PROMPT, SamplingParams(12), seed=3)).token_ids.tolist()
        stop = (words(ids[4:7]),)
        end = first_end(WORDS, stop, ids)
        assert end is not None
        task = asyncio.ensure_future(
            engine.generate(PROMPT, SamplingParams(12, stop=stop), seed=3, session="s")
        )
        arrays = engine._arrays
        while not arrays.count[arrays.running].max(initial=0) >= end - 2:
            await asyncio.sleep(0)
        await engine.load(state_of(policy.model), 1)
        out = await task
        assert out.token_ids.tolist() == ids[:end] and set(out.versions.tolist()) == {0, 1}
        longer = [*PROMPT, *ids[:end], 5]
        more = await engine.generate(longer, SamplingParams(4), seed=4, session="s")
        other = await engine.generate(longer, SamplingParams(4), seed=4)
        assert more.token_ids.tolist() == other.token_ids.tolist()
        await engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_script_ends_there_too() -> None:
    """So that tests of programs see what a real engine does: the first end counts, whichever it is."""
    engine = ScriptedEngine(lambda text: "w1 w2 w3 w4 w5", WORDS)

    def said(**ends: Any) -> tuple[list[int], str]:
        out = asyncio.run(engine.generate([7], SamplingParams(8, **ends), seed=0))
        return out.token_ids.tolist(), out.finish_reason

    assert said(stop=("w3 w4",)) == ([1, 2, 3, 4], "stop")
    assert said(stop=("w3 w4",), stop_token_ids=(2,)) == ([1, 2], "stop")
    assert said(stop=("w2",), stop_token_ids=(5,)) == ([1, 2], "stop")
    assert said(stop=("w6",)) == ([1, 2, 3, 4, 5], "length")


@pytest.mark.parametrize("heeds", [True, False])
def test_a_vllm_server_is_asked_for_them_and_looked_after(tmp_path: Path, heeds: bool) -> None:
    """Ids, log-probs and versions up to the token that completes one, whether the server ends there or later; only such
    requests make it decode."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        server.heeds_stops = heeds
        engine = bench.engine()
        await engine.load(weights(3), 3)
        ids = expected(weights(3), 7)
        stop = ("absent", words(ids[2:5]))
        end = first_end(WORDS, stop, ids)
        assert end is not None and end < len(ids)
        out = await engine.generate(PROMPT, SamplingParams(8, stop=stop), seed=7)
        assert out.token_ids.tolist() == ids[:end] and out.finish_reason == "stop"
        assert len(out.logprobs) == end and out.versions.tolist() == [3] * end
        asked = server.bodies[-1]["sampling_params"]
        wanted = {"stop": list(stop), "detokenize": True, "skip_special_tokens": False}
        assert wanted.items() <= asked.items() and asked["include_stop_str_in_output"] is True
        assert (await engine.generate(PROMPT, SAMPLED, seed=7)).token_ids.tolist() == ids
        assert not {"stop", "skip_special_tokens"} & server.bodies[-1]["sampling_params"].keys()

    on_servers(1, test, tmp_path)


def test_an_sglang_server_is_asked_for_them(tmp_path: Path) -> None:
    """It ends at the text and says which; a text that is none of ours is an error it met."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        engine = bench.engine()
        await engine.load(weights(1), 1)
        ids = sglang_expected(weights(1), 5)
        stop = (words(ids[2:5]),)
        end = first_end(WORDS, stop, ids)
        out = await engine.generate(PROMPT, SamplingParams(8, stop=stop), seed=5)
        assert out.token_ids.tolist() == ids[:end] and out.finish_reason == "stop"
        assert server.bodies[-1]["sampling_params"]["stop"] == list(stop)
        server.finish = {"type": "stop", "matched": "NaN happened"}
        with pytest.raises(InfrastructureError, match="NaN happened"):
            await engine.generate(PROMPT, SamplingParams(8, stop=stop), seed=5)

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_a_stop_text_across_two_sglang_requests_is_found(tmp_path: Path) -> None:
    """An update splits a request in the middle of the text: the server, which sees the tokens of one request alone,
    goes on to the end, and what it sampled beyond the text is thrown away with its versions."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        ours, theirs = bench.engine(), bench.engine()
        await ours.load(weights(1), 1)
        await theirs.load(weights(1), 1)
        ids = sglang_expected(weights(1), 9)[:4] + sglang_expected(weights(2), 9)[4:]
        stop = (words(ids[2:6]),)
        server.hold.clear()
        server.hold_at, server.standing = 4, False
        task = asyncio.create_task(ours.generate(PROMPT, SamplingParams(8, stop=stop), seed=9))
        await until(lambda: server.standing, "the request")
        await theirs.load(weights(2), 2)
        server.hold.set()
        out = await task
        assert out.token_ids.tolist() == ids[:6] and out.finish_reason == "stop"
        assert out.versions.tolist() == [1] * 4 + [2] * 2 and len(out.logprobs) == 6

    on_fakes(FakeSglang, 1, test, tmp_path)
