"""A real server whose weights come through a folder: exact tokens, true log-probs, true versions, and its death.

The servers compute in float32, so that what is compared is the interface and not rounding: in bfloat16 this model's own
log-probs move by 0.02 to 0.04 on average, wherever they are computed. One test is about that.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.vllm.weight_sync import server_label
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from tests.models import state_bytes
from tests_vllm.kit import Served, below, logprobs, ours, prompts, reference, served, wait_gone

pytestmark = pytest.mark.timeout(900)  # a server may take its time to start on a busy machine
GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
FLOAT32_HEAD = ("--hf-overrides", '{"head_dtype": "float32"}')
LONG = 160  # tokens of a request across an update: more than one of vLLM's blocks of 128 on a CPU, with the prompt
CLOSE = 1e-3  # nats, mean over tokens: float32 in two orders of summation
TIE = 1e-2  # nats: what that may turn round


@pytest.fixture(scope="module")
def changed() -> Policy:
    """Other weights, far enough from the first to be told apart by their tokens."""
    other = reference()
    with torch.no_grad():
        for layer in other.model.model.layers[:10]:
            layer.mlp.down_proj.weight.mul_(1.2)
        other.model.model.embed_tokens.weight.mul_(1.1)  # the head too: it is tied
    return other


def assert_greedy_agrees(live: Served, policy: Policy) -> list[Generation]:
    """The server's greedy tokens, which it returns, are the in-process engine's; where they part, both are as likely to
    our forward."""
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
    assert equal >= len(asked) - 1
    return theirs


def test_greedy_tokens_are_those_of_the_model(live: Served, policy: Policy) -> None:
    """Token ids in, token ids out: no text, no template, no default of the server in between."""
    assert_greedy_agrees(live, policy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampled_distribution(
    live: Served, policy: Policy, temperature: float
) -> None:
    """What the server reports is what our own forward gives its tokens at that temperature and at no other."""
    asked = prompts(policy)
    outs = live.generate(asked, SamplingParams(max_tokens=24, temperature=temperature))
    theirs = torch.cat([torch.from_numpy(out.logprobs) for out in outs])
    mine, other = (
        torch.cat([logprobs(policy, p, out, t)[0] for p, out in zip(asked, outs, strict=True)])
        for t in (temperature, 1.6 - temperature)
    )
    gap, ratio = (theirs - mine).abs(), (mine - theirs).exp()
    print(
        f"temperature {temperature}: {len(gap)} tokens, |difference| mean {gap.mean():.1e} max {gap.max():.1e}, "
        f"mismatch KL {(ratio - 1 - ratio.log()).mean():.1e}, largest ratio {ratio.max():.4f}"
    )
    assert gap.mean() < CLOSE and gap.max() < 2e-2
    assert (theirs - other).abs().mean() > 0.1


def test_the_same_seed_gives_the_same_tokens(live: Served, policy: Policy) -> None:
    """Noise is a function of the seed: again the same, another seed another text."""
    prompt = prompts(policy)[2]

    async def ask(seed: int) -> list[int]:
        out = await live.engine.generate(prompt, SamplingParams(max_tokens=8), seed=seed)
        return [int(i) for i in out.token_ids]

    first, again, other = (live.do(ask(seed)) for seed in (11, 11, 12))
    assert first == again != other


def test_an_update_shows_in_the_output_and_in_the_label_and_is_undone_exactly(
    live: Served, policy: Policy, changed: Policy, start: bytes
) -> None:
    """Other weights: other tokens, those of the model with these weights, labelled so. The first weights again: the
    same tokens and log-probs as before, bit for bit."""
    some = slice(2, 4)  # the first two are answered alike
    asked, params = prompts(policy)[some], SamplingParams(max_tokens=16, temperature=0.0)
    before = live.one_by_one(asked, params)
    version = live.load(state_bytes(changed.model))
    after = assert_greedy_agrees(live, changed)
    assert [o.token_ids[:16].tolist() for o in after[some]] != [o.token_ids.tolist() for o in before]
    assert {int(v) for o in after for v in o.versions} == {version}
    assert str(live.do(server_label(live.server))) == live.label
    version = live.load(start)
    restored = live.one_by_one(asked, params)
    for a, b in zip(before, restored, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert {int(v) for o in restored for v in o.versions} == {version}


def test_a_request_across_an_update_has_tokens_of_both(
    shared_server: Served, policy: Policy, changed: Policy, start: bytes
) -> None:
    """The update interrupts a long generation: old versions first, new ones after, and each token has the log-prob that
    its version gives to the whole history before it, keys and values included."""
    out, split = across_an_update(shared_server, policy, changed, start)
    was_old, new_is_new, was_new, new_is_old = gaps(out, split, prompts(policy)[3], policy, changed)
    assert was_old < CLOSE and new_is_new < CLOSE and was_new > 5e-2 and new_is_old > 5e-2


def test_a_request_that_keeps_its_keys_across_an_update(
    shared_server: Served, policy: Policy, changed: Policy, start: bytes
) -> None:
    """on_update keep: the same, but the tokens after the update come from new weights on old keys and are of neither
    version. What is asked afterwards finds none of those keys."""
    prompt = prompts(policy)[3]
    shared_server.sync.on_update = "keep"
    try:
        out, split = across_an_update(shared_server, policy, changed, start)
        asked = [prompt, [*prompt, *out.token_ids[: LONG - 10].tolist()]]
        again = shared_server.one_by_one(asked, SamplingParams(8, 0.0))
    finally:
        shared_server.sync.on_update, shared_server.server.cache_salt = "recompute", None
    was_old, new_is_new, was_new, new_is_old = gaps(out, split, prompt, policy, changed)
    assert was_old < CLOSE and was_new > 5e-2
    assert new_is_new > 10 * CLOSE and new_is_old > 10 * CLOSE
    for history, fresh in zip(asked, again, strict=True):
        mine, _ = logprobs(changed, history, fresh, 1.0)
        assert (torch.from_numpy(fresh.logprobs) - mine).abs().mean() < CLOSE


def across_an_update(live: Served, policy: Policy, changed: Policy, start: bytes) -> tuple[Generation, int]:
    """LONG tokens during which the server goes from `start` to the weights of `changed`, and how many are of the
    first."""
    prompt = prompts(policy)[3]
    data = state_bytes(changed.model)

    async def interrupted(seconds: float) -> Generation:
        task = asyncio.ensure_future(live.engine.generate(prompt, SamplingParams(max_tokens=LONG), seed=5))
        await asyncio.sleep(seconds)
        await live.bring(data)
        return await task

    for seconds in (0.6, 0.2, 0.0, 1.5, 4.0):  # how far the server gets in that time is the machine's matter
        was = live.load(start)
        live.do(live.place(data))  # written beside a busy server it takes longer than the request
        out = live.do(interrupted(seconds))
        split = int((out.versions == was).sum())
        if 0 < split < LONG:
            break
    assert 0 < split < LONG and out.versions.tolist() == [was] * split + [live.version] * (LONG - split)
    return out, split


def gaps(
    out: Generation, split: int, prompt: list[int], policy: Policy, changed: Policy
) -> tuple[float, float, float, float]:
    """Mean |difference| in nats: of the first `split` tokens to the old weights, of the others to the new ones, of the
    first to the new, of the others to the old."""
    theirs = torch.from_numpy(out.logprobs)
    old, new = ((theirs - logprobs(p, prompt, out, 1.0)[0]).abs() for p in (policy, changed))
    found = tuple(float(x.mean()) for x in (old[:split], new[split:], new[:split], old[split:]))
    n = len(out.token_ids) - split
    print(f"{split} old tokens, {n} new; |difference|: {[f'{x:.1e}' for x in found]}")
    return found  # type: ignore[return-value]


def test_logprobs_in_bfloat16(policy: Policy, start: bytes, tmp_path: Path) -> None:
    """A server that computes in bfloat16, its head in float32, against our forward in float32: half of the tokens
    within 2e-2 nats, no bias, and as near as our own forward in bfloat16 is but for a factor of 2."""
    half = reference()
    half = Policy(half.model, half.tokenizer, half.name, PolicyConfig(dtype="bfloat16"))
    asked = prompts(policy)
    params = SamplingParams(max_tokens=48)
    with served(tmp_path, "fs", "bfloat16", arguments=FLOAT32_HEAD) as live:
        live.load(start)
        outs = live.generate(asked, params)
    theirs = torch.cat([torch.from_numpy(out.logprobs) for out in outs])
    mine, rounded = (
        torch.cat([logprobs(p, prompt, out, 1.0)[0] for prompt, out in zip(asked, outs, strict=True)])
        for p in (policy, half)
    )
    gap, own = (theirs - mine).abs(), (rounded - mine).abs()
    ratio = (mine - theirs).exp()
    print(
        f"bfloat16, float32 head: |difference| median {gap.median():.4f} mean {gap.mean():.4f} max {gap.max():.3f}, "
        f"bias {(theirs - mine).mean():+.4f}, mismatch KL {(ratio - 1 - ratio.log()).mean():.1e}, "
        f"largest ratio {ratio.max():.3f}; our own bfloat16 forward: mean {own.mean():.4f}"
    )
    assert gap.median() < 2e-2 and (theirs - mine).mean().abs() < 1e-2
    assert gap.mean() < 2 * own.mean()


def test_a_server_of_other_settings_is_refused(live: Served) -> None:
    """Histories longer than the server takes are found out before anything is sampled."""
    pool = live.engine._pool
    before, pool._max_length = pool._max_length, 4096
    try:
        with pytest.raises(ConfigError, match=r"takes 512 tokens .* max_length is 4096"):
            live.do(pool._examine(pool.servers[0]))
    finally:
        pool._max_length = before


def test_a_killed_server_is_named_started_again_and_brought_up_to_date(
    doomed: Served, policy: Policy, changed: Policy
) -> None:
    """kill -9 of the front end in the middle of a request: reported by name, nothing of it survives, and the request is
    answered after the restart, by the weights that were current, as if nothing had happened."""
    prompt = prompts(policy)[0]
    version = doomed.load(state_bytes(changed.model))  # not what a server starts with
    (expected,) = doomed.generate([prompt], GREEDY)
    family = below(doomed.children.pids()["engine-main-0"])

    async def killed() -> Generation:
        task = asyncio.ensure_future(doomed.engine.generate(prompt, SamplingParams(64, 0.0), seed=0))
        await asyncio.sleep(0.3)
        os.kill(family[0], signal.SIGKILL)
        return await task

    out = doomed.do(killed())
    wait_gone(family)
    assert any(line.startswith("server down: ") and doomed.url in line for line in doomed.said), doomed.said
    assert any(
        "engine-main-0 ended by signal SIGKILL; started again (restart 1)" in line for line in doomed.said
    )
    assert f"{doomed.url} is back, with weights {doomed.label}" in doomed.said
    assert out.versions.tolist() == [version] * 64
    assert out.token_ids[:32].tolist() == expected.token_ids.tolist()


def test_nothing_is_left_when_it_is_stopped(doomed: Served) -> None:
    """The last test of the server: SIGTERM to the supervisor ends every process of the server."""
    family = below(doomed.children.pids()["engine-main-0"])
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family]
    assert sum(name.startswith(b"VLLM::") for name in names) == 1  # engine and worker are one process
    assert len(family) >= 2
    doomed.children.stop()
    wait_gone(family)
