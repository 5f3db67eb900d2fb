"""What the gateway needs of a real server: an end at texts, with all that was sampled, and its parser of tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from transformers import AutoTokenizer

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.client import Completion
from mgrpo.environments.episode import Agent
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.tool_parser import HermesParser, ParsedCall, open_parser
from mgrpo.model.stop_texts import end_at
from mgrpo.model.tokens import decode_piece
from mgrpo.tools.calls import render
from tests.models import state_bytes
from tests_vllm.kit import LENGTH, MODEL, Served, prompts, reference, served

pytestmark = pytest.mark.timeout(900)
FIND: Mapping[str, object] = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object"}},
}
SAID = "I look it up.\n" + render(
    "hermes", ("find", {"query": "Fiji \u2014 \u65e5\u672c"}), ("find", {"n": 2})
)
PARSER = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("gateway"), "fs", "float32", arguments=PARSER) as made:
        made.load(state_bytes(reference().model))
        yield made


def test_a_real_server_ends_at_a_text(live: Served) -> None:
    """Alone in its batch, a request with a stop text samples what it samples without, to the bit, up to the token that
    completes it, which the server finds itself; log-probs and versions are there for all of it. Stop texts begin and
    end in the middle of tokens."""
    policy = reference()
    asked = prompts(policy)[:4]
    inside = 0
    for prompt in asked:
        free = live.one_by_one([prompt], SamplingParams(40, temperature=1.0))[0]
        text = decode_piece(policy.tokenizer, free.token_ids.tolist())
        for at in (len(text) // 3, len(text) // 2):
            stop = ("never said \u2603", text[at : at + 5])
            end = end_at(policy.tokenizer, stop, free.token_ids.tolist())
            assert end is not None
            params = SamplingParams(40, temperature=1.0, stop=stop)
            said: Completion = live.do(live.server.generate("policy", prompt, params, 0))
            ids = free.token_ids.tolist()[:end]
            assert said.token_ids == ids and said.finish_reason == "stop"
            assert np.array_equal(np.asarray(said.logprobs, np.float32), free.logprobs[:end])
            assert [(span.start, span.end) for span in said.spans] == [(0, end)]
            out = live.one_by_one([prompt], params)[0]
            assert out.token_ids.tolist() == ids and set(out.versions.tolist()) == {live.version}
            inside += not decode_piece(policy.tokenizer, ids).endswith(stop[1])
    print(f"{inside} stop texts end inside a token")


def test_a_real_servers_parser(live: Served) -> None:
    """Its Hermes parser and ours find the same calls; characters of several tokens arrive whole, the end token is no
    content, and words without a call are content."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    agent = Agent("main", live.engine, tokenizer, 1.0, LENGTH)
    parser = open_parser("server", agent)
    ids = [*tokenizer.encode(SAID), tokenizer.eos_token_id]
    found = live.do(parser.parse(ids, SAID, [FIND], finish="stop"))
    ours = asyncio.run(HermesParser().parse(ids, SAID, [FIND], finish="stop"))
    assert found.calls == ours.calls
    assert found.calls == (
        ParsedCall("find", '{"query": "Fiji \u2014 \u65e5\u672c"}'),
        ParsedCall("find", '{"n": 2}'),
    )
    assert found.content.strip() == ours.content and found.finish_reason == "tool_calls"
    words = live.do(parser.parse(tokenizer.encode(" Suva. Bye"), " Suva.", [FIND], finish="length"))
    assert (words.content, words.calls, words.finish_reason) == (" Suva.", (), "length")
    plain = live.do(parser.parse(ids, SAID, [], finish="stop"))
    assert plain.calls == () and plain.content == SAID
    with pytest.raises(GatewayError, match="function"):
        live.do(parser.parse(ids, SAID, [{"type": "function"}], finish="stop"))
