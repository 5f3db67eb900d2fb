"""prime-rl with M-GRPO's credit and loss. Against a double of its interfaces (tests/prime_rl_double.py), and against
its own algorithm, train sink and compute_loss where PRIME_RL_CHECKOUT names a checkout; no GPU or environment runs."""

from __future__ import annotations

import asyncio
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mgrpo
from mgrpo.errors import ConfigError
from mgrpo.integrations import prime_rl
from tests import prime_rl_double
from tests.prime_rl_double import Episode, Trace

HOSTS = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not prime_rl_double.CHECKOUT, reason="PRIME_RL_CHECKOUT names no checkout of prime-rl"
        ),
    ),
]
K = 4
ROOT = Path(__file__).parent.parent


def group(rng: np.random.Generator, number: int, flat: bool) -> list[Episode]:
    """K episodes of a planner and 0..4 calls of a sub-agent each; flat: the planners' rewards are all alike."""
    episodes = []
    for k in range(K):
        traces = []
        for agent, count in (("main", 1), ("sub", int(rng.integers(0, 5)))):
            for i in range(count):
                nodes = []
                for trained in (0, 1, 0, 1):
                    n = int(rng.integers(1, 5))
                    logprobs = (-rng.random(n) - 0.1 if trained else np.zeros(n)).tolist()
                    nodes.append(
                        prime_rl_double.node(rng.integers(0, 9, n).tolist(), [trained] * n, logprobs)
                    )
                reward = 1.0 if flat and agent == "main" else float(rng.integers(0, 3))
                traces.append(Trace(f"{number}/{k}/{agent}/{i}", agent, reward, nodes))
        episodes.append(Episode(f"{number}/{k}", number, traces))
    return episodes


def sink(host: Any, algorithm: Any, batch_size: int, **train: Any) -> Any:
    env = SimpleNamespace(
        name="team",
        algorithm=algorithm,
        sampling_args={"temperature": 1.0},
        config=SimpleNamespace(group_size=K),
    )

    class Envs(list):  # type: ignore[type-arg]
        def get(self, name: str) -> Any:
            return next(env for env in self if env.name == name)

    config = SimpleNamespace(
        train=SimpleNamespace(**({"filter_zero_advantages": True} | train)),
        max_off_policy_steps=1,
        seq_len=512,
    )
    if not host.real:
        return host.TrainSink(config, train_envs=Envs([env]), batch_size=batch_size)
    progress = SimpleNamespace(step=1)
    return host.TrainSink(
        config, tokenizer=None, train_envs=Envs([env]), mm_token_type_ids_mapping=None, progress=progress,
        batch_size=batch_size, token_batch_size=None,
    )  # fmt: skip


def step_loss(
    host: Any, samples: list[Any], logp: dict[tuple[int, ...], torch.Tensor], **config: Any
) -> torch.Tensor:
    """What prime-rl's trainer makes of a step in one micro-batch on one rank."""

    def tensors(values: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.tensor(x, dtype=dtype) for x in values]

    masks = tensors((s.mask for s in samples), torch.bool)
    weights = tensors((s.rl_weights for s in samples), torch.float32)
    scale = sum(int((mask & (w != 0)).sum()) for mask, w in zip(masks, weights, strict=True))
    loss, _ = host.compute_loss(
        trainer_logprobs=[logp[tuple(s.logprobs)] for s in samples],
        inference_logprobs=tensors((s.logprobs for s in samples), torch.float32), ref_logprobs=None,
        advantages=tensors((s.advantages for s in samples), torch.float32), loss_mask=masks, rl_weights=weights,
        ce_weights=None, ref_kl_weights=None, rl_loss_fn=lambda inputs: prime_rl.loss(inputs, **config),
        rl_scale=max(scale, 1), ce_scale=1, ref_kl_scale=1,
    )  # fmt: skip
    return loss


def our_loss(rows: list[tuple[int, int, Trace]], logp: dict[tuple[int, ...], torch.Tensor], assigned: Any,
             rows_in: list[int], config: mgrpo.GrpoLossConfig) -> torch.Tensor:  # fmt: skip
    """mgrpo's weighted loss of the chosen rows."""
    chosen = [rows[i][2].branches[0] for i in rows_in]
    masks = [np.concatenate([n.mask for n in branch.nodes]) for branch in chosen]
    x = torch.cat([logp[tuple(b.logprobs)][torch.tensor(m)] for b, m in zip(chosen, masks, strict=True)])
    old = np.concatenate([np.array(b.logprobs)[m] for b, m in zip(chosen, masks, strict=True)])
    loss, _ = mgrpo.policy_loss(
        x, config=config, old_logprobs=torch.tensor(old, dtype=torch.float32),
        cu_seqlens=torch.tensor(np.cumsum([0] + [m.sum() for m in masks]), dtype=torch.int32),
        advantages=torch.tensor(assigned.advantage[rows_in], dtype=torch.float32),
        seq_weight=torch.tensor(assigned.weight[rows_in], dtype=torch.float32),
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("real", HOSTS)
@pytest.mark.parametrize("kind", ["dapo", "cispo", "grpo", "sapo", "gspo"])
def test_a_batch_of_prime_rl_trains_our_weighted_loss(
    real: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three groups, one whose planners all have the same reward, through the algorithm, the sink (which cuts a batch in
    the middle of a group, drops the draw's rows and prunes those without advantage), the trainer's loss and its
    divisor: value and gradient, in two batches."""
    host = prime_rl_double.install(monkeypatch, real)
    mean = "sequence" if kind in ("grpo", "sapo", "gspo") else "token"
    config = {"type": kind} | ({"clip_eps_high": 5.0} if kind == "cispo" else {})
    made = prime_rl.register(d_max={"sub": 2}, seed=5, mean=mean)  # type: ignore[arg-type]
    assert host.algo.ALGORITHM_CLASSES["grpo"] is made and issubclass(made, host.algo.Algorithm)
    rng = np.random.default_rng(3)
    groups = [group(rng, q, flat=q == 1) for q in range(3)]
    rows = [(q, k, t) for q, g in enumerate(groups) for k, e in enumerate(g) for t in e.traces]
    size = len(rows) // 2
    receiver = sink(host, made(SimpleNamespace(), None), size)
    assigned = mgrpo.assign(
        [f"team/{q}" for q, _, _ in rows], [t.agent.name for _, _, t in rows], [k for _, k, _ in rows],
        [int(t.id.rsplit("/", 1)[1]) for _, _, t in rows], [t.reward for _, _, t in rows],
        d_max={"sub": 2}, seed=5, step=3,
    )  # fmt: skip
    assert not assigned.kept.all() and (assigned.advantage[assigned.kept] == 0).any()
    generator = torch.Generator().manual_seed(1)
    logp = {}
    for _, _, t in rows:
        old = torch.tensor(t.branches[0].logprobs)
        logp[tuple(t.branches[0].logprobs)] = (old + 0.3 * torch.randn(len(old), generator=generator)).clamp(
            max=0
        )
    batches = [b for g in groups for e in g if (b := asyncio.run(receiver.add(e))) is not None]
    if len(receiver.pending_batch) >= size:
        batches.append(receiver.process_batch())
    assert len(batches) == 2
    for number, batch in enumerate(batches):
        theirs = {key: x.clone().requires_grad_() for key, x in logp.items()}
        ours = {key: x.clone().requires_grad_() for key, x in logp.items()}
        inside = list(range(number * size, (number + 1) * size))
        got = step_loss(host, batch.samples, theirs, **config)
        want = our_loss(rows, ours, assigned, inside, mgrpo.GrpoLossConfig(**config))
        got.backward()
        want.backward()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=5e-8)
        for key in logp:
            mine = torch.zeros_like(logp[key]) if ours[key].grad is None else ours[key].grad
            host_grad = torch.zeros_like(logp[key]) if theirs[key].grad is None else theirs[key].grad
            torch.testing.assert_close(host_grad, mine, rtol=1e-5, atol=5e-8)


def test_rl_weights_of_a_step() -> None:
    """prime-rl's mean over the tokens it counts is then the weighted mean of tokens, or of sequences; pruned rows are
    in the sums alone."""
    query, tokens = [0] * 5, np.array([3, 1, 4, 2, 6])
    a = mgrpo.assign(
        query, "sub", [0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [1.0, 0.0, 2.0, 1.0, 1.0], d_max=2, seed=0, step=0
    )
    assert 0 < a.kept.sum() < 5
    loss = np.array([0.3, -0.2, 0.7, 0.4, 0.5])  # of each token of a row
    for mean, want in (
        ("token", (a.weight * tokens * loss).sum() / (a.weight * tokens).sum()),
        ("sequence", (a.weight * loss).sum() / a.weight.sum()),
    ):
        w = prime_rl.rl_weights(a, tokens, mean=mean, filtered=False)  # type: ignore[arg-type]
        assert (w > 0).tolist() == a.kept.tolist()
        assert (w * tokens * loss).sum() / tokens[w != 0].sum() == pytest.approx(want, rel=1e-12)
    still = mgrpo.assign(
        query, "sub", [0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [1.0, 1.0, 1.0, 3.0, 2.0], d_max=2, seed=0, step=0
    )
    counted = still.kept & (still.advantage != 0)
    assert counted.sum() < still.kept.sum()
    w = prime_rl.rl_weights(still, tokens)
    want = (still.weight * tokens * loss)[counted].sum() / (still.weight * tokens).sum()
    assert (w * tokens * loss)[counted].sum() / tokens[counted].sum() == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="least 0, expected"):
        prime_rl.rl_weights(a, [0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="mean: 'batch'"):
        prime_rl.rl_weights(a, tokens, mean="batch")  # type: ignore[arg-type]


REFUSED = [
    ({"type": "dr_grpo", "max_completion_length": 9}, "type: 'dr_grpo'"),
    ({"entropy_coef": 0.1}, "entropy_coef: 0.1"),
    ({"correction": "token_tis"}, "correction: 'token_tis'"),
    ({"temperature": 0.7}, "temperature: 0.7"),
    ({"clip": 0.1}, "trainer.loss.kwargs: Extra inputs"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_a_loss_setting_that_cannot_be_honoured_is_refused(config: dict[str, Any], words: str) -> None:
    x = torch.zeros(2)
    inputs = prime_rl_double.LossInputs(x, x, None, x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ConfigError, match=words):
        prime_rl.loss(inputs, **config)


def test_weights_and_advantages_are_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's own; a sequence ratio has one advantage. The loss is the sum over tokens, prime-rl divides."""
    prime_rl_double.install(monkeypatch, False)
    x, mask = torch.zeros(3), torch.tensor([True, True, False])
    weights, advantages = torch.tensor([0.5, 0.25, 9.0]), torch.tensor([1.0, 3.0, 9.0])
    inputs = prime_rl_double.LossInputs(x, x, None, advantages, mask, weights)
    for kind in ("dapo", "grpo"):
        out = prime_rl.loss(inputs, type=kind)
        assert float(out.loss) == -(0.5 + 0.75) and "mgrpo/ratio_mean" in out.metrics
    with pytest.raises(ValueError, match=r"advantages: 1.0 and others in one sample"):
        prime_rl.loss(inputs, type="gspo")
    with pytest.raises(ValueError, match="ref_logprobs"):
        prime_rl.loss(inputs, kl_coef=0.1)


@pytest.mark.parametrize("real", HOSTS)
def test_an_orchestrator_that_cannot_be_honoured_is_refused(
    real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sink takes an episode."""
    host = prime_rl_double.install(monkeypatch, real)
    other = host.algo.ALGORITHM_CLASSES["max_rl"]
    with pytest.raises(ConfigError, match="place: 'ppo' is no algorithm of prime-rl, expected one of grpo"):
        prime_rl.register("ppo", d_max=1)
    with pytest.raises(ConfigError, match="mean: 'batch'"):
        prime_rl.register(d_max=1, mean="batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="d_max"):
        prime_rl.register(d_max={"sub": 0})
    with pytest.raises(ConfigError, match="place: 'sft' trains without advantages"):
        host.algo.ALGORITHM_CLASSES["sft"].action_loss_type = "ce"  # of a stub the checkout's config says it
        prime_rl.register("sft", d_max=1)
    made = prime_rl.register(d_max=1)
    with pytest.raises(ConfigError, match=r"algo.length_penalty: 1 cannot be honoured"):
        made(SimpleNamespace(length_penalty=1), None)
    algorithm = made(SimpleNamespace(length_penalty=None), None)
    with pytest.raises(ConfigError, match=r"filter_zero_advantages: False cannot be honoured.*True"):
        sink(host, algorithm, 4, filter_zero_advantages=False)
    with pytest.raises(ConfigError, match=r"environment 'team': .* cannot share a batch with MGRPO"):
        sink(host, other(SimpleNamespace(length_penalty=None), None), 4)
    again = prime_rl.register(d_max=3)  # replaces the settings; the sink scales once
    assert again is host.algo.ALGORITHM_CLASSES["grpo"] and again is not made


def test_what_the_page_and_the_example_say_to_type_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The orchestrator's lines put the algorithm in place and start prime-rl's own; the trainer's are a loss."""
    page = (ROOT / "docs/embedding/prime_rl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    settings = tomllib.loads(re.findall(r"```toml\n(.*?)```", page, re.S)[0])
    example = tomllib.loads((ROOT / "examples/embed_prime_rl/rl.toml").read_text())
    assert (
        settings["trainer"] == example["trainer"]
        and example["orchestrator"]["train"]["algo"]["type"] == "grpo"
    )
    for lines in (code, (ROOT / "examples/embed_prime_rl/orchestrator.py").read_text()):
        host = prime_rl_double.install(monkeypatch, False)
        entry: Any = ModuleType("prime_rl.entrypoints.orchestrator")
        entry.main = lambda: None
        monkeypatch.setitem(sys.modules, "prime_rl.entrypoints", ModuleType("prime_rl.entrypoints"))
        monkeypatch.setitem(sys.modules, "prime_rl.entrypoints.orchestrator", entry)
        exec(lines, {"__name__": "__main__"})
        assert host.algo.ALGORITHM_CLASSES["grpo"].__name__ == "MGRPO"
    assert len(code.splitlines()) <= 10
    module, _, name = settings["trainer"]["loss"]["import_path"].rpartition(".")
    x, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    inputs = prime_rl_double.LossInputs(x, x, None, torch.ones(2), mask)
    out = getattr(sys.modules[module], name)(inputs, **settings["trainer"]["loss"]["kwargs"])
    assert float(out.loss) == -2.0
