"""Padded input (B, S): the packed call of the same rows, whatever stands in masked places and however tensors lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss, loss_denominator, selective_logprob
from mgrpo.ops import head
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import TOLERANCE, error, settings

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, H, V = 4, 6, 8, 37
CONFIGS = (
    settings("dapo", kl_coef=0.1, entropy_coef=0.02),
    settings("grpo", correction="geometric", correction_high=2.5),
    settings("gspo"),
    GrpoLossConfig(type="tests.own_losses:Pull", options={"spring": 0.3, "entropy": 0.05}),
)
PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "loss_mask", "target_ids", "token_weight")


def batch(seed: int = 0) -> dict[str, Any]:
    """Padded rows with gaps in the mask, one masked whole; -100 and log-probs of NaN where the mask is 0."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, S, generator=g) < 0.6
    mask[0] = True
    mask[2] = False
    hidden = torch.randn(B, S + 1, H, generator=g)
    weight = torch.randn(V, H, generator=g) * 0.5
    ids = torch.randint(V, (B, S), generator=g)
    logits = hidden[:, :-1] @ weight.t()
    now = logits.log_softmax(2).gather(2, ids[..., None])[..., 0]
    near = [now + 0.3 * torch.randn(B, S, generator=g) for _ in range(3)]
    return {
        "hidden": hidden,
        "weight": weight,
        "target_ids": torch.where(mask, ids, -100),
        "loss_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "seq_weight": torch.tensor([1.0, 0.5, 1.0, 0.25]),
        "token_weight": torch.rand(B, S, generator=g) * 2,
        "old_logprobs": torch.where(mask, near[0], torch.nan),
        "ref_logprobs": torch.where(mask, near[1], torch.nan),
        "rollout_logprobs": torch.where(mask, near[2], torch.nan),
    }


def run(data: dict[str, Any], config: GrpoLossConfig, op: Any = linear_grpo_loss, **more: Any) -> Any:
    """(loss, metrics, gradients of hidden and weight, of which the padded hidden's last column is left out)."""
    data = dict(data)
    padded = data["hidden"].dim() == 3
    leaves = [data.pop(k).clone().requires_grad_() for k in ("hidden", "weight")]
    rows = leaves[0][:, :-1] if padded else leaves[0]
    first = (rows, leaves[1]) if op is linear_grpo_loss else (rows @ leaves[1].t(),)
    loss, metrics, *_ = op(*first, data.pop("target_ids"), config=config, **data, **more)
    grads = torch.autograd.grad(loss * 0.5, leaves)
    return loss.detach(), metrics, grads[0][:, :-1] if padded else grads[0], grads[1]


def packed(data: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The rows `keep` (B, S) one behind the other."""
    out = dict(data)
    out["hidden"] = data["hidden"][:, :-1][keep]
    for name in PER_TOKEN:
        out[name] = data[name][keep]
    out["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return out


def check_padded(config: GrpoLossConfig, impl: str) -> None:
    """All B x S rows in packed form give the same bits, from hidden states and from logits; the rows under the mask
    alone give the same up to the order of sums."""
    data = batch()
    everywhere = torch.ones(B, S, dtype=torch.bool)
    for op in (linear_grpo_loss, grpo_loss):
        got = run(data, config, op, impl=impl)
        whole = run(packed(data, everywhere), config, op, impl=impl)
        assert torch.equal(got[0], whole[0]) and torch.equal(got[3], whole[3])
        assert torch.equal(got[2].flatten(0, 1), whole[2])
        assert all(torch.equal(got[1][k], whole[1][k]) for k in METRICS)
    inplace = run(data, config, grpo_loss, impl=impl, inplace=True)
    assert torch.equal(got[0], inplace[0]) and torch.equal(got[2], inplace[2])
    tight = run(packed(data, data["loss_mask"]), config, impl=impl)
    got = run(data, config, impl=impl)
    torch.testing.assert_close(got[0], tight[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2][data["loss_mask"]], tight[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[3], tight[3], rtol=1e-5, atol=1e-7)
    assert not got[2][~data["loss_mask"]].any()


def check_masked_rows(config: GrpoLossConfig, impl: str) -> None:
    """NaN hidden states in padding change no bit."""
    data = batch()
    outside = torch.cat([~data["loss_mask"], torch.ones(B, 1, dtype=torch.bool)], 1)
    dirty = {**data, "hidden": torch.where(outside[..., None], torch.nan, data["hidden"])}
    for a, b in zip(run(data, config, impl=impl)[2:], run(dirty, config, impl=impl)[2:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_padded_is_packed(config: GrpoLossConfig, impl: str) -> None:
    """Bit for bit, with gaps in the mask, -100 in it, and log-probs of NaN; what stands in masked rows is not read."""
    check_padded(config, impl)
    check_masked_rows(config, impl)


def test_masked_rows_of_hidden_states_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slice of hidden states, which is no block of memory, only the rows that act are copied."""
    gathered, rows = [], head._rows

    def counted(hidden: torch.Tensor, piece: torch.Tensor | slice) -> torch.Tensor:
        assert isinstance(piece, torch.Tensor)
        gathered.append(piece.numel())
        return rows(hidden, piece)

    monkeypatch.setattr(head, "_rows", counted)
    data = batch()
    run(data, settings("dapo"))
    assert gathered == [int(data["loss_mask"][:3].sum())] != [B * S]  # the last row's advantage is 0


def test_advantages_of_sequences_and_of_tokens() -> None:
    """(B,), the same spread over (B, S), and token_advantages are one call; rewards with int64 groups too."""
    data = batch()
    one = run(data, CONFIGS[0])
    spread = data["advantages"][:, None].expand(B, S)
    other = {k: v for k, v in data.items() if k != "advantages"}
    for more in ({"advantages": spread}, {"token_advantages": spread}):
        for a, b in zip(one[2:], run({**other, **more}, CONFIGS[0])[2:], strict=True):
            assert torch.equal(a, b)
    groups = {"rewards": torch.tensor([1.0, 0.0, 2.0, 5.0])}
    ids = torch.tensor([7, 7, 2**40, 2**40])
    wide = run({**other, **groups, "group_id": ids}, CONFIGS[0])
    narrow = run({**other, **groups, "group_id": torch.tensor([0, 0, 1, 1], dtype=torch.int32)}, CONFIGS[0])
    assert torch.equal(wide[2], narrow[2]) and wide[2].any()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_tensors_lie_as_they_like(impl: str) -> None:
    """Transposed, strided and expanded inputs give the bits of contiguous ones."""
    data = batch()
    data["token_weight"] = data["token_weight"][:, :1].expand(B, S)
    for config in CONFIGS:
        want = run(data, config, impl=impl)
        strange: dict[str, Any] = {}
        for name, x in data.items():
            if name in ("hidden", "weight") or x.dim() != 2:
                strange[name] = x
            else:
                strange[name] = x.t().contiguous().t()
        strange["seq_weight"] = torch.stack([data["seq_weight"]] * 2, 1)[:, 0]
        got = run(strange, config, impl=impl)
        assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
        leaf = data["hidden"][:, :-1].transpose(0, 1).contiguous().requires_grad_()
        rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
        loss, _ = linear_grpo_loss(
            leaf.transpose(0, 1), data["weight"], data["target_ids"], config=config, impl=impl, **rest
        )
        (grad,) = torch.autograd.grad(loss * 0.5, leaf)
        assert torch.equal(grad.transpose(0, 1), want[2])
    one = {k: v for k, v in packed(data, data["loss_mask"]).items() if k not in ("hidden", "weight")}
    ids, hidden = one.pop("target_ids"), data["hidden"][:, :-1][data["loss_mask"]]
    plain, _ = linear_grpo_loss(hidden, data["weight"], ids, config=CONFIGS[0], impl=impl, **one)
    twice = {k: torch.stack([x, x], 1)[:, 0] for k, x in one.items()}
    spaced = torch.stack([ids, ids], 1)[:, 0]
    loss, _ = linear_grpo_loss(hidden, data["weight"], spaced, config=CONFIGS[0], impl=impl, **twice)
    assert torch.equal(loss, plain)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_log_probs_of_padded_rows(impl: str) -> None:
    """selective_logprob of (B, S, H): those of the packed rows to the bit, 0 where the mask is 0."""
    data = batch()
    mask, hidden = data["loss_mask"], data["hidden"][:, :-1]
    for got, want in zip(
        selective_logprob(hidden, data["weight"], data["target_ids"], loss_mask=mask, chunk=5, impl=impl),
        selective_logprob(hidden[mask], data["weight"], data["target_ids"][mask], chunk=5, impl=impl),
        strict=True,
    ):
        assert got.shape == (B, S) and not got[~mask].any()
        torch.testing.assert_close(got[mask], want, rtol=1e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"^target_ids: -100 at \[1, \d\] is outside \[0, 37\) and stands where"
    ):
        selective_logprob(hidden, data["weight"], data["target_ids"], impl=impl)


def test_float64_of_padded_rows_is_the_definition() -> None:
    """The padded call written out in float64: sums over the mask of each row, weights and denominator by hand."""
    data = batch()
    double = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    h, w, ids = double["hidden"][:, :-1], double["weight"], double["target_ids"].clamp(min=0)
    mask = data["loss_mask"]
    logp = (h @ w.t()).log_softmax(2).gather(2, ids[..., None])[..., 0]
    ratio = torch.where(mask, logp - double["old_logprobs"], 0.0).exp()
    a = double["advantages"][:, None]
    term = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * double["token_weight"]
    mean = torch.where(mask, term, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    exact = (double["seq_weight"] * mean).sum() / double["seq_weight"].sum()
    config = settings("grpo")
    found, _, grad, _ = run(double, config, impl="reference")
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    fast = run(data, config, impl="cpu")
    assert abs(float(fast[0] - exact)) < 1e-6 and error(fast[2], grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rows_of_no_tokens_and_no_rows(impl: str) -> None:
    """Loss and gradients of 0, values of the call's shape."""
    for b, s in ((0, 4), (3, 0), (0, 0)):
        for config in (settings("dapo"), settings("gspo")):
            leaves = [torch.randn(b, s, H, requires_grad=True), torch.randn(V, H, requires_grad=True)]
            ids = torch.zeros(b, s, dtype=torch.int64)
            loss, _, values = linear_grpo_loss(
                *leaves, ids, config=config, impl=impl, tokens=True, advantages=torch.ones(b)
            )
            grads = torch.autograd.grad(loss, leaves)
            assert float(loss.detach()) == 0 and not grads[1].any() and grads[0].shape == (b, s, H)
            assert all(x.shape == (b, s) for x in values)
            assert selective_logprob(leaves[0], leaves[1], ids, impl=impl)[0].shape == (b, s)


def test_the_denominator_of_padded_rows() -> None:
    """loss_denominator takes the padded mask alone, and micro-batches of it add up."""
    data = batch()
    for config in (settings("dapo"), settings("grpo"), settings("dr_grpo")):
        given = {k: data[k] for k in ("loss_mask", "seq_weight")}
        whole = loss_denominator(config, **given)
        flat = packed(data, torch.ones(B, S, dtype=torch.bool))
        assert torch.equal(whole, loss_denominator(config, **{k: flat[k] for k in (*given, "cu_seqlens")}))
        parts = [loss_denominator(config, **{k: v[i : i + 2] for k, v in given.items()}) for i in (0, 2)]
        torch.testing.assert_close(sum(parts), whole)
    with pytest.raises(TypeError, match=r"^cu_seqlens: missing"):
        loss_denominator(settings("dapo"), loss_mask=torch.ones(3))


def test_compiled_padded_rows() -> None:
    """One graph, the eager result, for one phase and two."""
    for config in CONFIGS[1:3]:
        torch._dynamo.reset()
        data = batch()
        leaves = [data.pop(k).requires_grad_() for k in ("hidden", "weight")]

        def step(h: torch.Tensor, w: torch.Tensor, rest: dict[str, Any], c: GrpoLossConfig) -> Any:
            ids = rest.pop("target_ids")
            loss, metrics, values = linear_grpo_loss(
                h[:, :-1], w, ids, config=c, impl="cpu", tokens=True, **rest
            )
            return loss, metrics, tuple(values)

        results = []
        for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            loss, metrics, values = call(*leaves, dict(data), config)
            grads = torch.autograd.grad(loss * 0.5, leaves)
            results.append((loss.detach(), metrics["entropy_all"], *values, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("cu_seqlens: given with padded", {"cu_seqlens": torch.tensor([0, 24])}),
        (r"target_ids: shape \(4, 5\)", {"target_ids": torch.zeros(4, 5, dtype=torch.int64)}),
        (r"loss_mask: shape \(24,\) where \(4, 6\)", {"loss_mask": torch.ones(24)}),
        (r"old_logprobs: shape \(24,\) where \(4, 6\)", {"old_logprobs": torch.zeros(24)}),
        (r"token_weight: shape \(4,\) where \(4, 6\)", {"token_weight": torch.ones(4)}),
        (r"advantages: shape \(24,\) where \(4,\) or \(4, 6\)", {"advantages": torch.zeros(24)}),
        (r"seq_weight: shape \(4, 6\) where \(4\)", {"seq_weight": torch.ones(4, 6)}),
        (r"target_ids: -100 at \[2, 0\]", {"loss_mask": None}),
        (r"target_ids: -1 at \[0, 0\] is outside", {"target_ids": torch.full((4, 6), -1)}),
    ],
)
def test_bad_shapes_name_the_argument(message: str, change: dict[str, Any]) -> None:
    """Before anything is computed, with the shape that is needed."""
    data = {**batch(), **change}
    if "loss_mask" in change and change["loss_mask"] is None:
        data["target_ids"] = torch.zeros(B, S, dtype=torch.int64)
        data["target_ids"][2, 0] = -100
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        run(data, CONFIGS[0])
