"""Routing replay: what is forced is chosen, forward and in what is recomputed; the trainer's own choice changes no bit;
another one has the gradient of a reference that never ranks anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from mgrpo.model.routing_replay import listen
from mgrpo.trainers.batch import MicroBatch
from mgrpo.trainers.torch.learner import Learner
from tests.families import family
from tests.models import tiny_model, tiny_tokenizer
from tests.moe_ranks import AUX, CUTS, cut, moe_policy, step
from tests.rows import ROWS, routed, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

E, K = 8, 2
_LOCAL: dict[str, Any] = {"num_local_experts": E, "num_experts_per_tok": K}
_SIZES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": E, "num_experts_per_tok": K},
    "Olmoe": {"num_experts": E, "num_experts_per_tok": K},
    "Mixtral": _LOCAL,
    "GptOss": _LOCAL,
    "DeepseekV3": {"n_routed_experts": E, "num_experts_per_tok": K, "n_group": 2, "topk_group": 1},
}
ATTENTIONS = ["rows", "sdpa", "varlen"]


def policy_of(name: str, **settings: Any) -> Policy:
    config = PolicyConfig(**{"routing_replay": True, **settings})
    return Policy(family(name, **_SIZES[name], initializer_range=0.2), tiny_tokenizer(), name.lower(), config)


@contextmanager
def choices(policy: Policy) -> Iterator[list[tuple[int, Tensor]]]:
    """(router, sorted choice) of every run of a router inside the block, recomputations included."""
    seen: list[tuple[int, Tensor]] = []
    hooks = listen(
        policy.routing.routers, lambda number, out: seen.append((number, out[1].detach().sort(-1).values))
    )
    yield seen
    for hook in hooks:
        hook.remove()


def random_experts(rows: MicroBatch, routers: int, unknown: float = 0.3) -> Tensor:
    """i16 (R, S, N, k), distinct experts a token, some tokens not known."""
    experts = routed(rows, routers, E, K, unknown).experts
    assert experts is not None
    return experts


def own_experts(policy: Policy, rows: MicroBatch) -> Tensor:
    """What the policy's routers choose themselves, row after row."""
    out = torch.full((*rows.ids.shape, len(policy.routing.routers), K), -1, dtype=torch.int16)
    for r in range(ROWS):
        n = int(rows.lengths[r])

        def note(number: int, found: tuple[Tensor, Tensor], r: int = r, n: int = n) -> None:
            out[r, :n, number] = found[1].to(torch.int16)

        hooks = listen(policy.routing.routers, note)
        with torch.no_grad():
            policy.hidden(rows.ids[r : r + 1, :n])
        for hook in hooks:
            hook.remove()
    return out


def entering(rows: MicroBatch, experts: Tensor, attention: str) -> Tensor:
    """experts (T, N, k) as a forward pass over the rows sees its tokens."""
    if attention == "varlen":
        return experts[torch.arange(rows.ids.shape[1]) < (rows.lengths - 1)[:, None]]
    return experts[:, : rows.ids.shape[1] - 1].flatten(0, 1)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in _SIZES for kind in ATTENTIONS if (name, kind) != ("GptOss", "varlen")],
)
def test_what_is_known_is_chosen(name: str, attention: str) -> None:
    """In the forward pass and in the recomputation of each layer, whose tokens are padded or packed."""
    policy = policy_of(name, attention=attention, gradient_checkpointing=True)
    routers = len(policy.routing.routers)
    rows = rows_of(4, near=True)
    rows = replace(rows, experts=random_experts(rows, routers), advantages=torch.ones(ROWS))
    with choices(policy) as seen:
        step(policy, cut(rows, CUTS[0]))
    assert [number for number, _ in seen] == [*range(routers), *reversed(range(routers))]
    assert rows.experts is not None
    wanted = entering(rows, rows.experts, attention).sort(-1).values.long()
    for number, chosen in seen:
        known = wanted[:, number, 0] >= 0
        assert known.any() and not known.all()
        assert torch.equal(chosen[known], wanted[known, number])
    for number in range(routers):
        first, again = (chosen for n, chosen in seen if n == number)
        assert torch.equal(first, again)
    with choices(policy) as free:
        step(policy, cut(replace(rows, experts=None), CUTS[0]))
    assert not torch.equal(free[0][1], seen[0][1])


@pytest.mark.parametrize("name", _SIZES)
def test_the_own_choice_changes_no_bit(name: str) -> None:
    """Loss and gradient in float32, with and without recomputed layers, in several micro-batches; nothing is said to be
    rerouted."""
    rows = rows_of(5, near=True)
    for again in (False, True):
        settings = {"attention": "sdpa", "gradient_checkpointing": again, "share_prefixes": False}
        free = step(policy_of(name, routing_replay=False, **settings), cut(rows, CUTS[1]))
        policy = policy_of(name, **settings)
        with choices(policy) as seen:
            unforced = step(policy, cut(rows, CUTS[1]))
        experts, routers = [], len(policy.routing.routers)
        # The order in which a router ranks experts matters for the last bit: recorded from the same shapes.
        batch = cut(rows, CUTS[1])
        for part in batch.micro:
            active = part.rows(part.with_advantage())
            found: dict[int, Tensor] = {}
            hooks = listen(policy.routing.routers, lambda n, out, found=found: found.update({n: out[1]}))
            with torch.no_grad():
                policy.hidden_before(active.ids, active.lengths, active.active().mask)
            for hook in hooks:
                hook.remove()
            chosen = torch.stack([found[n] for n in range(routers)], 1).to(torch.int16)
            whole = torch.full((*part.ids.shape, routers, K), -1, dtype=torch.int16)
            width = active.ids.shape[1]
            whole[part.with_advantage(), : width - 1] = chosen.view(-1, width - 1, routers, K)
            part.experts = whole
            experts.append(whole)
        forced = step(policy, batch)
        for key in free[0]:
            assert forced[0][key] == free[0][key] == unforced[0][key], key
        assert all(torch.equal(a, b) for a, b in zip(forced[1], free[1], strict=True))
        assert forced[0]["moe/replayed"] == 1.0 and forced[0]["moe/rerouted"] == 0.0
        assert unforced[0]["moe/replayed"] == 0.0 and "moe/replayed" not in free[0]
        assert len(seen) and all((part >= 0).any() for part in experts)


def masked_reference(experts: Tensor) -> Policy:
    """The same policy in float64 whose routers rank nothing: the logits of what is not in `experts` are -inf."""
    policy = moe_policy(PolicyConfig(experts="eager", share_prefixes=False))
    policy.model.double()
    policy._dtype = torch.float64
    inputs = experts[:, :-1].flatten(0, 1)
    for number, router in enumerate(policy.routing.routers):
        module: Any = router.module

        def forward(hidden: Tensor, number: int = number, module: Any = module) -> tuple[Tensor, ...]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, module.hidden_dim), module.weight)
            wanted = inputs[:, number].long()
            inside = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, wanted.clamp(min=0), True)
            free = (wanted < 0).any(-1, keepdim=True)
            probabilities = logits.softmax(-1)
            kept = probabilities.masked_fill(~(inside | free), 0.0)
            values, indices = kept.topk(K, -1)
            if module.norm_topk_prob:
                values = values / values.sum(-1, keepdim=True)
            return logits, values, indices

        module.forward = forward
    return policy


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("again", [False, True])
def test_another_choice_has_the_reference_gradient(attention: str, again: bool) -> None:
    """That of float64 with the probabilities of other experts masked, routers' own weights included; the aux loss
    counts the forced choice."""
    rows = rows_of(6, near=True)
    routers = 2
    experts = random_experts(rows, routers)
    for aux in (0.0, AUX):
        config = PolicyConfig(
            attention=attention,
            gradient_checkpointing=again,
            routing_replay=True,
            aux_loss_coef=aux,
        )
        policy = moe_policy(config)
        found = step(policy, cut(replace(rows, experts=experts), CUTS[1]))
        free = step(policy, cut(rows, CUTS[1]))
        active = replace(rows, experts=experts).rows(rows.with_advantage())
        assert active.experts is not None
        reference = masked_reference(active.experts)
        reference.config = PolicyConfig(aux_loss_coef=aux)
        reference.attention = "sdpa"
        expected = step(reference, cut(rows, CUTS[0]))
        scale = max(float(g.abs().max()) for g in expected[1])
        off = [float((a - b).abs().max()) for a, b in zip(found[1], expected[1], strict=True)]
        assert scale > 1e-3 and max(off) < 2e-5 * scale
        other = [float((a - b).abs().max()) for a, b in zip(free[1], expected[1], strict=True)]
        assert max(other) > 1e-2 * scale
        names = [n for n, _ in policy.model.named_parameters()]
        gates = [g for n, g in zip(names, found[1], strict=True) if n.endswith("gate.weight")]
        assert len(gates) == routers and all(g.abs().max() > 0 for g in gates)
        for name in ("load_imbalance", "dead_experts", "aux_loss"):
            assert found[0][f"moe/{name}"] == pytest.approx(expected[0][f"moe/{name}"], rel=1e-4, abs=1e-9)


def test_metrics_count_what_was_forced_and_what_moved() -> None:
    """Of the tokens that enter the model, on a policy whose own choice is known: half of them keep it, a quarter is
    sent elsewhere, the rest is not known."""
    policy = moe_policy(PolicyConfig(routing_replay=True))
    rows = replace(rows_of(7, near=True), advantages=torch.ones(ROWS))
    # The last router alone moves tokens, so that what follows it is as it was.
    experts = own_experts(policy, rows)
    place = torch.arange(rows.ids.shape[1]).expand(rows.ids.shape)
    real = place < (rows.lengths - 1)[:, None]
    experts[place % 4 == 3] = -1
    moved = (place % 4 == 2) & real
    last = experts[:, :, -1].long()
    away = torch.stack([(last[..., 0] + 1) % E, (last[..., 0] + 2) % E], -1)
    experts[:, :, -1] = torch.where(moved[..., None], away, last).to(torch.int16)
    found = step(policy, cut(replace(rows, experts=experts), CUTS[2]))[0]
    known = int((real & (place % 4 != 3)).sum())
    assert found["moe/replayed"] == pytest.approx(known / int(real.sum()))
    assert found["moe/rerouted"] == pytest.approx(int(moved.sum()) / (2 * known))


def test_the_reference_between_forward_and_backward_routes_freely() -> None:
    """It may be the policy's own modules without their adapters; what is computed again behind it is forced again."""
    config = PolicyConfig(
        routing_replay=True, gradient_checkpointing=True, lora=LoraConfig(rank=2, targets=("o_proj",))
    )
    policy = moe_policy(config)
    rows = replace(rows_of(4, near=True), advantages=torch.ones(ROWS))
    rows = replace(rows, experts=random_experts(rows, 2, unknown=0.0))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    learner = Learner(policy, optimizer, GrpoLossConfig(kl_coef=0.1), 1.0, policy.base())
    with choices(policy) as seen:
        learner.train([cut(rows, CUTS[0])], recompute_old=False)
    assert [number for number, _ in seen] == [0, 1, 0, 1, 1, 0]
    assert rows.experts is not None
    wanted = entering(rows, rows.experts, "sdpa").sort(-1).values.long()
    forced, free, again = seen[:2], seen[2:4], seen[:3:-1]
    for (number, first), (_, reference), (_, second) in zip(forced, free, again, strict=True):
        known = wanted[:, number, 0] >= 0
        assert torch.equal(first[known], wanted[known, number]) and torch.equal(first, second)
        assert not torch.equal(reference[known], wanted[known, number])


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_half_precision_is_forced_too(name: str) -> None:
    """Whatever a router's own precision is there."""
    policy = policy_of(name, dtype="bfloat16", attention="sdpa", gradient_checkpointing=True)
    rows = replace(rows_of(4, near=True), advantages=torch.ones(ROWS))
    rows = replace(rows, experts=random_experts(rows, 2))
    with choices(policy) as seen:
        step(policy, cut(rows, CUTS[0]))
    assert rows.experts is not None
    wanted = entering(rows, rows.experts, "sdpa").sort(-1).values.long()
    assert len(seen) == 4
    for number, chosen in seen:
        known = wanted[:, number, 0] >= 0
        assert torch.equal(chosen[known], wanted[known, number])


def test_old_logprobs_are_recomputed_with_the_same_choice() -> None:
    """A first optimizer step has ratio 1 then, in a policy that samples with other choices than it would make."""
    policy = moe_policy(PolicyConfig(routing_replay=True))
    rows = replace(rows_of(8, near=True))
    rows = replace(rows, experts=random_experts(rows, 2))
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.0), GrpoLossConfig(), 1.0)
    batch = cut(rows, CUTS[1])
    found = learner.train([batch], recompute_old=True)
    assert found["policy/is_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found["policy/is_ratio_min"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (
            torch.zeros(ROWS, 12, 3, K),
            r"moe: the engine reports 2 experts of each of 3 routers, .* 2 routers",
        ),
        (torch.zeros(ROWS, 12, 2, 3), r"moe: the engine reports 3 experts of each of 2 routers"),
        (torch.full((ROWS, 12, 2, K), E), r"moe: the engine reports expert 8, the policy's are 0\.\.7"),
    ],
)
def test_a_report_of_another_model_is_refused(experts: Tensor, message: str) -> None:
    """By what it has and what the policy has."""
    rows = replace(rows_of(8, near=True), experts=experts.to(torch.int16))
    with pytest.raises(ValueError, match=message):
        step(moe_policy(PolicyConfig(routing_replay=True)), cut(rows, CUTS[0]))


def test_what_cannot_be_replayed_is_refused() -> None:
    """A dense model, and a router that ranks without topk()."""
    on = PolicyConfig(routing_replay=True)
    with pytest.raises(ConfigError, match=r"tiny: policy\.routing_replay=true needs a mixture .*Llama"):
        Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", on)
    model = family("Qwen3Moe", num_experts=E, num_experts_per_tok=K)
    kind = type(model.model.layers[0].mlp.gate)

    def by_sorting(self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        values, indices = logits.softmax(-1).sort(-1, descending=True)
        return logits, values[:, :K], indices[:, :K]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", by_sorting)
        with pytest.raises(
            ConfigError, match=r"cannot force the choice of .*gate .*none of its calls of topk"
        ):
            Policy(model, tiny_tokenizer(), "sorts", on)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_weights_that_groups_have_masked_are_refused(method: str) -> None:
    """DeepSeek-V2 weights by scores that are 0 outside of its own groups: another's expert would count nothing."""
    groups = {"n_group": 2, "topk_group": 1, "topk_method": method}
    model = family("DeepseekV2", n_routed_experts=E, num_experts=E, num_experts_per_tok=K, **groups)
    on = PolicyConfig(routing_replay=True)
    if method == "greedy":
        assert Policy(model, tiny_tokenizer(), "v2", on).routing.replay is not None
        return
    with pytest.raises(ConfigError, match=r"v2: .*cannot force the choice of .*masked outside of the groups"):
        Policy(model, tiny_tokenizer(), "v2", on)


def test_shared_prefixes_say_why_not() -> None:
    """A token in common may have been sent to other experts in each rollout."""
    policy = moe_policy(PolicyConfig(routing_replay=True, share_prefixes=True))
    assert not policy.shares and "routing_replay" in (policy.why_not or "")


def test_parts_of_rows_keep_their_experts() -> None:
    """MicroBatch.rows cuts them with everything else."""
    rows = rows_of(2)
    rows = replace(rows, experts=random_experts(rows, 2))
    keep = torch.tensor([i % 3 == 0 for i in range(ROWS)])
    part = rows.rows(keep)
    assert part.experts is not None and rows.experts is not None
    assert torch.equal(part.experts, rows.experts[keep, : part.ids.shape[1]])
