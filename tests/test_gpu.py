"""What only a GPU can show: packed attention, a training step, the in-process engine and the ops beside float32 on the
CPU, and a head that never waits for the device."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo import group_advantage, grpo_loss, linear_grpo_loss, selective_logprob
from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.policy import Policy
from mgrpo.model.probe import probe, probe_ids
from mgrpo.ops.tree_attention import tree_attention
from mgrpo.ops.tree_kernels import VarlenKernel
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from tests.loss_grid import LOSS_TYPES, configs, error, grid_batch, head_batch, settings
from tests.models import VOCAB, tiny_model, tiny_tokenizer
from tests.rows import rows_of
from tests.test_attention import MODELS, batch
from tests.test_tree_attention import SCALE, dense, levels_of, random_tree, seen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str, model: Any, **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"device": device, **settings})
    return Policy(model.to(device), tiny_tokenizer(), "gpu", config)


def states_and_gradients(policy: Policy) -> list[torch.Tensor]:
    """Hidden states and the gradient of every weight, on the CPU."""
    hidden = policy.hidden_before(*batch())
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(policy.device)
    trained = [p for p in policy.model.base_model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden * target).mean(), trained)
    return [x.detach().float().cpu() for x in (hidden, *gradients)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_attention(name: str) -> None:
    """Packed rows through torch's variable-length attention, in bfloat16, are no farther from float32 than padded rows
    in bfloat16 are; "auto" takes them."""

    def policy(device: str, **settings: Any) -> Policy:
        torch.manual_seed(0)
        return on(device, MODELS[name](), **settings)

    exact = states_and_gradients(policy("cpu", attention="rows"))
    padded = states_and_gradients(policy("cuda", attention="sdpa", dtype="bfloat16"))
    packed = policy("cuda", attention="varlen", dtype="bfloat16")
    assert packed.attention == "varlen"
    for a, b, c in zip(states_and_gradients(packed), padded, exact, strict=True):
        assert error(a, c) <= max(1.5 * error(b, c), 2e-2)
    assert policy("cuda", dtype="bfloat16").attention in ("varlen", "flash")


@pytest.mark.parametrize("held", [0, 6])
def test_tree_attention(held: int) -> None:
    """Output and gradients of bfloat16 attention over prefix trees against float64, with one, two and four heads of
    queries for each of keys."""
    for seed in range(6):
        torch.manual_seed(seed)
        borders, parents = random_tree(seed)
        q, k, v = (
            torch.randn(borders[-1], n, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n in (4, (1, 2, 4)[seed % 3], (1, 2, 4)[seed % 3])
        )
        above = [torch.randn(held, k.shape[1], 32, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        key, value = (x.requires_grad_() for x in above)
        inputs = [q, k, v, *((key, value) if held else ())]
        levels = [at.to(q.device) for at in levels_of(borders, parents, held)]
        out = tree_attention(q, k, v, levels, SCALE, VarlenKernel(), (key, value) if held else None)
        wanted = dense(q, torch.cat([key, k]), torch.cat([value, v]), seen(borders, parents, held).cuda())
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, inputs, grad)
        right = torch.autograd.grad(wanted, inputs, grad.double())
        for a, b in zip((out, *found), (wanted, *right), strict=True):
            assert error(a.detach(), b.detach()) <= 2e-2


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "llama-mqa", "qwen2", "qwen3"])
def test_shared_prefixes(name: str) -> None:
    """Rows of one prefix computed once, in bfloat16, are no farther from float32 than the rows computed whole."""

    def policy(device: str, **settings: Any) -> Policy:
        torch.manual_seed(0)
        return on(device, MODELS[name](), **settings)

    ids, lengths, scored = batch()
    ids[:, :17] = ids[0, :17]
    lengths = lengths.clamp(min=18)
    scored = scored & (torch.arange(1, ids.shape[1]) < lengths[:, None])

    def states_and_gradients(policy: Policy) -> list[torch.Tensor]:
        hidden = policy.hidden_before(ids, lengths, scored)
        target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(policy.device)
        gradients = torch.autograd.grad((hidden * target).mean(), list(policy.model.base_model.parameters()))
        return [x.detach().float().cpu() for x in (hidden, *gradients)]

    exact = states_and_gradients(policy("cpu", attention="rows", share_prefixes=False))
    whole = states_and_gradients(policy("cuda", dtype="bfloat16", share_prefixes=False))
    sharing = policy("cuda", dtype="bfloat16")
    assert sharing.shares, sharing.why_not
    for a, b, c in zip(states_and_gradients(sharing), whole, exact, strict=True):
        assert error(a, c) <= max(1.5 * error(b, c), 2e-2)
    assert "half precision" in str(policy("cuda").why_not)


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora": {"rank": 3}}], ids=str
)
def test_the_probe_is_in_float32(settings: dict[str, Any]) -> None:
    """Packed kernels, which compute in half precision only, have no part in it."""
    exact = on("cpu", tiny_model("llama"))
    found = probe(on("cuda", tiny_model("llama"), **settings), probe_ids(exact, 64))
    bound = 1e-3 if "lora" not in settings else 0.3  # its frozen matrices are rounded
    assert found.logprobs == pytest.approx(probe(exact, found.token_ids).logprobs, abs=bound)


def trained(device: str, loss_type: str, kind: str) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics and gradients of one optimizer step of a tiny policy in float32."""
    policy = on(device, tiny_model(kind))  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.cpu() for p in policy.parameters() if p.grad is not None)
    )
    learner = Learner(policy, optimizer, settings(loss_type), grad_clip=1e9)
    rows = rows_of(1, near=True)
    parts = [rows.rows(torch.arange(len(rows.lengths)) % 2 == i) for i in range(2)]
    return learner.step(MiniBatch(parts, float(rows.weights.sum()))), seen


@pytest.mark.parametrize("kind", ["shift", "llama"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_training_step(loss_type: str, kind: str) -> None:
    """The gradients of an optimizer step and its metrics are a CPU's."""
    metrics, gradients = trained("cuda", loss_type, kind)
    expected, exact = trained("cpu", loss_type, kind)
    scale = max(float(g.abs().max()) for g in exact)
    assert scale > 0 and len(gradients) == len(exact)
    for a, b in zip(gradients, exact, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * scale
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_engine(kind: str) -> None:
    """Continuous batching on the GPU: greedy tokens are the CPU's, and sampled log-probs those of the trainer."""
    prompts = [np.random.default_rng(i).integers(VOCAB, size=3 + i).tolist() for i in range(20)]

    def outs(device: str, temperature: float) -> list[Generation]:
        async def run() -> list[Generation]:
            engine = HfEngine(on(device, tiny_model(kind)), slots=7, prefill_chunk=5)  # type: ignore[arg-type]
            params = SamplingParams(12, temperature)
            jobs = [engine.generate(p, params, seed=i) for i, p in enumerate(prompts)]
            try:
                return await asyncio.gather(*jobs)
            finally:
                await engine.close()

        return asyncio.run(asyncio.wait_for(run(), 300))

    greedy = [o.token_ids.tolist() for o in outs("cuda", 0.0)]
    assert greedy == [o.token_ids.tolist() for o in outs("cpu", 0.0)]
    policy = on("cuda", tiny_model(kind))  # type: ignore[arg-type]
    for prompt, out in zip(prompts, outs("cuda", 1.0), strict=True):
        ids = torch.tensor([prompt + out.token_ids.tolist()])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        blank = torch.zeros(1)
        rows = MicroBatch(ids, mask, torch.zeros(ids.shape), torch.tensor([ids.shape[1]]), blank, blank)
        np.testing.assert_allclose(out.logprobs, logprobs_of(policy, rows, 1.0).cpu().numpy(), atol=1e-4)


def test_group_advantage() -> None:
    """Every estimator agrees with the reference, and a permutation of the rewards changes no bit."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(5000, generator=g).round(decimals=1)
    ids = torch.randint(0, 300, (5000,), generator=g).int()
    weights = torch.randint(0, 4, (5000,), generator=g) / 4.0
    order = torch.randperm(5000, generator=g)
    kinds = [(name, False) for name in ("grpo", "dr_grpo", "rloo", "batch")] + [
        ("grpo", True),
        ("batch", True),
    ]
    for (estimator, unbiased), w in itertools.product(kinds, (None, weights)):
        settings = {"estimator": estimator, "unbiased": unbiased}
        want = group_advantage(rewards, ids, w, **settings, impl="reference")
        here = [x if x is None else x.cuda() for x in (rewards, ids, w)]
        moved = [x if x is None else x[order].cuda() for x in (rewards, ids.long(), w)]
        got = group_advantage(*here, **settings)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-7)
        assert torch.equal(got.cpu()[order], group_advantage(*moved, **settings).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selective_logprob(dtype: torch.dtype) -> None:
    """Log-probs and entropies of the head's kernel, against float64."""
    data = head_batch(1037, 64, dtype)
    hidden, weight, ids = data["hidden"], data["weight"], data["target_ids"]
    exact = (hidden @ weight.t() / 0.7).log_softmax(1)
    logp, entropy = selective_logprob(
        hidden.to(dtype).cuda(), weight.to(dtype).cuda(), ids.cuda(), temperature=0.7, chunk=8
    )
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    assert error(logp.cpu(), exact.gather(1, ids[:, None]).squeeze(1)) <= bound
    assert error(entropy.cpu(), -(exact.exp() * exact).sum(1)) <= bound


def test_the_loss_from_logits_never_waits_for_the_device() -> None:
    """Forward, backward and metrics of every loss queue their work and return."""
    for config in configs():
        data = {k: v.cuda() for k, v in grid_batch(515, torch.float32).items()}
        logits = data.pop("logits").float().requires_grad_()
        ids = data.pop("target_ids")
        for warm in (True, False):  # compiling may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("default" if warm else "error")
            try:
                loss, _ = grpo_loss(logits, ids, config=config, **data)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_head_does_not_wait_for_its_chunks() -> None:
    """The number of rows that can move the gradient sizes its buffers: a look in each of two phases, none a chunk."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for config in configs():
            data = {k: v.cuda() for k, v in head_batch(515, 32, torch.float32).items()}
            leaves = [data.pop(k).float().requires_grad_() for k in ("hidden", "weight")]
            ids = data.pop("target_ids")
            for warm in (True, False):
                with pytest.warns(UserWarning) as seen:
                    loss, _ = linear_grpo_loss(*leaves, ids, config=config, chunk=5, **data)
                    loss.backward()
                waits = [w for w in seen if "synchronizing" in str(w.message)]
                assert warm or len(waits) <= 2, (config, [f"{w.filename}:{w.lineno}" for w in waits])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_head_compiles() -> None:
    """One graph of a training step through inductor equals eager."""
    data = {k: v.cuda() for k, v in head_batch(515, 32, torch.float32).items()}
    hidden, weight = (data.pop(k).float() for k in ("hidden", "weight"))
    ids, config = data.pop("target_ids"), settings("dapo")

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_grpo_loss(hidden * 1.0, weight, ids, config=config, **data)[0]

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        results.append(torch.autograd.grad(run(*leaves) * 0.5, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_layers() -> None:
    """Packed rows through compiled decoder layers, in bfloat16, are no farther from float32 than uncompiled ones are;
    all layers and numbers of tokens share what is compiled."""
    from torch._dynamo.utils import counters

    def policy(device: str, **settings: Any) -> Policy:
        torch.manual_seed(0)
        return on(device, MODELS["qwen3"](), **settings)

    exact = states_and_gradients(policy("cpu", attention="rows"))
    eager = states_and_gradients(policy("cuda", attention="varlen", dtype="bfloat16"))
    counters.clear()
    compiled = policy("cuda", attention="varlen", dtype="bfloat16", compile=True)
    for a, b, c in zip(states_and_gradients(compiled), eager, exact, strict=True):
        assert error(a, c) <= max(1.5 * error(b, c), 2e-2)
    graphs = counters["stats"]["unique_graphs"]
    ids, lengths, scored = batch()
    compiled.hidden_before(ids[1:], lengths[1:], scored[1:])
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert not counters["graph_break"]
