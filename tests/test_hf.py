"""The in-process engine: what generate and a full forward say, at any batch, in any order, across turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.services import outside
from tests import fake_clock
from tests.models import VOCAB, state_bytes, tiny_policy

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(VOCAB, size=RNG.integers(1, 30)).tolist() for _ in range(50)]
KINDS = pytest.mark.parametrize("kind", ["shift", "llama"])


T = TypeVar("T")
pytestmark = pytest.mark.usefixtures("one_thread")


def served(policy: Policy, use: Callable[[HfEngine], Awaitable[T]], **settings: int) -> T:
    """The result of `use(engine)` on an engine of its own."""

    async def run() -> T:
        engine = HfEngine(policy, **settings)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


def all_of(
    prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Callable[[HfEngine], Awaitable[list[Generation]]]:
    async def use(engine: HfEngine) -> list[Generation]:
        return await asyncio.gather(*[engine.generate(p, params, seed=i) for i, p in enumerate(prompts)])

    return use


def forward_logprobs(
    policy: Policy, prompt: Sequence[int], tokens: np.ndarray, temperature: float
) -> np.ndarray:
    """Log-probs of `tokens` after `prompt`, by one full forward of the model."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].numpy()


@KINDS
@pytest.mark.parametrize("slots", [7, 64])
def test_greedy_is_generate_token_for_token(kind, slots):
    """50 prompts of mixed length in one continuous batch give model.generate's tokens, one by one."""
    policy = tiny_policy(kind)
    for prompt, out in zip(
        PROMPTS, served(policy, all_of(PROMPTS, SamplingParams(12, 0.0)), slots=slots), strict=True
    ):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.token_ids.tolist() == expected[0, len(prompt) :].tolist()
        assert out.finish_reason == "length"
        np.testing.assert_allclose(
            out.logprobs, forward_logprobs(policy, prompt, out.token_ids, 1.0), atol=1e-4
        )


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 256])
def test_sampled_logprobs_are_those_of_a_full_forward(kind, temperature, chunk):
    """Prefilled in chunks or at once, the log-prob of every sampled token is the model's own within 1e-4."""
    policy = tiny_policy(kind)
    outs = served(policy, all_of(PROMPTS, SamplingParams(12, temperature)), prefill_chunk=chunk)
    for prompt, out in zip(PROMPTS, outs, strict=True):
        expected = forward_logprobs(policy, prompt, out.token_ids, temperature)
        np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)
        assert out.logprobs.dtype == np.float32
        assert out.versions.tolist() == [0] * 12


def test_noise_depends_on_the_seed_alone():
    """Alone, in company or in another order, a request draws the same tokens; another seed draws others."""
    policy = tiny_policy()
    params = SamplingParams(12, 1.0)
    together = served(policy, all_of(PROMPTS, params))

    async def reversed_order(engine: HfEngine) -> list[Generation]:
        jobs = [engine.generate(PROMPTS[i], params, seed=i) for i in reversed(range(50))]
        return (await asyncio.gather(*jobs))[::-1]

    async def one_by_one(engine: HfEngine) -> list[Generation]:
        return [await engine.generate(p, params, seed=i) for i, p in enumerate(PROMPTS)]

    for other in (served(policy, reversed_order, slots=9), served(policy, one_by_one)):
        assert [o.token_ids.tolist() for o in other] == [o.token_ids.tolist() for o in together]
    again = served(policy, lambda e: e.generate(PROMPTS[0], params, seed=1000))
    assert again.token_ids.tolist() != together[0].token_ids.tolist()


def test_the_same_requests_give_the_same_bits():
    """Two runs of nested, uneven rollouts: tokens and log-probs are bit-equal, and so are the batches."""

    def once() -> tuple[list[bytes], list[int]]:
        policy = tiny_policy()
        batches: list[int] = []
        step = policy.step

        def recorded(ids: torch.Tensor, *rest: object) -> torch.Tensor:
            batches.append(ids.shape[0] * 1000 + ids.shape[1])
            return step(ids, *rest)

        policy.step = recorded

        async def rollout(engine: HfEngine, i: int) -> list[bytes]:
            out: list[bytes] = []
            ids = list(PROMPTS[i][:8])
            for turn in range(1 + i % 3):
                g = await engine.generate(ids, SamplingParams(2 + i % 4), seed=i * 10 + turn, session=f"s{i}")
                ids += g.token_ids.tolist() + [5] * (1 + i % 2)
                out += [g.token_ids.tobytes(), g.logprobs.tobytes()]
                out += [
                    b for part in await asyncio.gather(child(engine, i), child(engine, i + 50)) for b in part
                ]
            return out

        async def child(engine: HfEngine, i: int) -> list[bytes]:
            g = await asyncio.create_task(engine.generate([1, 2, i % VOCAB], SamplingParams(3), seed=i))
            return [g.token_ids.tobytes(), g.logprobs.tobytes()]

        async def use(engine: HfEngine) -> list[bytes]:
            return [
                b for part in await asyncio.gather(*[rollout(engine, i) for i in range(20)]) for b in part
            ]

        return served(policy, use, slots=30), batches

    first, second = once(), once()
    assert first == second
    assert max(first[1]) >= 20_000  # all rollouts' first turns shared one forward


def test_calls_of_any_length_change_no_bit():
    """Rollouts with a tool call before each turn and sessions that begin in whatever order the answers come: tokens and
    log-probs are those of calls that are answered at once, and slots are too few for all."""

    def once(seconds: Callable[[int, int], float]) -> list[bytes]:
        async def rollout(engine: HfEngine, i: int) -> list[bytes]:
            out: list[bytes] = []
            ids = list(PROMPTS[i][:8])
            for turn in range(3):
                with outside.call():
                    await asyncio.sleep(seconds(i, turn))
                g = await engine.generate(ids, SamplingParams(2 + i % 4), seed=i * 10 + turn, session=f"s{i}")
                ids += [*g.token_ids.tolist(), 5]
                out += [g.token_ids.tobytes(), g.logprobs.tobytes()]
            engine.release(f"s{i}")
            return out

        async def run() -> list[bytes]:
            engine = HfEngine(tiny_policy(), slots=9, wait_for_calls=True)
            try:
                found = await asyncio.gather(*[rollout(engine, i) for i in range(20)])
                return [data for part in found for data in part]
            finally:
                await engine.close()

        return fake_clock.run(run())

    at_once = once(lambda i, turn: 0.0)
    assert once(lambda i, turn: 1.0 + (7 * i + 3 * turn) % 11) == at_once


def test_prompts_held_for_a_few_steps_share_a_forward():
    """Rollouts that are spread over all stages of their turns: with admit_every 4 they draw the same tokens in fewer
    forwards, and a request that is alone does not wait for anything."""

    def once(admit_every: int, rollouts: int) -> tuple[list[list[int]], int]:
        policy, forwards = tiny_policy(), 0
        step = policy.step

        def counted(*arguments: object) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return step(*arguments)

        policy.step = counted

        async def rollout(engine: HfEngine, i: int) -> list[int]:
            ids = list(PROMPTS[i][:8])
            for turn in range(5):
                params = SamplingParams(2 + (i + turn) % 5)
                ids += (
                    await engine.generate(ids, params, seed=i * 10 + turn, session=f"s{i}")
                ).token_ids.tolist()
                ids += [5] * 3
            return ids

        async def use(engine: HfEngine) -> list[list[int]]:
            return await asyncio.gather(*[rollout(engine, i) for i in range(rollouts)])

        return served(policy, use, admit_every=admit_every), forwards

    at_once, many = once(1, 30)
    held, fewer = once(4, 30)
    assert held == at_once
    assert fewer < 0.9 * many, (fewer, many)
    assert once(4, 1) == once(1, 1)


@KINDS
def test_a_session_feeds_only_what_is_new_and_answers_as_if_fresh(kind):
    """Turns of a session equal the same prompts without one, while only new tokens enter the model."""
    policy = tiny_policy(kind)
    fed: list[int] = []
    step = policy.step

    def counted(ids: torch.Tensor, *rest: object) -> torch.Tensor:
        fed.append(ids.numel())
        return step(ids, *rest)

    async def use(engine: HfEngine) -> None:
        policy.step = counted
        ids = list(PROMPTS[3][:6])
        for turn in range(4):
            kept = list(ids)
            fed.clear()
            out = await engine.generate(ids, SamplingParams(3), seed=turn, session="a")
            assert (
                sum(fed) == (6 if turn == 0 else 3) + 2
            )  # the last token of a turn is fed with the next one
            ids += [*out.token_ids.tolist(), 7, 8]
            fresh = await engine.generate(kept, SamplingParams(3), seed=turn)
            assert out.token_ids.tolist() == fresh.token_ids.tolist()
            np.testing.assert_allclose(out.logprobs, fresh.logprobs, atol=1e-5)

    served(policy, use)


def test_sessions_beyond_the_slots_are_evicted_and_come_back():
    """Ten sessions of four turns in three slots: every turn is that of an engine with room for all."""
    policy = tiny_policy()

    async def use(engine: HfEngine) -> list[list[int]]:
        async def talk(i: int) -> list[int]:
            ids = [i, i + 1]
            for turn in range(4):
                out = await engine.generate(ids, SamplingParams(3), seed=100 * i + turn, session=f"s{i}")
                ids += [*out.token_ids.tolist(), i]
            return ids

        return await asyncio.gather(*[talk(i) for i in range(10)])

    assert served(policy, use, slots=3) == served(policy, use, slots=16)


def test_requests_without_a_slot_are_waiting():
    """Of five requests for two slots three wait; none does once all are answered."""

    async def use(engine: HfEngine) -> None:
        jobs = [asyncio.create_task(engine.generate([i], SamplingParams(4), seed=i)) for i in range(5)]
        seen = set()
        while not all(job.done() for job in jobs):
            await asyncio.sleep(0)
            seen.add(engine.waiting())
        assert engine.waiting() == 0 and seen == {0, 1, 3, 5}

    served(tiny_policy(), use, slots=2)


def test_stop_tokens_end_a_generation_and_are_kept():
    """Generation ends right after the first stop token, with reason "stop"."""
    policy = tiny_policy()
    free = served(policy, all_of(PROMPTS[:8], SamplingParams(12)))
    stops = (int(free[0].token_ids[4]), int(free[1].token_ids[2]))
    for long, short in zip(
        free, served(policy, all_of(PROMPTS[:8], SamplingParams(12, 1.0, stops))), strict=True
    ):
        hits = np.flatnonzero(np.isin(long.token_ids, stops))
        end = int(hits[0]) + 1 if len(hits) else 12
        assert short.token_ids.tolist() == long.token_ids[:end].tolist()
        assert short.finish_reason == ("stop" if len(hits) else "length")


@pytest.mark.parametrize("form", ["bytes", "state", "path"])
def test_weights_change_between_steps(form, tmp_path):
    """A load in mid-generation splits the versions; a session's next turn has the new weights' log-probs."""
    policy, other = tiny_policy(seed=0), tiny_policy(seed=9)
    save_policy(other, tmp_path / "other")
    new = {"bytes": state_bytes(other.model), "state": state_of(other.model), "path": tmp_path / "other"}[
        form
    ]

    async def use(engine: HfEngine) -> None:
        prompt = PROMPTS[2][:5]
        running = asyncio.create_task(engine.generate(prompt, SamplingParams(20), seed=4, session="a"))
        idle = await engine.generate(prompt, SamplingParams(3), seed=4, session="b")
        assert not running.done()
        await engine.load(new, 7)
        assert engine.version == 7
        out = await running
        assert sorted(set(out.versions.tolist())) == [0, 7]
        assert (np.diff(out.versions) >= 0).all()
        assert out.token_ids[:3].tolist() == idle.token_ids.tolist()
        for session, past in (("a", out), ("b", idle)):
            ids = [*prompt, *past.token_ids.tolist(), 3]
            turn = await engine.generate(ids, SamplingParams(5), seed=6, session=session)
            assert turn.versions.tolist() == [7] * 5
            np.testing.assert_allclose(
                turn.logprobs, forward_logprobs(other, ids, turn.token_ids, 1.0), atol=1e-4
            )

    served(policy, use)


def test_bad_requests_are_named():
    """Each error says the value and the bound, and the engine serves on."""
    policy = tiny_policy()

    async def use(engine: HfEngine) -> None:
        async def fails(
            message: str, ids: list[int], params: SamplingParams, session: str | None = None
        ) -> None:
            with pytest.raises(ValueError, match=message):
                await engine.generate(ids, params, seed=0, session=session)

        await fails(
            "prompt of 60 tokens and max_tokens 5 need 65 positions; shift has 64",
            [1] * 60,
            SamplingParams(5),
        )
        await fails("expected at least one token id", [], SamplingParams(5))
        await fails(r"token ids 3..101 of the prompt are outside 0..100", [3, 101], SamplingParams(5))
        await fails("max_tokens 0 must be >= 1", [1], SamplingParams(0))
        out = await engine.generate([1, 2, 3], SamplingParams(2), seed=0, session="a")
        await fails("does not extend its history of 4", [1, 2, 4, *out.token_ids], SamplingParams(2), "a")
        job = asyncio.create_task(engine.generate([1, 2], SamplingParams(9), seed=0, session="b"))
        await asyncio.sleep(0)
        await fails("'b' already has a request running", [1, 2], SamplingParams(2), "b")
        await job
        with pytest.raises(TypeError, match="cannot load weights from int"):
            await engine.load(3, 1)
        assert engine.version == 0

    served(policy, use)
    with pytest.raises(ValueError, match=r"max_length 65 of shift is outside 2..64"):
        HfEngine(policy, max_length=65)


def test_cancelled_released_failed_and_closed():
    """A cancelled request leaves the batch; broken weights fail as infrastructure; close is idempotent."""
    policy = tiny_policy()

    async def use(engine: HfEngine) -> None:
        job = asyncio.create_task(engine.generate([1, 2], SamplingParams(50), seed=0, session="a"))
        other = asyncio.create_task(engine.generate([4], SamplingParams(3), seed=0))
        await asyncio.sleep(0)
        job.cancel()
        assert len((await other).token_ids) == 3
        assert len((await engine.generate([1, 2], SamplingParams(5), seed=0, session="a")).token_ids) == 5
        assert (
            await engine.generate([9, 9], SamplingParams(2), seed=0, session="c")
        ).finish_reason == "length"
        engine.release("c")
        engine.release("never seen")
        await engine.generate([1], SamplingParams(2), seed=0, session="c")  # a new history under the old name
        assert engine.requests() == 0
        broken = {name: torch.full_like(t, float("nan")) for name, t in state_of(policy.model).items()}
        await engine.load(broken, 1)
        with pytest.raises(InfrastructureError, match=r"version 1: .*not finite"):
            await engine.generate([1], SamplingParams(2), seed=0)
        waiting = asyncio.create_task(engine.generate([1], SamplingParams(2), seed=0))
        await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        with pytest.raises(InfrastructureError, match="was closed"):
            await waiting
        with pytest.raises(InfrastructureError, match="is closed"):
            await engine.generate([1], SamplingParams(2), seed=0)

    served(policy, use)


def test_windows_the_cache_cannot_serve_are_refused():
    """A model whose layers attend within a window shorter than max_length would be computed wrongly."""
    policy = tiny_policy("llama")
    config: LlamaConfig = policy.model.config
    config.layer_types = ["sliding_attention", "full_attention"]
    config.sliding_window = 16
    with pytest.raises(ValueError, match="attends within 16 tokens"):
        HfEngine(policy)
    config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="cannot serve LlamaForCausalLM: it has chunked_attention layers"):
        HfEngine(policy)
    config.layer_types = ["sliding_attention", "full_attention"]
    HfEngine(policy, max_length=16)
