"""The SGLang engine against servers of the tests' own (tests/fake_sglang.py), which answer in the form of SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mgrpo.addresses import Addresses
from mgrpo.config.load import load_config
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.labels import Label
from mgrpo.engines.registry import open_engine
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.policy_files import policy_files
from mgrpo.weights.version import Weights
from tests.fake_sglang import END_OF_TEXT, FakeSglang
from tests.models import tiny_policy
from tests.runs import RELAY
from tests.server_bench import PROMPT, SAMPLED, Bench, across_update, on_fakes, until, weights


def expected(of: Weights, seed: int, n: int = 8) -> list[int]:
    """The first n tokens after PROMPT."""
    server = FakeSglang(Path("unused"))
    return [server.token(of.data, seed, len(PROMPT) + i) for i in range(n)]


def test_tokens_in_tokens_out(tmp_path: Path) -> None:
    """Ids, log-probs and versions come back as sampled, a stop token is kept, and what is asked for leaves the server's
    own defaults nothing to change the distribution with."""

    async def test(bench: Bench[FakeSglang]) -> None:
        engine = bench.engine()
        await engine.load(weights(3), 3)
        ids = expected(weights(3), 7)
        stop = ids[5]
        params = SamplingParams(8, temperature=0.5, stop_token_ids=(stop,))
        out = await engine.generate(PROMPT, params, seed=(1 << 63) + 7)
        assert out.token_ids.tolist() == ids[: ids.index(stop) + 1] and out.finish_reason == "stop"
        assert out.logprobs.tolist() == [-4.0] * len(out.token_ids)  # of the distribution at temperature 0.5
        assert out.versions.tolist() == [3] * len(out.token_ids)
        body = bench.servers[0].bodies[-1]
        sampling = body["sampling_params"]
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
        assert body["input_ids"] == PROMPT and neutral.items() <= sampling.items()
        assert (sampling["temperature"], sampling["sampling_seed"], sampling["max_new_tokens"]) == (0.5, 7, 8)
        assert (await engine.generate(PROMPT, SAMPLED, seed=7)).finish_reason == "length"

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_the_models_own_end_of_text_ends_nothing(tmp_path: Path) -> None:
    """SGLang ends at it whatever is asked for; unless it is one of our stop tokens, what follows is sampled too."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        server.end_at = (len(PROMPT) + 2, len(PROMPT) + 4)
        engine = bench.engine()
        await engine.load(weights(1), 1)
        ids = expected(weights(1), 5)
        ids[2] = ids[4] = END_OF_TEXT
        stop = next(i for i in range(END_OF_TEXT) if i not in ids)
        for stops, requests in (((stop,), 3), ((), 1)):
            server.bodies.clear()
            out = await engine.generate(PROMPT, SamplingParams(8, stop_token_ids=stops), seed=5)
            assert out.token_ids.tolist() == ids and out.finish_reason == "length"
            assert len(server.bodies) == requests
        out = await engine.generate(PROMPT, SamplingParams(8, stop_token_ids=(END_OF_TEXT,)), seed=5)
        assert out.token_ids.tolist() == ids[:3] and out.finish_reason == "stop"

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_a_rollout_across_an_update_keeps_the_version_of_each_token(tmp_path: Path) -> None:
    """Another worker updates the server in the middle of our request, which SGLang would label with the newer version
    as a whole: our tokens are labelled with the weights that sampled them, also where none was sampled yet."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        ours, theirs = bench.engine(), bench.engine()
        await ours.load(weights(1), 1)
        await theirs.load(weights(1), 1)
        for split in (5, 0):
            old = ours.version
            out = await across_update(server, ours, theirs, split)
            assert (
                out.token_ids.tolist()
                == expected(weights(old), 9)[:split] + expected(weights(old + 1), 9)[split:]
            )
            await ours.load(weights(old + 1), old + 1)

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_an_update_is_labelled_when_it_is_over(tmp_path: Path) -> None:
    """Nothing is sampled between pause and the new weights; until the end the label is none that a request accepts."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        labels: list[str] = []
        read = server.on_update_weights_from_disk

        def update(body: dict[str, Any], query: str) -> Any:
            labels.append(server.label)
            return read(body, query)

        server.on_update_weights_from_disk = update  # type: ignore[method-assign]
        engine = bench.engine()
        await engine.load(weights(1), 1)
        assert server.calls[2:] == [  # the first two examined it
            "/pause_generation",
            "/update_weight_version",
            "/update_weights_from_disk",
            "/flush_cache",
            "/continue_generation",
            "/update_weight_version",
        ]
        assert labels == ["updating:e1.v1"] and server.label == "e1.v1" and engine.version == 1

    on_fakes(FakeSglang, 1, test, tmp_path)


@pytest.mark.parametrize("resumed", [False, True], ids=["before it resumed", "before the label"])
def test_an_update_whose_worker_died_is_made_again(tmp_path: Path, resumed: bool) -> None:
    """It leaves a server that is paused, or sampling with the new weights under the mark of an update: the next look
    ends the update, and tokens sampled under the mark are of the version that it names."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=0.3)
        await engine.load(weights(1), 1)
        await bench.engine().load(weights(2), 2)  # its folder is there
        server.label = "updating:e1.v2"
        if resumed:
            out = await engine.generate(PROMPT, SAMPLED, seed=4)
            assert out.versions.tolist() == [2] * 8 and out.token_ids.tolist() == expected(weights(2), 4)
        else:
            server.running.clear()
        await until(lambda: server.label == "e1.v2", "the end of the update")
        assert server.running.is_set() and not bench.said
        out = await engine.generate(PROMPT, SAMPLED, seed=4)
        assert out.versions.tolist() == [2] * 8 and out.token_ids.tolist() == expected(weights(2), 4)

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_a_server_that_missed_a_version_serves_nobody(tmp_path: Path) -> None:
    """A server whose update fails stays paused and unasked, although it is alive; healed, it gets the newest one."""

    async def test(bench: Bench[FakeSglang]) -> None:
        one = bench.servers[0]
        engine = bench.engine()
        await engine.load(weights(1), 1)
        one.refuse["/update_weights_from_disk"] = (400, "Failed to update weights: disk full")
        one.bodies.clear()
        await engine.load(weights(2), 2)
        assert engine.version == 2 and any("disk full" in line for line in bench.said)
        answers = await asyncio.gather(*(engine.generate(PROMPT, SAMPLED, seed=s) for s in range(4)))
        assert {int(v) for a in answers for v in a.versions} == {2}
        assert not one.bodies and not one.running.is_set()
        one.refuse.clear()
        await until(lambda: one.label == "e1.v2" and one.running.is_set(), "its healing")

    on_fakes(FakeSglang, 2, test, tmp_path)


def test_a_server_that_is_killed_while_a_request_is_continued(tmp_path: Path) -> None:
    """What it had sampled is thrown away: the other server answers the whole request, at its own version. Started
    again, it is updated before anybody is sent to it."""

    async def test(bench: Bench[FakeSglang]) -> None:
        one, two = bench.servers
        engine = bench.engine()
        await engine.load(weights(1), 1)
        one.hold.clear()
        one.hold_at = 3
        task = asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=2))
        await until(lambda: one.standing, "the request")
        one.running.clear()
        await one._abort()  # its first part is back, the second waits
        await until(lambda: not one.in_flight, "the first part")
        await one.stop()
        out = await task
        assert out.versions.tolist() == [1] * 8 and out.token_ids.tolist() == expected(weights(1), 2)
        assert two.bodies[-1]["input_ids"] == PROMPT
        await one.start()
        await until(lambda: f"{one.url} is back, with weights e1.v1" in bench.said, "its return")
        assert one.label == "e1.v1" and bench.pool.servers[0].label == Label(1, 1)

    on_fakes(FakeSglang, 2, test, tmp_path)


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        ({"type": "stop", "matched": "NaN happened"}, r"'stop' \(NaN happened\) after 8 tokens"),
        ({"type": "error", "message": "no pages"}, r"'error' \(no pages\)"),
    ],
)
def test_failures_are_never_results(tmp_path: Path, finish: dict[str, Any], message: str) -> None:
    """A generation that ended in another way than a sample does is an infrastructure failure that names the server."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        engine = bench.engine(timeout=2.0)
        await engine.load(weights(0), 0)
        server.finish = finish
        with pytest.raises(InfrastructureError, match=rf"{server.url}: .*{message}"):
            await engine.generate(PROMPT, SAMPLED, seed=0)

    on_fakes(FakeSglang, 1, test, tmp_path)


def test_a_history_that_the_server_cut_short_is_no_result(tmp_path: Path) -> None:
    """SGLang lowers max_new_tokens to what fits without a word; so does a generation that never ends end: by the time
    that one request may take."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        engine = bench.engine(timeout=0.6)
        await engine.load(weights(0), 0)
        sample = server._sample

        async def short(params: dict[str, Any], *rest: Any) -> Any:
            return await sample(params | {"max_new_tokens": 5}, *rest)

        server._sample = short  # type: ignore[method-assign]
        with pytest.raises(InfrastructureError, match=r"ended by 'length' .* after 5 tokens"):
            await engine.generate(PROMPT, SAMPLED, seed=0)
        server._sample = sample  # type: ignore[method-assign]
        server.aborting.set()
        with pytest.raises(InfrastructureError, match=r"not finished within 0\.6 s|no answer within"):
            await engine.generate(PROMPT, SAMPLED, seed=0)

    on_fakes(FakeSglang, 1, test, tmp_path)


@pytest.mark.parametrize(
    ("options", "refusal", "message"),
    [
        ({"raw_logprobs": True}, {}, "another distribution than it samples from; .*RETURN_ORIGINAL_LOGPROB"),
        ({"max_length": 40}, {}, r"takes 40 tokens \(context-length\), max_length is 64"),
        ({}, {"/pause_generation": (404, "Not Found")}, "needs SGLang 0.5.6 or newer"),
    ],
    ids=["log-probs", "length", "routes"],
)
def test_a_server_that_can_never_serve_is_refused_at_once(
    tmp_path: Path, options: Mapping[str, Any], refusal: Mapping[str, tuple[int, str]], message: str
) -> None:
    """Settings of a server that no retry mends are errors of the config, in words that say what to change."""

    async def test(bench: Bench[FakeSglang]) -> None:
        bench.servers[0].refuse.update(refusal)
        with pytest.raises(ConfigError, match=message):
            await bench.engine().load(weights(0), 0)

    on_fakes(FakeSglang, 1, test, tmp_path, **options)


def test_an_engine_over_sglang_comes_from_the_config(tmp_path: Path) -> None:
    """Its servers and the folder that they share are those that the config names."""
    policy = tiny_policy("llama", 3)

    async def ask() -> None:
        async with FakeSglang(tmp_path / "s") as server:
            table = f'{{type="sglang", urls=["{server.url}"], folder="{tmp_path / "shared"}"}}'
            config = load_config(RELAY, [f"agents.left.engine={table}"])
            addresses = Addresses("", {}, weights=tmp_path / "run")
            engine, _ = open_engine(config, "left", policy_files(policy), addresses, lambda line: None)
            try:
                await engine.load(weights(4), 4)
                out = await engine.generate(PROMPT, SAMPLED, seed=1)
            finally:
                await engine.close()
            assert out.token_ids.tolist() == expected(weights(4), 1) and out.versions.tolist() == [4] * 8
            assert server.path == str(tmp_path / "shared" / "left" / "e1.v4")

    asyncio.run(ask())
