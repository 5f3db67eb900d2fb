"""What the gateway needs of a real server: an end at texts, with all that was sampled, its parser of tool calls, and
log-probs that a trainer's forward agrees with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.client import Completion
from mgrpo.environments.episode import Agent, Episode
from mgrpo.gateway.access import Access
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.forms import Forms
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.rollout import GatewayRollout
from mgrpo.gateway.server import Gateway
from mgrpo.gateway.tool_parser import HermesParser, ParsedCall, open_parser
from mgrpo.model.policy import Policy
from mgrpo.model.stop_texts import end_at
from mgrpo.model.tokens import decode_piece
from mgrpo.tools.calls import render
from mgrpo.types import Rollout, Trajectory
from tests.harness_kit import post
from tests_vllm.kit import LENGTH, MODEL, Served, prompts

pytestmark = pytest.mark.timeout(900)
FIND: Mapping[str, object] = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object"}},
}
SAID = "I look it up.\n" + render(
    "hermes", ("find", {"query": "Fiji \u2014 \u65e5\u672c"}), ("find", {"n": 2})
)


def test_a_real_server_ends_at_a_text(live: Served, policy: Policy) -> None:
    """Alone in its batch, a request with a stop text samples what it samples without, to the bit, up to the token that
    completes it, which the server finds itself; log-probs and versions are there for all of it. Stop texts begin and
    end in the middle of tokens."""
    asked = prompts(policy)[:3]
    inside = 0
    for prompt in asked:
        free = live.one_by_one([prompt], SamplingParams(24, temperature=1.0))[0]
        text = decode_piece(policy.tokenizer, free.token_ids.tolist())
        for at in (len(text) // 3, len(text) // 2):
            stop = ("never said \u2603", text[at : at + 5])
            end = end_at(policy.tokenizer, stop, free.token_ids.tolist())
            assert end is not None
            params = SamplingParams(24, temperature=1.0, stop=stop)
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


async def team(base_url: Access, number: int) -> None:
    """Two turns of main, with one of a sub-agent between them."""

    async def turn(role: str, chat: list[dict[str, str]]) -> None:
        body = {"model": role, "messages": chat, "max_tokens": 4}
        answer = await post(base_url, f"{base_url}/chat/completions", body, timeout=300)
        chat.append(answer["choices"][0]["message"])

    main = [{"role": "user", "content": f"Tell me a fact about the number {number}."}]
    await turn("main", main)
    sub = [{"role": "user", "content": f"Say it shorter: {main[-1]['content']}"}]
    await turn("sub", sub)
    main.append({"role": "user", "content": sub[-1]["content"]})
    await turn("main", main)


async def rollouts(live: Served, n: int) -> list[Rollout]:
    """n of them at once, each behind a base URL of its own."""
    options = GatewayOptions()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    agents = {role: Agent(role, live.engine, tokenizer, 1.0, LENGTH) for role in ("main", "sub")}
    gateway, forms = Gateway(options), Forms(options)
    await gateway.start()
    try:

        async def play(number: int) -> Rollout:
            episode = Episode(f"q{number}", 0, agents, seed=number)
            rollout = GatewayRollout(episode, options, forms)
            await team(Access(gateway.open(rollout), rollout.token), number)
            for conversation in rollout.conversations().values():
                conversation.close()
            rollout.arrange()
            return episode.finish(1.0)

        return list(await asyncio.gather(*map(play, range(n))))
    finally:
        await gateway.close()


@torch.inference_mode()
def test_thirty_two_rollouts_at_once_have_the_trainers_logprobs(live: Served, policy: Policy) -> None:
    """Programs over HTTP, all at the same time: none gets another's tokens, and every sampled token's log-prob is that
    of our own forward within 1e-4 nats."""
    played = live.do(rollouts(live, 32))
    for number, rollout in enumerate(played):
        assert rollout.d_k() == {"sub": 1}
        text = decode_piece(policy.tokenizer, rollout.main.tokens.tolist())
        assert f"about the number {number}." in text
    worst = max(
        difference(policy, [t for r in played[i : i + 8] for t in r.trajectories()]) for i in range(0, 32, 8)
    )
    print(f"largest difference of a log-prob: {worst:.1e}")
    assert worst < 1e-4


def difference(policy: Policy, trajectories: Sequence[Trajectory]) -> float:
    """The largest one between what was recorded of a sampled token and our forward over right-padded rows."""
    ids = torch.zeros(len(trajectories), max(map(len, trajectories)), dtype=torch.long)
    for row, trajectory in zip(ids, trajectories, strict=True):
        row[: len(trajectory)] = torch.from_numpy(trajectory.tokens)
    hidden = policy.hidden(ids)
    worst = 0.0
    for row, states, trajectory in zip(ids, hidden, trajectories, strict=True):
        at = torch.from_numpy(np.flatnonzero(trajectory.loss_mask))
        ours = (states[at - 1] @ policy.head_weight.T).log_softmax(-1).gather(1, row[at, None])[:, 0]
        worst = max(worst, float((ours - torch.from_numpy(trajectory.logprobs)[at]).abs().max()))
    return worst
