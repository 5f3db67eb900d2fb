"""New weights while the in-process engine samples: each token's log-prob beside a forward of the version it carries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.policy import Policy, state_of
from tests.families import family
from tests.models import tiny_policy, tiny_tokenizer

T = TypeVar("T")
pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("shift", "llama", "GPT2", "OPT", "Mpt", "Qwen2", "Gemma3Text", "GptOss", "Qwen3Moe", "DeepseekV3")
PROMPT = [5, 17, 3, 8, 90, 41, 2, 2, 60, 33, 12]
TURN = SamplingParams(24)


def policy_of(name: str, seed: int) -> Policy:
    if name in ("shift", "llama"):
        return tiny_policy(name, seed)  # type: ignore[arg-type]
    model = family(name, seed)
    with torch.no_grad():  # far enough apart for a mixture of two to show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return Policy(model, tiny_tokenizer(), name)


class Watched:
    """An engine that counts what it feeds. versions: the policies whose weights are loaded as version 0, 1, ..."""

    def __init__(self, name: str, on_update: OnUpdate, versions: int = 4, **settings: int) -> None:
        self.versions = [policy_of(name, seed) for seed in range(versions)]
        self.served = policy_of(name, 0)
        self.engine = HfEngine(self.served, on_update=on_update, max_length=48, **settings)
        self.forwards = self.fed = 0
        step = self.served.step

        def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.forwards += 1
            self.fed += ids.numel()
            return step(ids, *rest)

        self.served.step = counted  # type: ignore[method-assign]

    async def after(self, forwards: int) -> None:
        """Let requests run for so many more forwards."""
        goal = self.forwards + forwards
        for _ in range(1000 * forwards):
            if self.forwards >= goal:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{forwards} forwards were not made")

    async def load(self, version: int) -> None:
        await self.engine.load(state_of(self.versions[version].model), version)

    def gaps(self, prompt: Sequence[int], out: Generation) -> np.ndarray:
        """(n,) how far each log-prob is from the one that its version gives to the whole history before it."""
        row = torch.tensor([[*prompt, *out.token_ids.tolist()]])
        gaps = np.full(len(out.token_ids), np.nan)
        for version in set(out.versions.tolist()):
            policy = self.versions[version]
            with torch.no_grad():
                logits = policy.vocabulary.logits(policy.hidden(row)[0], policy.head_weight).float()
            given = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
            mine = out.versions == version
            gaps[mine] = np.abs(out.logprobs - given.numpy())[mine]
        return gaps


def run(watched: Watched, use: Callable[[], Awaitable[T]]) -> T:
    async def whole() -> T:
        try:
            return await use()
        finally:
            await watched.engine.close()

    return asyncio.run(asyncio.wait_for(whole(), 120))


def start(watched: Watched, prompt: Sequence[int], seed: int = 4, session: str | None = None) -> Any:
    return asyncio.create_task(watched.engine.generate(prompt, TURN, seed=seed, session=session))


@pytest.mark.parametrize("name", FAMILIES)
def test_recompute_gives_every_token_the_log_prob_of_its_version(name: str) -> None:
    """Three updates within requests of several lengths, one of them still in its chunked prefill: every log-prob is
    that of the version that the token carries, and so are those of the session's next turn."""
    watched = Watched(name, "recompute", prefill_chunk=4)
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:8]]

    async def use() -> list[Generation]:
        jobs = [start(watched, prompt, i, f"s{i}") for i, prompt in enumerate(prompts)]
        await watched.after(2)
        for version in (1, 2, 3):
            await watched.load(version)
            await watched.after(8)
        outs: list[Generation] = await asyncio.gather(*jobs)
        ids = [*PROMPT, *outs[0].token_ids.tolist(), 7, 9]
        watched.fed = 0
        turn = await watched.engine.generate(ids, SamplingParams(5), seed=9, session="s0")
        assert watched.fed == 3 + 4  # its last token, the two new ones, and all but the last of those sampled
        assert turn.versions.tolist() == [3] * 5 and watched.gaps(ids, turn).max() < 1e-4
        return outs

    outs = run(watched, use)
    assert set(np.concatenate([out.versions for out in outs]).tolist()) == {0, 1, 2, 3}
    for prompt, out in zip(prompts, outs, strict=True):
        assert len(out.token_ids) == 24 and (np.diff(out.versions) >= 0).all()
        assert watched.gaps(prompt, out).max() < 1e-4


@pytest.mark.parametrize("name", ["shift", "llama", "GPT2"])
def test_keep_is_free_and_its_later_tokens_are_of_no_version(name: str) -> None:
    """Tokens before the update are exact. Those after it differ from a forward of their version, which is what
    "recompute" is for; nothing is fed twice. The session's next turn is fed afresh, and exact."""
    watched = Watched(name, "keep")

    async def use() -> Generation:
        job = start(watched, PROMPT, session="a")
        await watched.after(6)
        await watched.load(1)
        out: Generation = await job
        assert watched.fed == len(PROMPT) + len(out.token_ids) - 1
        ids = [*PROMPT, *out.token_ids.tolist(), 7]
        turn = await watched.engine.generate(ids, SamplingParams(5), seed=9, session="a")
        assert turn.versions.tolist() == [1] * 5 and watched.gaps(ids, turn).max() < 1e-4
        return out

    out = run(watched, use)
    gaps, after = watched.gaps(PROMPT, out), out.versions == 1
    assert 0 < after.sum() < 24
    assert gaps[~after].max() < 1e-4
    assert gaps[after].max() > 1e-2


@pytest.mark.parametrize("on_update", ["keep", "recompute"])
def test_an_update_changes_no_noise(on_update: OnUpdate) -> None:
    """The same weights again, under other numbers: the tokens are those of a request that nothing interrupted."""

    def tokens(loads: Sequence[int]) -> tuple[list[int], set[int]]:
        watched = Watched("llama", on_update, 1)
        watched.versions *= 4

        async def use() -> Generation:
            job = start(watched, PROMPT)
            for version in loads:
                await watched.after(5)
                await watched.load(version)
            return await job  # type: ignore[no-any-return]

        out = run(watched, use)
        assert watched.gaps(PROMPT, out).max() < 1e-4
        return out.token_ids.tolist(), set(out.versions.tolist())

    (alone, _), (interrupted, versions) = tokens(()), tokens((1, 2, 3))
    assert alone == interrupted and versions == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["shift", "llama"])
def test_an_update_in_a_chunked_prefill(name: str) -> None:
    """What is not fed yet when weights change is not left out; recomputed, all of the prompt is of the new weights."""
    for on_update in ("keep", "recompute"):
        watched = Watched(name, on_update, prefill_chunk=3)  # type: ignore[arg-type]

        async def use(watched: Watched = watched) -> Generation:
            job = start(watched, PROMPT)
            await watched.after(2)
            await watched.load(1)
            return await job  # type: ignore[no-any-return]

        out = run(watched, use)
        assert out.versions.tolist() == [1] * 24
        assert (watched.gaps(PROMPT, out).max() < 1e-4) == (on_update == "recompute")


@pytest.mark.parametrize("on_update", ["keep", "recompute"])
def test_what_an_update_does_not_touch(on_update: OnUpdate) -> None:
    """A request that waits for a slot begins under the new weights; weights that do not fit change nothing at all."""
    watched = Watched("llama", on_update, slots=1)

    async def use() -> tuple[Generation, Generation]:
        first, second = start(watched, PROMPT), start(watched, PROMPT[:4], seed=5)
        await watched.after(3)
        with pytest.raises(ValueError, match="weights"):
            await watched.engine.load({"no.such.weight": torch.zeros(2)}, 9)
        await watched.after(3)
        assert watched.engine.waiting() == 1
        await watched.load(1)
        return await first, await second

    first, second = run(watched, use)
    before = first.versions == 0
    assert before.sum() == 6 and watched.gaps(PROMPT, first)[before].max() < 1e-4
    assert second.versions.tolist() == [1] * 24 and watched.gaps(PROMPT[:4], second).max() < 1e-4
