"""linear_grpo_loss and selective_logprob: the head against float64, rows left out, the two-phase path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgrpo import linear_grpo_loss, selective_logprob
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops import head
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import TOLERANCE, configs, error, head_batch, rms_error, run_head, run_logits, settings


def name(config: GrpoLossConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in config.model_dump(exclude_defaults=True).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", configs(), ids=name)
def test_the_gradients_are_the_float64_references(config: GrpoLossConfig, dtype: torch.dtype) -> None:
    """d hidden and d weight through chunks of 5 rows, one-phase and two-phase, with and without old log-probs.

    bf16: the root mean square error is at most 1.2 times that of torch's own bf16 head, which rounds its logits, and
    no entry is off by more than a few roundings.
    """
    data = head_batch(517, 24, dtype)
    for old in (True, False):
        if not old:
            data = {k: v for k, v in data.items() if k != "old_logprobs"}
        exact = run_head(data, config, torch.float64, "reference")
        torchs = run_head(data, config, dtype, "reference")
        got = run_head(data, config, dtype, "cpu", chunk=5)
        for mine, theirs, true in zip(got[2:], torchs[2:], exact[2:], strict=True):
            if dtype == torch.float32:
                assert error(mine, true) <= max(1.2 * error(theirs, true), TOLERANCE[dtype])
            else:
                assert rms_error(mine, true) <= 1.2 * rms_error(theirs, true)
                assert error(mine, true) <= TOLERANCE[dtype]
        if dtype == torch.float32:
            for key in METRICS:
                torch.testing.assert_close(got[1][key].double(), exact[1][key].double(), rtol=1e-4, atol=1e-5)


def test_the_chunk_does_not_matter() -> None:
    """Any chunk gives the same loss and gradients up to the order of float32 sums."""
    data = head_batch(517, 24, torch.float32)
    for config in (settings("dapo", kl_coef=0.1), settings("gspo")):
        whole = run_head(data, config, torch.float32, "cpu", chunk=4096)
        for chunk in (1, 7, 19):
            part = run_head(data, config, torch.float32, "cpu", chunk=chunk)
            torch.testing.assert_close(part[0], whole[0], rtol=1e-5, atol=1e-7)
            assert error(part[2], whole[2]) < 2e-6 and error(part[3], whole[3]) < 2e-6


def test_the_default_chunk_suits_device_and_vocabulary() -> None:
    """On the CPU up to 32 MiB of logits, within 128 and 2048 rows; elsewhere what fits 4 GiB with the gradient, 4096 at
    most; a given chunk is taken as it is."""

    def rows(vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
        hidden = torch.empty(1, 1, dtype=dtype, device=device)
        return head.chunk_rows(None, hidden, torch.empty(vocabulary, 1, device=device))

    assert [rows(v) for v in (100, 12288, 49152, 151936)] == [2048, 672, 160, 128]
    assert rows(49152, torch.bfloat16) == 160  # of float32 logits
    assert [rows(v, torch.bfloat16, "meta") for v in (49152, 151936, 262144)] == [4096, 4096, 2688]
    assert [rows(v, device="meta") for v in (49152, 262144)] == [4096, 4096]
    assert head.chunk_rows(7, torch.empty(1, 1), torch.empty(49152, 1)) == 7


ROOT = Path(__file__).parent.parent
MEASURE = """
import ctypes, sys
from pathlib import Path
import torch
from mgrpo import GrpoLossConfig, linear_grpo_loss
torch.set_num_threads(1)
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024
rows, width, vocabulary, chunk = 256, 256, 40960, 32
leaves = [torch.randn(rows, width), torch.randn(vocabulary, width)]
leaves = [x.requires_grad_() for x in leaves]
call = {
    "target_ids": torch.zeros(rows, dtype=torch.int64), "cu_seqlens": torch.tensor([0, rows], dtype=torch.int32),
    "advantages": torch.ones(1), "config": GrpoLossConfig(type=sys.argv[1]), "chunk": chunk,
}
for _ in range(2):  # the second call is measured: libraries are loaded and have their buffers
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = status("VmRSS")
    loss, _ = linear_grpo_loss(*leaves, **call)
    grads = torch.autograd.grad(loss, leaves)
    above = status("VmHWM") - base - sum(g.nbytes for g in grads) / 2**20
    del loss, grads
print(above)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no high-water mark to reset here"
)
@pytest.mark.parametrize("kind", ["grpo", "gspo", "tests.own_losses:OwnGrpo"])
def test_memory_above_the_gradients_is_the_chunk(kind: str) -> None:
    """A call's peak is its two gradients (40.25 MiB), a chunk of logits (5 MiB) and small change: no second d
    weight, no [T, V] (40 MiB each). In one phase, in two, and for a loss of one's own."""
    command = [sys.executable, "-c", MEASURE, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
    assert 0.0 < float(done.stdout) < 12.0, done.stdout


def test_dead_rows_never_reach_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked rows and rows of advantage 0 are not in the first product, clipped rows not in the other two; the gradient
    is the one that computes them all."""
    data = head_batch(517, 24, torch.float32)
    seen: list[int] = []
    chunks, drop = head._chunks, head._drop

    def counted(*args: object) -> object:
        for at, h, z in chunks(*args):
            seen.append(at.stop - at.start)
            yield at, h, z

    def dropped(*args: torch.Tensor) -> object:
        out = drop(*args)
        seen.append(out[0].shape[0])
        return out

    monkeypatch.setattr(head, "_chunks", counted)
    monkeypatch.setattr(head, "_drop", dropped)
    got = run_head(data, settings("dapo"), torch.float32, "cpu")
    # 10 grid rows + 1 single + 3 with -inf; of the 10, A > 0 clips 1.5 and 3, A < 0 clips 0.7.
    assert seen == [14, 11]
    exact = run_head(data, settings("dapo"), torch.float64, "reference")
    assert error(got[2], exact[2]) <= TOLERANCE[torch.float32] >= error(got[3], exact[3])


def test_only_the_gradients_that_are_needed() -> None:
    """A frozen head or frozen hidden states get no gradient, and the other's is unchanged; no_grad computes
    none."""
    data = head_batch(129, 24, torch.float32)
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight")}
    full = run_head(data, settings("grpo"), torch.float32, "cpu")
    for needs in ((True, False), (False, True)):
        leaves = [data[k].float().requires_grad_(n) for k, n in zip(("hidden", "weight"), needs, strict=True)]
        loss, _ = linear_grpo_loss(*leaves, config=settings("grpo"), **rest)
        (loss * 0.5).backward()
        for leaf, need, grad in zip(leaves, needs, full[2:], strict=True):
            assert (leaf.grad is not None) == need and (not need or torch.equal(leaf.grad, grad))
    with torch.no_grad():
        loss, _ = linear_grpo_loss(*leaves, config=settings("grpo"), **rest)
    assert not loss.requires_grad


def test_a_nan_hidden_state_spoils_no_gradient() -> None:
    """Its row is counted; d hidden of it is 0 and d weight is what the other rows make."""
    data = head_batch(129, 24, torch.float32)
    for config in (settings("dapo"), settings("gspo"), settings("dapo", kl_coef=0.1)):
        dirty = data | {"hidden": data["hidden"].clone()}
        dirty["hidden"][3, 0] = float("nan")
        _, metrics, dh, dw = run_head(dirty, config, torch.float32, "cpu")
        assert int(metrics["nonfinite_rows"]) == 1
        assert bool(dh.isfinite().all()) and bool(dw.isfinite().all()) and not dh[3].any()


def test_the_gradient_is_spent_only_by_scaling() -> None:
    """An upstream gradient of 1 can be repeated; after another one a second backward is an error, not a wrong
    number."""
    data = head_batch(33, 8, torch.float32)
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight")}
    leaves = [data[k].float().requires_grad_() for k in ("hidden", "weight")]
    loss, _ = linear_grpo_loss(*leaves, config=settings("grpo"), **rest)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert torch.equal(once[1], twice[1])
    torch.autograd.grad(loss * 2, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selective_logprob_is_the_float64_log_softmax(dtype: torch.dtype) -> None:
    """Log-probs and entropies at two temperatures, chunked; bf16 within what rounding its logits costs torch."""
    data = head_batch(517, 24, dtype)
    h, w, ids = data["hidden"], data["weight"], data["target_ids"]
    for temperature in (0.6, 1.3):
        z = (h @ w.t() / temperature).log_softmax(1)
        exact = z.gather(1, ids[:, None]).squeeze(1), -(z.exp() * z).sum(1)
        theirs = selective_logprob(h.to(dtype), w.to(dtype), ids, temperature=temperature, impl="reference")
        mine = selective_logprob(h.to(dtype), w.to(dtype), ids, temperature=temperature, chunk=4)
        for a, b, c in zip(mine, theirs, exact, strict=True):
            assert a.dtype == torch.float32 and error(a, c) <= max(1.2 * error(b, c), 1e-6)


def test_the_head_equals_the_loss_from_logits() -> None:
    """linear_grpo_loss and grpo_loss of the same logits agree in loss and metrics."""
    data = head_batch(129, 24, torch.float32)
    logits = (data["hidden"] @ data["weight"].t()).float()
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight")} | {"logits": logits}
    a = run_logits(rest, settings("dapo"), torch.float32, "cpu")
    b = run_head(data, settings("dapo"), torch.float32, "cpu")
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
    for key in METRICS:
        torch.testing.assert_close(a[1][key], b[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden", {"hidden": torch.zeros(8)}),
        ("weight", {"weight": torch.zeros(33, 9)}),
        ("weight", {"weight": torch.zeros(33, 8, dtype=torch.float64)}),
        ("target_ids", {"target_ids": torch.full((19,), 33)}),
        ("chunk", {"chunk": 0}),
        ("rewards", {"rewards": torch.zeros(6)}),
    ],
)
def test_bad_input_names_the_argument(argument: str, change: dict[str, object]) -> None:
    """ValueError or TypeError whose message begins with the argument's name."""
    call: dict[str, object] = {"config": settings("grpo"), **head_batch(33, 8, torch.float32)}
    call |= {"hidden": torch.zeros(19, 8), "weight": torch.zeros(33, 8)} | change
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        linear_grpo_loss(call.pop("hidden"), call.pop("weight"), call.pop("target_ids"), **call)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_a_float32_master_beside_half_precision(kind: str, half: torch.dtype) -> None:
    """The products are those of the rounded weight to the bit, the master's gradient is not rounded once more."""
    data = head_batch(517, 24, torch.float64)
    ids, rest = (
        data["target_ids"],
        {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")},
    )
    grads = []
    for dtype in (torch.float32, half):
        leaves = [data["hidden"].to(half).requires_grad_(), data["weight"].float().to(dtype).requires_grad_()]
        loss, _ = linear_grpo_loss(*leaves, ids, config=settings(kind), chunk=5, **rest)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, dh, dw), (other, dh_other, dw_other) = grads
    assert (dh.dtype, dw.dtype, dw_other.dtype) == (half, torch.float32, half)
    assert torch.equal(loss, other) and torch.equal(dh, dh_other) and torch.equal(dw.to(half), dw_other)
    if half == torch.bfloat16:  # of float16 a CPU has torch's own head alone
        assert not torch.equal(dw, dw_other.float())
    found = selective_logprob(data["hidden"].to(half), data["weight"].float(), ids)[0]
    assert torch.equal(found, selective_logprob(data["hidden"].to(half), data["weight"].to(half), ids)[0])


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("wide", "narrow"), [(F32, BF16), (F32, F16), (F64, F32), (F64, BF16)], ids=str)
@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_a_weight_narrower_than_the_hidden_states(kind: str, wide: torch.dtype, narrow: torch.dtype) -> None:
    """It is converted, exactly: loss, d hidden and log-probs are those of the converted weight to the bit, d weight is
    that one's rounded to the weight's own dtype. In every backend."""
    data = head_batch(129, 24, torch.float32)
    ids = data["target_ids"]
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
    for impl in ("reference", "cpu") if wide == F32 else ("reference",):
        results = []
        for dtype in (narrow, wide):
            leaves = [
                data["hidden"].to(wide).requires_grad_(),
                data["weight"].to(narrow).to(dtype).requires_grad_(),
            ]
            loss, _ = linear_grpo_loss(*leaves, ids, config=settings(kind), impl=impl, **rest)
            grads = torch.autograd.grad(loss * 0.5, leaves)
            logprobs = selective_logprob(*(x.detach() for x in leaves), ids, impl=impl)
            results.append((loss.detach(), *logprobs, *grads))
        for mixed, same in zip(*results, strict=True):
            assert torch.equal(mixed, same.to(mixed.dtype))
        assert (results[0][3].dtype, results[0][4].dtype) == (wide, narrow)


@pytest.mark.parametrize(("hidden", "weight"), [(BF16, F16), (F16, BF16), (F32, F64), (BF16, F64)], ids=str)
def test_dtypes_that_would_lose_values_are_refused(hidden: torch.dtype, weight: torch.dtype) -> None:
    """By both names, in both ops."""
    h, w, ids = torch.zeros(2, 4, dtype=hidden), torch.zeros(5, 4, dtype=weight), torch.zeros(2).long()
    message = rf"^weight: dtype {weight} beside hidden's, {hidden}, which does not hold its values"
    with pytest.raises(TypeError, match=message):
        selective_logprob(h, w, ids)
    with pytest.raises(TypeError, match=message):
        linear_grpo_loss(h, w, ids, config=settings("grpo"), advantages=torch.ones(2))


def test_log_probs_of_half_precision_operands_are_within_the_budget() -> None:
    """docs/kernels.md, error budget: on a real head's sizes what a bf16 head adds is the rounding of hidden states and
    weight; its sums add less than a tenth of that, where torch's bf16 logits add half as much again."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 1024, generator=g)
    weight = torch.randn(8192, 1024, generator=g) * 0.08
    ids = torch.randint(8192, (64,), generator=g)

    def exact(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h.double() @ w.double().t()).log_softmax(1).gather(1, ids[:, None])[:, 0]

    h, w = hidden.bfloat16(), weight.bfloat16()
    true, rounded = exact(hidden, weight), exact(h, w)
    mine = selective_logprob(h, weight, ids, chunk=7)[0].double()
    torchs = selective_logprob(h, w, ids, impl="reference")[0].double()
    wide = selective_logprob(hidden, weight, ids)[0].double()

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().median())

    operands = off(rounded, true)
    assert off(mine, rounded) < 1e-5 and off(wide, true) < 1e-5
    assert off(mine, true) < 1.01 * operands < 0.9 * off(torchs, true)
