"""Real servers whose weights are patched in place: against whole versions, after damage, and where vLLM's own reload of
0.32 goes wrong (a tied head, experts)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.vllm.plugin_client import load_patch, load_whole
from mgrpo.engines.vllm.weight_sync import is_paused, pause, relabel_and_resume
from mgrpo.engines.weight_folder import PatchFile
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy
from mgrpo.model.probe import probe
from tests_vllm.kit import MODEL, Served, prompts, reference, served
from tests_vllm.steps import Steps

pytestmark = pytest.mark.timeout(900)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
T = TypeVar("T")
SAME = 1e-5  # nats, at most: the same weights in the same server
CLOSE = 1e-3  # nats, mean: float32 in two orders of summation


@pytest.fixture(scope="module")
def steps() -> Steps:
    torch.set_num_threads(1)
    return Steps(reference())


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, steps: Steps) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("patch"), "patch", "float32") as made:
        made.take(steps.whole())
        yield made


def refused(served: Served) -> list[str]:
    return [
        line for line in served.said if ("refused" in line and "Connection" not in line) or "wrong" in line
    ]


def of(served: Served, policy: Policy) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-probs of some prompts by the server."""
    name = served.do(served.server.info()).model
    return np.concatenate([served.do(served.server.prompt_logprobs(name, ids)) for ids in prompts(policy)])


def gap(served: Served, policy: Policy) -> float:
    """Mean |difference| to our forward, nats."""
    mine = np.concatenate([probe(policy, tuple(ids)).logprobs for ids in prompts(policy)])
    return float(np.abs(of(served, policy) - mine).mean())


def test_twenty_patches_in_place_are_the_whole_version(live: Served, steps: Steps) -> None:
    """Each is compared with the trainer's log-probs on its way (the head is tied, and moves), each token carries the
    version; in the end the weights are those of a whole reload."""
    prompt = prompts(steps.policy)[0]
    for n in range(20):
        live.take(steps.patch())
        if n % 7 == 0:
            (out,) = live.generate([prompt], GREEDY)
            assert out.versions.tolist() == [steps.version] * len(out.token_ids)
    patched, patches = of(live, steps.policy), live.server.pauses[-20:]
    assert not refused(live)
    label = parse_label(steps.label)
    assert label is not None
    began = time.monotonic()
    live.sync.folder.make_whole(label)
    made = time.monotonic() - began
    live.do(
        locked(live, lambda: by_hand(live, label, load_whole(live.server, live.sync.folder, label, 300.0)))
    )
    difference = np.abs(of(live, steps.policy) - patched).max()
    print(
        f"pause: patch median {np.median(patches):.2f} s, whole {live.server.pauses[-1]:.2f} s (made whole on disk in "
        f"{made:.2f} s before it); after 20 patches |difference| to a whole reload {difference:.1e}, to our forward "
        f"{gap(live, steps.policy):.1e}"
    )
    assert difference <= SAME and gap(live, steps.policy) < CLOSE


def test_a_torn_patch_leaves_the_server_paused_until_a_whole_version(live: Served, steps: Steps) -> None:
    """A patch whose second half does not lead to what it says: named, half applied, the server stands still; the next
    version comes whole, and patches go on."""
    good = steps.patch(scale=0.5)
    file = live.run.weights / "evil.patch"
    data = bytearray(good.parts[0].spool.read(0, good.parts[0].spool.size).tobytes())
    count = int.from_bytes(data[:4], "little")
    data[4 + 16 * (count - 1) + 12] ^= 1  # the last checksum
    file.write_bytes(data)
    label = parse_label(steps.label)
    assert label is not None
    evil = PatchFile(live.label, str(label), file, len(data), int(google_crc32c.value(bytes(data))))

    async def tear() -> str:
        await pause(live.server, label, "recompute")
        return await load_patch(live.server, evil, 300.0)

    error = live.do(locked(live, tear))
    assert "its bytes are not the trainer's" in error and live.do(is_paused(live.server))
    live.take(good)
    assert not live.do(is_paused(live.server)) and gap(live, steps.policy) < CLOSE
    live.take(steps.patch())
    assert not refused(live) and gap(live, steps.policy) < CLOSE


def test_the_head_that_vllm_does_not_reload_is_found_out(live: Served, steps: Steps) -> None:
    """vLLM's own reload of a tied model keeps the old head: the server is paused and named with the figures. The
    plug-in's whole version repairs it."""
    steps.patch(scale=0.5)
    weights = steps.whole()
    label = live.do(live.sync.prepare(weights))
    folder = str(live.sync.folder.path(label).resolve())
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}

    async def compared() -> str:
        await by_hand(live, label, live.server.post("/collective_rpc", body))
        with pytest.raises(ConfigError, match="answers with other weights than those of") as error:
            await live.sync.compare(live.server, label)
        return str(error.value)

    repair, live.sync.repair = live.sync.repair, _never  # type: ignore[method-assign]
    try:
        print(f"tied head, vLLM's own reload: {live.do(locked(live, compared))}")
    finally:
        live.sync.repair = repair  # type: ignore[method-assign]
    live.take(weights)
    assert gap(live, steps.policy) < CLOSE


def test_a_server_without_a_parser_of_tool_calls_is_refused(live: Served) -> None:
    """Its route would make plain text of every call; the first turn finds out, before one is lost."""
    with pytest.raises(ConfigError, match="parses no tool calls; start it with --enable-auto-tool-choice"):
        live.do(live.engine.parse_turn([1, 2], []))


async def locked(live: Served, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """While the pool's watcher, which ends any pause that nobody looks after, waits."""
    async with live.sync.folder.lock(live.url, 300.0):
        return await act()


async def by_hand(live: Served, label: Label, load: Awaitable[object]) -> None:
    """An update of the paused server by `load`."""
    await pause(live.server, label, "recompute")
    await load
    await relabel_and_resume(live.server, label, "recompute")


async def _never(*_: object) -> bool:
    return False


def test_experts_right_after_an_update(tmp_path: Path) -> None:
    """A Qwen3-MoE: whole and patched versions, its experts padded (48 to 64) and packed by the CPU's kernel."""
    model = tmp_path / "model"
    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(model)
    steps = Steps(load_policy(model, PolicyConfig()))
    with served(tmp_path, "patch", "float32", model=model) as live:
        live.take(steps.whole())
        started = gap(live, steps.policy)
        steps.patch(share=0.5, scale=0.5)
        live.take(steps.whole())
        reloaded = gap(live, steps.policy)
        for _ in range(3):
            live.take(steps.patch(share=0.2, scale=0.5))
        print(
            f"experts: |difference| to our forward at the start {started:.1e}, after a whole version "
            f"{reloaded:.1e}, after three patches {gap(live, steps.policy):.1e}"
        )
        assert max(started, reloaded, gap(live, steps.policy)) < CLOSE and not refused(live)
