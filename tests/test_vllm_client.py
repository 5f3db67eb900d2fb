"""The vLLM engine against servers of the tests' own (tests/fake_vllm.py): requests, routing, failures, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.pool import LOAD_IMBALANCE
from mgrpo.errors import ConfigError, InfrastructureError
from tests.fake_server import VOCAB
from tests.fake_vllm import FakeVllm
from tests.server_bench import PROMPT, SAMPLED, Bench, expected, on_servers, until, weights


def test_tokens_in_tokens_out(tmp_path: Path) -> None:
    """Ids, log-probs and versions come back as sampled, a stop token is kept, and what is asked for leaves the server's
    own defaults nothing to change the distribution with."""

    async def test(bench: Bench[FakeVllm]) -> None:
        engine = bench.engine()
        await engine.load(weights(3), 3)
        stop = expected(weights(3), 7)[5]
        params = SamplingParams(8, temperature=0.5, stop_token_ids=(stop,))
        out = await engine.generate(PROMPT, params, seed=(1 << 63) + 7)
        ids = expected(weights(3), 7)
        assert out.token_ids.tolist() == ids[: ids.index(stop) + 1] and out.finish_reason == "stop"
        assert out.logprobs.tolist() == [-4.0] * len(out.token_ids)  # of the distribution at temperature 0.5
        assert out.versions.tolist() == [3] * len(out.token_ids)
        assert (out.token_ids.dtype, out.logprobs.dtype, out.versions.dtype) == (
            np.int32,
            np.float32,
            np.int32,
        )
        body = bench.servers[0].bodies[-1]
        assert body["token_ids"] == PROMPT
        sampling = body["sampling_params"]
        neutral = {
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "n": 1,
        }
        assert neutral.items() <= sampling.items()
        assert (sampling["temperature"], sampling["seed"], sampling["max_tokens"]) == (0.5, 7, 8)

    on_servers(1, test, tmp_path)


def test_ids_that_are_no_token_are_never_sampled(tmp_path: Path) -> None:
    """Each request takes the spare rows of the head out of the distribution; a server that samples one all the same
    has failed, and the answer is not trained on."""

    async def test(bench: Bench[FakeVllm]) -> None:
        whole = bench.engine()
        await whole.load(weights(3), 3)
        await whole.generate(PROMPT, SAMPLED, seed=7)
        assert "logit_bias" not in bench.servers[0].bodies[-1]["sampling_params"]
        highest = max(expected(weights(3), 7))
        fits, padded = bench.engine(tokens=highest + 1), bench.engine(tokens=highest)
        await fits.load(weights(3), 3)
        assert (await fits.generate(PROMPT, SAMPLED, seed=7)).token_ids.tolist() == expected(weights(3), 7)
        assert bench.servers[0].bodies[-1]["sampling_params"]["logit_bias"] == {
            str(i): -1e9 for i in range(highest + 1, VOCAB)
        }
        await padded.load(weights(3), 3)
        with pytest.raises(
            InfrastructureError, match=f"sampled token id {highest}, which its tokenizer does not"
        ):
            await padded.generate(PROMPT, SAMPLED, seed=7)

    on_servers(1, test, tmp_path)


def test_what_cannot_be_served_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """Context overflow names its figures; bad ids, bounds and seeds name theirs; no server hears of any."""

    async def test(bench: Bench[FakeVllm]) -> None:
        engine = bench.engine(max_length=16)
        await engine.load(weights(0), 0)
        before = len(bench.servers[0].bodies)
        with pytest.raises(
            ValueError, match=r"prompt of 12 tokens and max_tokens 5 need 17 positions; .* has 16"
        ):
            await engine.generate([1] * 12, SamplingParams(5), seed=0)
        for prompt, params, seed, what in (
            ([], SAMPLED, 0, "empty"),
            ([VOCAB], SAMPLED, 0, rf"{VOCAB}\.\.{VOCAB} of the prompt are outside 0\.\.{VOCAB - 1}"),
            ([1], SamplingParams(0), 0, "max_tokens 0"),
            ([1], SamplingParams(1, temperature=-1.0), 0, "temperature -1"),
            ([1], SamplingParams(1, temperature=2.5), 0, r"temperature 2.5 must be 0 or 0.01\.\.2"),
            ([1], SamplingParams(1, temperature=0.005), 0, "temperature 0.005 must be 0 or 0.01"),
            ([1], SAMPLED, -1, "seed -1"),
        ):
            with pytest.raises(ValueError, match=what):
                await engine.generate(prompt, params, seed=seed)
        assert len(bench.servers[0].bodies) == before

    on_servers(1, test, tmp_path)


def test_failures_are_never_results(tmp_path: Path) -> None:
    """An aborted generation, a failing server and one that does not answer in time are infrastructure failures that
    name the server; a request that the server refuses is an error of ours."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        engine = bench.engine(timeout=0.5)
        await engine.load(weights(0), 0)
        server.finish = "abort"
        with pytest.raises(InfrastructureError, match=rf"{server.url}.*'abort' after 8 tokens"):
            await engine.generate(PROMPT, SAMPLED, seed=0)
        server.finish = None
        server.refuse["/inference/v1/generate"] = (500, "out of pages")
        with pytest.raises(InfrastructureError, match=rf"{server.url}.*status 500: out of pages"):
            await engine.generate(PROMPT, SAMPLED, seed=0)
        server.refuse["/inference/v1/generate"] = (400, "no such field")
        with pytest.raises(ValueError, match="no such field"):
            await engine.generate(PROMPT, SAMPLED, seed=0)
        server.refuse.clear()
        server.hold.clear()
        with pytest.raises(InfrastructureError, match=r"no answer within 0.5 s"):
            await engine.generate(PROMPT, SAMPLED, seed=0)
        server.hold.set()
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).token_ids.tolist() == expected(weights(0), 1)
        assert not bench.said  # it was never down

    on_servers(1, test, tmp_path)


def test_requests_go_to_the_least_loaded_and_conversations_stay(tmp_path: Path) -> None:
    """Twenty requests at once are shared evenly; a conversation returns to the server that knows its prefix, unless
    that one has far more to do."""

    async def test(bench: Bench[FakeVllm]) -> None:
        one, two = bench.servers
        engine = bench.engine()
        await engine.load(weights(0), 0)
        for server in bench.servers:
            server.hold.clear()
            server.bodies.clear()
        tasks = [asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=s)) for s in range(20)]
        await until(lambda: len(one.bodies) + len(two.bodies) == 20, "their arrival")
        assert len(one.bodies) == len(two.bodies) == 10
        for server in bench.servers:
            server.hold.set()
        answers = await asyncio.gather(*tasks)
        assert [a.token_ids.tolist() for a in answers] == [expected(weights(0), s) for s in range(20)]

        one.hold.clear()
        first = asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=0))  # occupies server one
        await until(lambda: len(one.bodies) == 11, "the first request")
        await engine.generate(PROMPT, SAMPLED, seed=0, session="talk")
        one.hold.set()
        await first
        for _ in range(3):  # all idle: without the session they would go to server one
            await engine.generate(PROMPT, SAMPLED, seed=0, session="talk")
        assert (len(one.bodies), len(two.bodies)) == (11, 14)

        two.hold.clear()
        talks = [
            asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=0, session="talk"))
            for _ in range(LOAD_IMBALANCE + 4)
        ]
        await until(lambda: len(two.bodies) == 14 + LOAD_IMBALANCE + 1, "the crowd at server two")
        two.hold.set()
        await asyncio.gather(*talks)
        assert len(one.bodies) > 11  # the rest did not wait behind it
        engine.release("talk")

    on_servers(2, test, tmp_path)


def test_a_failure_that_is_the_end_of_the_server_is_not_the_requests(tmp_path: Path) -> None:
    """A front end whose engine has died answers 500, and its health 503: the other server gets the work."""

    async def test(bench: Bench[FakeVllm]) -> None:
        one, two = bench.servers
        engine = bench.engine()
        await engine.load(weights(0), 0)
        one.refuse |= {"/inference/v1/generate": (500, "EngineCore died"), "/health": (503, "")}
        two.bodies.clear()
        out = await engine.generate(PROMPT, SAMPLED, seed=3)
        assert out.token_ids.tolist() == expected(weights(0), 3) and len(two.bodies) == 1
        assert len(bench.said) == 1 and one.url in bench.said[0]

    on_servers(2, test, tmp_path)


def test_a_killed_server_is_named_its_work_goes_elsewhere_and_it_returns(tmp_path: Path) -> None:
    """Requests under way at a server that dies are answered by the other one, exactly as it would have; started again
    it gets the newest weights before anybody is sent to it."""

    async def test(bench: Bench[FakeVllm]) -> None:
        one = bench.servers[0]
        engine = bench.engine()
        await engine.load(weights(4), 4)
        one.hold.clear()
        tasks = [asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=s)) for s in range(6)]
        await until(lambda: len(one.bodies) >= 3 + 2, "its share")  # two were the examination
        await one.stop()
        answers = await asyncio.gather(*tasks)
        assert [a.token_ids.tolist() for a in answers] == [expected(weights(4), s) for s in range(6)]
        assert len(bench.said) == 1 and "server down" in bench.said[0] and one.url in bench.said[0]

        await engine.load(weights(5), 5)  # it misses this one
        one.hold.set()
        one.calls.clear()
        one.bodies.clear()
        await one.start()
        await until(lambda: len(bench.said) == 2, "its return")
        assert bench.said[1] == f"{one.url} is back, with weights e1.v5"
        assert one.calls.index("/resume") > one.calls.index("/collective_rpc") and one.label == "e1.v5"
        answers = await asyncio.gather(*(engine.generate(PROMPT, SAMPLED, seed=s) for s in range(4)))
        assert [a.token_ids.tolist() for a in answers] == [expected(weights(5), s) for s in range(4)]
        assert len(one.bodies) == 2  # it works again

    on_servers(2, test, tmp_path)


def test_without_any_server_the_error_names_all(tmp_path: Path) -> None:
    """Deadlines: nobody to load into, nobody to ask."""

    async def test(bench: Bench[FakeVllm]) -> None:
        engine = bench.engine(timeout=0.3, patience=0.3)
        await engine.load(weights(0), 0)
        for server in bench.servers:
            await server.stop()
        asked = asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=0))
        await until(lambda: engine.waiting() == 1, "the request's wait for a server")
        with pytest.raises(InfrastructureError, match=r"no server ready within 0.3 s: .*/s0.*/s1"):
            await asked
        assert engine.waiting() == 0
        with pytest.raises(
            InfrastructureError, match=r"no server took weights e1.v1 within 0.3 s: .*/s0.*/s1"
        ):
            await engine.load(weights(1), 1)
        for server in bench.servers:
            await server.start()
        await engine.load(weights(1), 1)
        assert (await engine.generate(PROMPT, SAMPLED, seed=0)).versions.tolist() == [1] * 8

    on_servers(2, test, tmp_path)


@pytest.mark.parametrize(
    ("options", "refusal", "message"),
    [
        ({"raw_logprobs": True}, {}, "another distribution than it samples from.*processed_logprobs"),
        ({"max_length": 40}, {}, "takes 40 tokens .* max_length is 64"),
        ({}, {"/weight_info": (404, "Not Found")}, "VLLM_SERVER_DEV_MODE=1"),
        ({}, {"/inference/v1/generate": (403, "Scale-out endpoints are disabled")}, "--enable-scale-out"),
    ],
    ids=["log-probs", "length", "development routes", "token route"],
)
def test_a_server_that_can_never_serve_is_refused_at_once(
    tmp_path: Path, options: Mapping[str, Any], refusal: Mapping[str, tuple[int, str]], message: str
) -> None:
    """Settings of a server that no retry mends are errors of the config, in words that say what to change."""

    async def test(bench: Bench[FakeVllm]) -> None:
        bench.servers[0].refuse.update(refusal)
        with pytest.raises(ConfigError, match=message):
            await bench.engine().load(weights(0), 0)

    on_servers(1, test, tmp_path, **options)


def test_a_cancelled_call_ends_its_own_request_only(tmp_path: Path) -> None:
    """The other request of the same server goes on to its end."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        engine = bench.engine()
        await engine.load(weights(0), 0)
        server.hold.clear()
        kept, dropped = (asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=s)) for s in (1, 2))
        await until(lambda: len(server.bodies) == 4, "both requests")
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        await asyncio.sleep(0.05)
        server.hold.set()
        assert (await kept).token_ids.tolist() == expected(weights(0), 1)
        await until(lambda: server.aborted == 1, "the end of the cancelled request")
        assert "/abort_requests" not in server.calls

    on_servers(1, test, tmp_path)
