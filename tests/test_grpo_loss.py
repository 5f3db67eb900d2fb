"""grpo_loss: every backend against the float64 reference over the grid, -inf rows and the delta grid included."""

from __future__ import annotations

import pytest
import torch

from mgrpo import _C, grpo_loss
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import TOLERANCE, configs, error, grid_batch, run_logits, settings


def name(config: GrpoLossConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in config.model_dump(exclude_defaults=True).items())


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> str:
    try:
        _C.use_isa(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    request.addfinalizer(lambda: _C.use_isa("auto"))
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", configs(), ids=name)
def test_the_gradient_is_the_float64_references(config: GrpoLossConfig, dtype: torch.dtype) -> None:
    """Within the bound of the dtype, never more than 1.2 times torch's own error at that dtype, upstream
    0.5."""
    data = grid_batch(1037, dtype)
    exact_loss, exact_metrics, exact = run_logits(data, config, torch.float64, "reference")
    _, _, torchs = run_logits(data, config, dtype, "reference")
    for inplace in (False, True):
        loss, metrics, grad = run_logits(data, config, dtype, "cpu", inplace=inplace)
        # Half an ulp of the largest gradient is what writing it in this dtype costs at least.
        floor = torch.finfo(dtype).eps / 2
        assert error(grad, exact) <= min(TOLERANCE[dtype], max(1.2 * error(torchs, exact), 2 * floor))
        assert abs(float(loss) - float(exact_loss)) <= 2e-6 * max(1.0, abs(float(exact_loss)))
        for key in METRICS:
            torch.testing.assert_close(
                metrics[key].double(), exact_metrics[key].double(), rtol=2e-5, atol=2e-6
            )


@pytest.mark.parametrize("vocabulary", [5, 63, 1024, 4099])
def test_every_instruction_set_and_odd_vocabulary(isa: str, vocabulary: int) -> None:
    """The vector widths agree with float64 where blocks and lanes do not fit, with entropy and KL on."""
    for dtype in (torch.float32, torch.bfloat16):
        data = grid_batch(vocabulary, dtype)
        config = settings("dapo", kl_coef=0.1, entropy_coef=0.02, temperature=0.6)
        exact = run_logits(data, config, torch.float64, "reference")[2]
        for inplace in (False, True):
            grad = run_logits(data, config, dtype, "cpu", inplace=inplace)[2]
            assert error(grad, exact) <= TOLERANCE[dtype]


def test_threads_change_no_bit() -> None:
    """One thread and three give the same bits."""
    data = grid_batch(1037, torch.float32)
    config = settings("grpo", entropy_coef=0.01)
    threads = torch.get_num_threads()
    try:
        grads = []
        for n in (1, 3):
            torch.set_num_threads(n)
            grads.append(run_logits(data, config, torch.float32, "cpu")[2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*grads)


def test_rewards_and_groups_are_the_advantages_they_make() -> None:
    """rewards + group_id give what group_advantage's advantages give; singleton and equal groups move nothing."""
    from mgrpo import group_advantage

    data = grid_batch(129, torch.float32)
    data.pop("advantages")
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 7.0, 7.0])
    groups = torch.tensor([3, 3, 3, 9, 4, 4], dtype=torch.int32)
    config = settings("grpo")
    a = group_advantage(rewards, groups, data["seq_weight"])
    by_hand = run_logits(data, config, torch.float32, "cpu", advantages=a)
    fused = run_logits(data, config, torch.float32, "cpu", rewards=rewards, group_id=groups)
    assert torch.equal(by_hand[2], fused[2]) and torch.equal(by_hand[0], fused[0])
    cu = data["cu_seqlens"].tolist()
    assert not fused[2][cu[3] :].any() and fused[2][: cu[2]].any()


def test_a_masked_batch_and_an_empty_one_are_zero() -> None:
    """No active row: loss 0, gradient 0, finite metrics."""
    data = grid_batch(33, torch.float32) | {"loss_mask": torch.zeros(19, dtype=torch.bool)}
    loss, metrics, grad = run_logits(data, settings("dapo"), torch.float32, "cpu")
    assert float(loss) == 0 and not grad.any()
    assert all(bool(metrics[k].isfinite()) for k in METRICS)
    z = torch.empty(0, 7, requires_grad=True)
    none = {"target_ids": torch.empty(0, dtype=torch.int64), "cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    loss, _ = grpo_loss(z, advantages=torch.empty(0), config=settings("dapo"), **none)
    loss.backward()
    assert float(loss.detach()) == 0 and z.grad is not None


def test_rows_that_are_not_finite_are_counted_and_move_nothing() -> None:
    """NaN (any payload), +inf and an all -inf row: counted, gradient 0, the others as without them."""
    data = grid_batch(1037, torch.float32)
    dirty = data | {"logits": data["logits"].clone()}
    dirty["logits"][0, 5], dirty["logits"][2, 1036], dirty["logits"][6] = (
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    for impl in ("reference", "cpu"):
        for config in (settings("dapo"), settings("dapo", entropy_coef=0.1)):
            clean = run_logits(data, config, torch.float32, impl)[2]
            _, metrics, grad = run_logits(dirty, config, torch.float32, impl)
            others = [t for t in range(19) if t not in (0, 2, 6)]
            assert int(metrics["nonfinite_rows"]) == 3
            assert not grad[[0, 2, 6]].any() and torch.equal(grad[others], clean[others])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("target_ids", {"target_ids": torch.full((19,), 33)}),
        ("target_ids", {"target_ids": torch.full((19,), -1)}),
        ("target_ids", {"target_ids": torch.zeros(18, dtype=torch.int64)}),
        ("target_ids", {"target_ids": torch.zeros(19, dtype=torch.int32)}),
        ("logits", {"logits": torch.zeros(19)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4, 19], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 18], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 19], dtype=torch.int16)}),
        ("rewards", {"rewards": torch.zeros(6), "group_id": torch.zeros(6, dtype=torch.int32)}),
        ("group_id", {"advantages": None, "rewards": torch.zeros(6)}),
        ("advantages", {"advantages": None}),
        ("advantages", {"advantages": torch.zeros(7)}),
        ("token_advantages", {"token_advantages": torch.zeros(19)}),
        ("token_advantages", {"advantages": None, "token_advantages": torch.zeros(6)}),
        ("token_advantages", {"advantages": None, "token_advantages": torch.full((19,), float("inf"))}),
        ("token_advantages", {"advantages": None, "token_advantages": torch.zeros(19), "config": settings("gspo")}),
        ("group_id", {"advantages": None, "token_advantages": torch.zeros(19),
        "group_id": torch.zeros(6, dtype=torch.int32)}),
        ("advantage", {"advantage": torch.zeros(6)}),
        ("advantages", {"advantages": torch.tensor([0.0, 1, 2, 3, 4, float("nan")])}),
        ("rewards", {"advantages": None, "rewards": torch.full((6,), float("inf")), "group_id": torch.zeros(6,
        dtype=torch.int32)}), ("seq_weight", {"seq_weight": torch.tensor([1.0, 1, 1, 1, 1, -1])}),
        ("old_logprobs", {"old_logprobs": torch.full((19,), float("nan"))}), ("old_logprobs", {"old_logprobs":
        torch.zeros(3)}), ("old_logprobs", {"old_logprobs": torch.zeros(19, device="meta")}),
        ("ref_logprobs", {"ref_logprobs": None, "config": settings("grpo", kl_coef=0.1)}),
        ("rollout_logprobs", {"rollout_logprobs": None, "config": settings("grpo", correction="mis")}),
        ("denominator", {"denominator": -1.0}), ("loss_mask", {"loss_mask": torch.zeros(5)}), ("impl", {"impl":
        "cuda"}), ("impl", {"impl": "cpu", "logits": torch.zeros(19, 33, dtype=torch.float64)}), ("config",
        {"config": {"type": "grpo"}}),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(argument: str, change: dict[str, object]) -> None:
    """ValueError or TypeError whose message begins with the argument's name."""
    call: dict[str, object] = {"config": settings("grpo"), **grid_batch(33, torch.float32)}
    call["logits"] = torch.zeros(19, 33)
    call |= change
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        grpo_loss(call.pop("logits"), call.pop("target_ids"), **call)
