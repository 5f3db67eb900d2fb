"""A real server that reports the experts of each token, against our own forward pass. Its kernels are run by Triton's
interpreter (triton_cpu/sitecustomize.py), a second or so a token, so little is sampled."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.model.loading import load_policy
from mgrpo.model.moe import routers_of
from mgrpo.model.policy import Policy
from mgrpo.model.routers import routing_of
from mgrpo.types import Experts
from tests.models import tiny_tokenizer
from tests_vllm.kit import Served, served
from tests_vllm.steps import Steps

pytestmark = pytest.mark.timeout(900)
VOCAB = 1024
PROMPT = [(7 * i * i + 11 * i) % VOCAB for i in range(1, 41)]
SAME = 0.99  # share of choices: float32 in two orders of summation, with rare near-ties


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """A Qwen3-MoE whose middle layer is dense, and random enough that its routers are decided."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    torch.set_num_threads(1)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return Steps(load_policy(folder, PolicyConfig()))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, steps: Steps) -> Iterator[Served]:
    """Started by the command of its config, which asks for the experts."""
    here = str(Path(__file__).parent / "triton_cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", "")))))
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        folder, model = tmp_path_factory.mktemp("routing"), steps.policy.name
        with served(
            folder, "patch", "float32", "policy = { routing_replay = true }", model=Path(model)
        ) as made:
            config = json.loads((Path(model) / "config.json").read_text())
            made.server.routing = routing_of(config, "the tests' model")
            made.take(steps.whole())
            yield made


@torch.inference_mode()
def ours(policy: Policy, ids: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(L, N, k) choices of our own routers, in order of their numbers."""
    found: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(
            lambda module, given, output, router=router: found.append(router.logits_and_choice(output)[1])
        )
        for router in routers_of(policy.model)
    ]
    policy.hidden(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack(found, 1).numpy(), -1)


def share(of: Experts, policy: Policy, ids: list[int]) -> float:
    """Of the choices (token, router) that are those of our forward pass over ids."""
    mine = ours(policy, ids)[: len(of)]
    return float((np.sort(of, -1) == mine).all(-1).mean())


def turn(live: Served, prompt: list[int], n: int, session: str | None = None) -> tuple[list[int], Experts]:
    """All tokens, and their experts, after n more."""
    out: Generation = live.do(
        live.engine.generate(prompt, SamplingParams(n, temperature=1.0), seed=3, session=session)
    )
    assert out.experts is not None
    return [*prompt, *out.token_ids.tolist()], out.experts


def test_experts_are_those_of_our_own_forward(
    live: Served, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and sampled tokens, all but the last; with a prefix that is cached, and as the rest of a session."""
    ids, experts = turn(live, PROMPT, 5, "talk")
    assert experts.shape == (len(PROMPT) + 4, 2, 2) and experts.dtype == np.uint8
    first = share(experts, steps.policy, ids)
    asked: list[int] = []
    generate = live.server.generate

    async def noted(*given: Any) -> Any:
        asked.append(given[-1])
        return await generate(*given)

    monkeypatch.setattr(live.server, "generate", noted)
    longer, rest = turn(live, [*ids, 5, 6, 7, 8, 9], 3, "talk")
    assert asked == [len(experts)] and np.array_equal(rest[: len(experts)], experts)
    again, whole = turn(live, [*ids, 5, 6, 7, 8, 9], 3)
    assert asked[1:] == [0] and again == longer
    shares = [first, share(rest, steps.policy, longer), share(whole, steps.policy, longer)]
    print(
        f"share of (token, router) as in our float32 forward: {shares}; reported twice alike: {(whole == rest).mean()}"
    )
    assert min(shares) >= SAME and len(rest) == len(longer) - 1


def test_an_update_in_the_middle_of_a_request(live: Served, steps: Steps) -> None:
    """Up to the update the experts are those of the weights before it, from the token that was input next on those of
    the weights after it."""
    asked = SamplingParams(48)
    began = time.monotonic()
    live.do(live.engine.generate(PROMPT, asked, seed=4))
    alone = time.monotonic() - began
    for part in (0.3, 0.1, 0.5, 0.0, 0.2):
        before = load_policy(Path(steps.policy.name), PolicyConfig())
        before.model.load_state_dict(steps.policy.model.state_dict())
        new = steps.patch(share=0.5, scale=1.0)

        async def both(new: Any = new, seconds: float = part * alone) -> Generation:
            task = asyncio.create_task(live.engine.generate(PROMPT, asked, seed=4))
            await asyncio.sleep(seconds)
            live.version = new.version
            await live.engine.load(new, new.version)
            return await task

        out = live.do(both())
        ids, versions = [*PROMPT, *out.token_ids.tolist()], out.versions.tolist()
        assert out.experts is not None and len(out.experts) == len(ids) - 1
        if len(set(versions)) == 2:
            break
    else:
        pytest.fail("no update came while a request was running")
    # The last token of the old version was sampled, but not yet input.
    switch = len(PROMPT) + versions.index(new.version) - 1
    old, now = share(out.experts[:switch], before, ids), share_from(out.experts, steps.policy, ids, switch)
    other = share(out.experts[:switch], steps.policy, ids)
    print(
        f"tokens before the update as in the old weights: {old} (in the new ones {other}); after it, new: {now}"
    )
    assert min(old, now) >= SAME and other < 0.9


def share_from(of: Experts, policy: Policy, ids: list[int], start: int) -> float:
    mine = ours(policy, ids)[start : len(of)]
    return float((np.sort(of[start:], -1) == mine).all(-1).mean())
