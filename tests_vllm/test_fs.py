"""A real server whose weights come through a folder: exact tokens, true log-probs, true versions, and its death."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, state_bytes
from mgrpo.rollout.engine import SamplingParams
from mgrpo.rollout.sync import held_label
from mgrpo.weights import Weights
from tests_vllm.kit import Served, below, logprobs, ours, prompts, reference, served, wait_gone

GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
TIE = 0.15  # nats: what bfloat16 arithmetic in another order can turn round


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.set_num_threads(1)
    return reference()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("fs")) as made:
        made.do(made.engine.load(weights_of(policy, 0), 0))
        yield made


def weights_of(policy: Policy, version: int) -> Weights:
    return Weights(f"e1.v{version}", version, state_bytes(policy.model))


def assert_greedy_agrees(live: Served, policy: Policy) -> None:
    """The server's greedy tokens are the in-process engine's; where they part, both are as likely to our forward."""
    asked = prompts(policy)
    theirs, mine = live.generate(asked, GREEDY), ours(policy, asked, GREEDY)
    equal = 0
    for prompt, a, b in zip(asked, theirs, mine, strict=True):
        if a.token_ids.tolist() == b.token_ids.tolist():
            equal += 1
            continue
        at = int(np.flatnonzero(a.token_ids != b.token_ids)[0])
        _, behind = logprobs(policy, prompt, a, 1.0)
        assert behind[at] < TIE, (
            f"{a.token_ids[at]} instead of {b.token_ids[at]}, {behind[at]:.3f} nats behind"
        )
    print(f"greedy: {equal} of {len(asked)} continuations are identical, the others part at a tie")
    assert equal >= len(asked) // 2


def test_greedy_tokens_are_those_of_the_model(live: Served, policy: Policy) -> None:
    """Token ids in, token ids out: no text, no template, no default of the server in between."""
    assert_greedy_agrees(live, policy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampled_distribution(
    live: Served, policy: Policy, temperature: float
) -> None:
    """What the server reports is what our own forward gives its tokens at that temperature, to bfloat16's precision."""
    asked = prompts(policy)
    outs = live.generate(asked, SamplingParams(max_tokens=48, temperature=temperature))
    theirs = torch.cat([torch.from_numpy(out.logprobs) for out in outs])
    mine = torch.cat([logprobs(policy, p, out, temperature)[0] for p, out in zip(asked, outs, strict=True)])
    other = torch.cat(
        [logprobs(policy, p, out, 1.6 - temperature)[0] for p, out in zip(asked, outs, strict=True)]
    )
    gap = (theirs - mine).abs()
    ratio = (mine - theirs).exp()
    print(
        f"temperature {temperature}: {len(gap)} tokens, |difference| mean {gap.mean():.4f} median {gap.median():.4f} "
        f"max {gap.max():.4f}, mismatch KL {(ratio - 1 - ratio.log()).mean():.2e}, largest ratio {ratio.max():.3f}"
    )
    assert gap.mean() < 2e-2 and (ratio - 1 - ratio.log()).mean() < 1e-3
    assert (theirs - other).abs().mean() > 5 * gap.mean()  # of this temperature and of no other


def test_the_same_seed_gives_the_same_tokens(live: Served, policy: Policy) -> None:
    """Noise is a function of the seed: again the same, another seed another text."""
    prompt = prompts(policy)[2]
    params = SamplingParams(max_tokens=24)

    async def ask(seed: int) -> list[int]:
        return (await live.engine.generate(prompt, params, seed=seed)).token_ids.tolist()

    first, again, other = (live.do(ask(seed)) for seed in (11, 11, 12))
    assert first == again != other


def test_an_update_shows_in_the_output_and_in_the_label_and_is_undone_exactly(
    live: Served, policy: Policy
) -> None:
    """Other weights: other tokens, those of the model with these weights, labelled so. The first weights again: the
    same tokens and log-probs as before, bit for bit."""
    asked = prompts(policy)[:4]
    before = live.generate(asked, GREEDY)
    changed = reference()
    with torch.no_grad():
        for layer in changed.model.model.layers[:10]:
            layer.mlp.down_proj.weight.mul_(1.2)
    live.do(live.engine.load(weights_of(changed, 1), 1))
    after = live.generate(asked, GREEDY)
    assert [o.token_ids.tolist() for o in after] != [o.token_ids.tolist() for o in before]
    assert {int(v) for o in before for v in o.versions} == {0} and {
        int(v) for o in after for v in o.versions
    } == {1}
    assert str(live.do(held_label(live.server))) == "e1.v1"
    assert_greedy_agrees(live, changed)
    live.do(live.engine.load(weights_of(policy, 2), 2))
    restored = live.generate(asked, GREEDY)
    for a, b in zip(before, restored, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert {int(v) for o in restored for v in o.versions} == {2}


def test_a_request_across_an_update_has_tokens_of_both(live: Served, policy: Policy) -> None:
    """The update interrupts a long generation: old versions first, new ones after, and the tokens that follow have the
    log-probs that the new weights give to the whole history."""
    prompt = prompts(policy)[3]
    params = SamplingParams(max_tokens=200)
    changed = reference()
    with torch.no_grad():
        for layer in changed.model.model.layers[:10]:
            layer.mlp.down_proj.weight.mul_(1.2)
    new = weights_of(changed, 3)

    async def interrupted() -> tuple[object, ...]:
        task = asyncio.ensure_future(live.engine.generate(prompt, params, seed=5))
        await asyncio.sleep(1.0)
        await live.engine.load(new, 3)
        return (await task,)

    (out,) = live.do(interrupted())
    split = out.versions.tolist().index(3)
    assert 0 < split < 200 and out.versions.tolist() == [2] * split + [3] * (200 - split)
    theirs = torch.from_numpy(out.logprobs)
    old, late = (logprobs(p, prompt, out, 1.0)[0] for p in (policy, changed))
    gaps = [(theirs[a:b] - x[a:b]).abs().mean() for a, b in ((0, split), (split, 200)) for x in (old, late)]
    print(
        f"{split} tokens of version 2, {200 - split} of 3; |difference| old/new weights: "
        + ", ".join(f"{g:.4f}" for g in gaps)
    )
    assert gaps[0] < 2e-2 < gaps[1] and gaps[3] < 2e-2 < gaps[2]
    live.do(live.engine.load(weights_of(policy, 4), 4))


def test_a_server_of_other_settings_is_refused(live: Served, policy: Policy) -> None:
    """Histories longer than the server takes are found out before anything is sampled."""
    live.engine._replicas._max_length, before = 4096, live.engine._replicas._max_length
    try:
        with pytest.raises(ConfigError, match=r"takes 320 tokens .* max_length is 4096"):
            live.do(live.engine._replicas._examine(live.engine._replicas.replicas[0]))
    finally:
        live.engine._replicas._max_length = before


def test_a_killed_server_is_named_started_again_and_brought_up_to_date(live: Served, policy: Policy) -> None:
    """kill -9 of the front end in the middle of a request: reported by name, nothing of it survives, and the request is
    answered after the restart, by the weights that were current, as if nothing had happened."""
    prompt = prompts(policy)[0]
    (expected,) = live.generate([prompt], GREEDY)
    keeper = live.children.pids()["engine-main-0"]
    family = below(keeper)
    front = family[0]

    async def killed() -> tuple[object, ...]:
        task = asyncio.ensure_future(live.engine.generate(prompt, SamplingParams(200, 0.0), seed=0))
        await asyncio.sleep(0.7)
        os.kill(front, signal.SIGKILL)
        return (await task,)

    (out,) = live.do(killed())
    wait_gone(family)
    assert any(line.startswith("server down: ") and live.url in line for line in live.said), live.said
    assert any(
        "engine-main-0 ended by signal SIGKILL; started again (restart 1)" in line for line in live.said
    )
    assert any(line == f"{live.url} is back, with weights e1.v4" for line in live.said)
    assert out.versions.tolist() == [4] * 200
    assert out.token_ids[:32].tolist() == expected.token_ids.tolist()


def test_nothing_is_left_when_it_is_stopped(tmp_path: Path, live: Served) -> None:
    """The last test of the module: SIGTERM to the keeper ends every process of the server."""
    family = below(live.children.pids()["engine-main-0"])
    assert len(family) >= 2
    live.children.stop()
    wait_gone(family)
