"""Numbers at the rim of the loss: ratios that overflow or are 0, masked vocabularies, log-probs that are not finite,
names that no backend knows."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from mgrpo import _C, GrpoLossConfig, grpo_loss, linear_grpo_loss, selective_logprob
from mgrpo.config import loss as config_names
from mgrpo.errors import ConfigError
from mgrpo.losses.builtin import KINDS, Grpo
from mgrpo.ops import check, encoding, native
from mgrpo.ops.token_loss import kl_term
from tests.loss_grid import CLIPPED, LOSS_TYPES, grid_batch, run_logits, settings
from tests.loss_rim import check_far, check_missing, check_rim, far_configs, rim_configs

IMPLS = ("reference", "cpu")
NAMES = ("type", "ratio_level", "kl_estimator", "correction", "estimator")


def test_the_rim_is_finite_and_the_float64_references() -> None:
    """Every loss type, correction and KL estimator of the config, over log-ratios of 400 to -400 nats."""
    check_rim(IMPLS, rim_configs())


def test_log_ratios_beyond_float32s_exponent() -> None:
    """No NaN, and no gradient where the clip holds the token, in any backend."""
    check_far(IMPLS, far_configs())


def one_token(log_ratio: float, advantage: float, dtype: torch.dtype, impl: str, **more: Any) -> Any:
    """(loss, gradient (4,)) of one token whose log-prob is that of the first of 4 logits."""
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    logp = logits.detach().double().log_softmax(1)[:, 0]
    loss, _ = grpo_loss(
        logits,
        torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        advantages=torch.tensor([advantage]),
        old_logprobs=logp - log_ratio,
        ref_logprobs=logp if "kl_coef" in more else None,
        config=settings(more.pop("type", "grpo"), **more),
        impl=impl,
    )
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize(("impl", "dtype"), [
    ("reference", torch.float64), ("reference", torch.float32), ("reference", torch.bfloat16),
    ("cpu", torch.float32), ("cpu", torch.bfloat16),
])  # fmt: skip
def test_where_the_clip_decides_the_gradient_is_exactly_0(impl: str, dtype: torch.dtype) -> None:
    """A clipped ratio, a capped one, a saturated gate and an advantage of 0, also where exp(log-ratio) is infinite or
    0; cispo, whose ratio is a factor, keeps the clamped factor's gradient."""
    for far in (30.0, 95.0, 800.0, 1e6):
        for loss_type in CLIPPED:
            for advantage, log_ratio, more in ((1.0, far, {}), (-1.0, -far, {}), (-1.0, far, {"delta": 4.0})):
                loss, grad = one_token(log_ratio, advantage, dtype, impl, type=loss_type, **more)
                assert loss.isfinite() and not grad.any(), (loss_type, advantage, log_ratio)
        for log_ratio in (far, -far):
            for advantage in (1.0, -1.0):
                loss, grad = one_token(log_ratio, advantage, dtype, impl, type="sapo")
                assert loss.isfinite() and grad.abs().max() < 1e-10
            for loss_type in LOSS_TYPES:
                loss, grad = one_token(log_ratio, 0.0, dtype, impl, type=loss_type, kl_coef=0.1)
                assert loss.isfinite() and grad.abs().max() < 1e-6
        _, clamped = one_token(far, 1.0, dtype, impl, type="cispo", clip_eps_high=5.0)
        _, known = one_token(math.log(9.0), 1.0, dtype, impl, type="cispo", clip_eps_high=5.0)
        assert torch.equal(clamped, known) and known.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_ratio_that_nothing_clips_is_held_at_the_bound(impl: str) -> None:
    """A < 0 without delta: up to the bound the formula's gradient, beyond it a finite loss and no gradient."""
    for bound in (20.0, 4.0):
        loss, grad = one_token(bound - 0.5, -1.0, torch.float32, impl, log_ratio_clip=bound)
        assert float(loss) == pytest.approx(math.exp(bound - 0.5), rel=1e-4)
        assert float(grad[0, 0]) > 0.5
        for beyond in (bound + 0.5, 300.0):
            loss, grad = one_token(beyond, -1.0, torch.float32, impl, log_ratio_clip=bound)
            assert float(loss) == pytest.approx(math.exp(bound), rel=1e-4) and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_vocabulary(impl: str) -> None:
    """Entropy and gradient are those of the vocabulary without its masked part; a masked target moves nothing and is
    counted."""
    data = grid_batch(33, torch.float32)
    data["target_ids"] = data["target_ids"].clamp(max=19)
    data["logits"][:, 20:] = -float("inf")
    config = settings("dapo", entropy_coef=0.1, kl_coef=0.1)
    cut = {**data, "logits": data["logits"][:, :20].contiguous()}
    got, want = (run_logits(x, config, torch.float32, impl) for x in (data, cut))
    torch.testing.assert_close(got[2][:, :20], want[2], rtol=1e-5, atol=1e-7)
    assert not got[2][:, 20:].any() and got[1]["entropy"].isfinite()
    data["target_ids"][3] = 25
    _, metrics, grad = run_logits(data, config, torch.float32, impl)
    assert int(metrics["nonfinite_rows"]) == int(want[1]["nonfinite_rows"]) + 1
    assert not grad[3].any() and bool(grad.isfinite().all())


def test_logits_at_both_ends_of_their_range() -> None:
    """3e38 beside -3e38 at a temperature below 1: nothing overflows on the way, in any backend."""
    logits = torch.tensor([[3e38, -3e38, 3e38, 0.0]]).repeat(2, 1)
    ids, hidden = torch.tensor([0, 2]), torch.eye(2)
    for impl in IMPLS:
        logp, entropy = selective_logprob(hidden, logits.t().contiguous(), ids, temperature=0.5, impl=impl)
        torch.testing.assert_close(logp, torch.full((2,), -math.log(2.0)))
        torch.testing.assert_close(entropy, torch.full((2,), math.log(2.0)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_given_logprobs_that_are_not_finite(
    value: float, name: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name where a look is free. Where it is not (a GPU, a compiled graph) the row is idle and counted, and
    the others are as without it; in a masked row nothing looks at it."""
    data = grid_batch(33, torch.float32)
    row = 2
    dirty = {**data, name: data[name].clone()}
    dirty[name][row] = value
    config = settings("dapo", kl_coef=0.1, correction="token_tis")
    with pytest.raises(ValueError, match=f"^{name}: .* at \\[{row}\\] is not finite"):
        run_logits(dirty, config, torch.float32, impl)
    masked = data["loss_mask"].clone()
    masked[row] = 0
    unseen = run_logits({**dirty, "loss_mask": masked}, config, torch.float32, impl)
    assert bool(unseen[2].isfinite().all()) and not unseen[2][row].any()
    clean = run_logits(data, config, torch.float32, impl)
    monkeypatch.setattr(check, "values_visible", lambda x: False)
    _, metrics, grad = run_logits(dirty, config, torch.float32, impl)
    assert int(metrics["nonfinite_rows"]) == 1 and not grad[row].any()
    others = [t for t in range(19) if t != row]
    assert torch.equal(grad[others], clean[2][others])


def test_a_log_prob_that_the_sampler_did_not_report() -> None:
    """NaN or infinite among rollout_logprobs: no correction at this token, in every backend, with old log-probs and
    without."""
    check_missing(IMPLS)


def test_the_mismatch_is_seen_where_ratios_overflow() -> None:
    """Log-probs 300 nats apart either way: ratios are 0 or held, and the difference is in nats."""
    data = grid_batch(33, torch.float32)
    for shift in (300.0, -300.0):
        data["rollout_logprobs"] = data["old_logprobs"] + shift
        metrics = run_logits(data, settings("dapo"), torch.float32, "cpu")[1]
        assert 298.0 < float(metrics["logprob_diff_max"]) < 302.0
        assert all(bool(value.isfinite()) for value in metrics.values())
        assert 0.0 < float(metrics["ess"]) <= 1.0


def with_name(field: str) -> GrpoLossConfig:
    """A config that was never validated and holds an unknown name."""
    return GrpoLossConfig.model_construct(**{**GrpoLossConfig().model_dump(), field: "ppo"})


@pytest.mark.parametrize("field", NAMES)
def test_an_unknown_name_is_an_error_in_every_backend(field: str) -> None:
    """Nothing is computed as something else: from logits, through the head, and as an op's list of numbers."""
    data = grid_batch(33, torch.float32)
    config = with_name(field)
    # a name that is no built-in type may be a class's
    words = r"^config\.type 'ppo' is unknown, " if field == "type" else f"^{field}: 'ppo' is not one of "
    for impl in ("reference", "cpu", "triton"):
        with pytest.raises((ValueError, ConfigError), match=words):
            run_logits(data, config, torch.float32, impl)
        rest = {k: v for k, v in data.items() if k not in ("logits", "target_ids")}
        with pytest.raises((ValueError, ConfigError), match=words):
            linear_grpo_loss(
                torch.zeros(19, 4), torch.zeros(33, 4), data["target_ids"], config=config, impl=impl, **rest
            )
    with pytest.raises(ValueError, match=f"^{field}: 'ppo' is not one of "):
        encoding.encode(config)


def test_every_table_has_the_configs_names_and_the_kernels_numbers() -> None:
    """One enumeration for each setting that is a name: config, losses, numbers, C++ and Triton have the same."""
    literals = {
        "ratio_level": config_names.RatioLevel,
        "kl_estimator": config_names.KlEstimator,
        "correction": config_names.Correction,
        "estimator": config_names.Estimator,
    }
    assert {f: list(codes) for f, codes in encoding.CODES.items()} == {
        f: list(get_args(names)) for f, names in literals.items()
    }
    assert list(KINDS) == list(config_names.TERM_SETTINGS)
    numbers = {kind.fused_id for kind in KINDS.values()}
    kernels = pytest.importorskip("mgrpo.kernels.grpo_loss", reason="needs triton")
    assert numbers == {kernels.CLIPPED.value, kernels.CISPO.value, kernels.SAPO.value} == {0, 1, 2}
    arguments = {
        "clip_eps_low": 0.2, "clip_eps_high": 0.2, "delta": 4.0, "log_ratio_clip": 20.0, "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.0, "kl_coef": 0.0, "entropy_coef": 0.0, "correction_low": 0.0,
        "correction_high": 1.0,
    }  # fmt: skip
    known = {"term": numbers, "kl_estimator": {1, 2, 3}, "correction": {0, 1, 2}}
    for name, codes in known.items():
        for number in range(-1, 5):
            given = {"term": 0, "kl_estimator": 1, "correction": 0, name: number}
            if number in codes:
                _C.TokenSettings(**arguments, **given)
                continue
            with pytest.raises(ValueError, match=f"^{name}: code {number} is not in "):
                _C.TokenSettings(**arguments, **given)


def test_a_name_that_only_the_tables_know_stops_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a formula, or with a number that C++ does not know, is refused there."""
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^type: the kernels do not know the term of 'ppo'"):
        encoding.term_code(Grpo(with_name("type")))
    with pytest.raises(ValueError, match=r"^kl_estimator: 'ppo' has no formula"):
        kl_term(x, x, with_name("kl_estimator"))
    for field in ("kl_estimator", "correction", "estimator"):
        monkeypatch.setitem(encoding._NAMES, field, [*encoding._NAMES[field], "ppo"])
        monkeypatch.setitem(encoding.CODES, field, {**encoding.CODES[field], "ppo": 7})
    monkeypatch.setattr(Grpo, "fused_id", 7)
    logits, ids = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    for field in ("term", "kl_estimator", "correction"):
        config = GrpoLossConfig() if field == "term" else with_name(field)
        with pytest.raises((ValueError, KeyError), match=f"^{field}: |ppo"):
            _ = native._settings(Grpo(config), correct=True)
        monkeypatch.setattr(Grpo, "fused_id", 0)
    with pytest.raises(ValueError, match=r"^estimator: code 7 is not in \[0, 3\]"):
        native.group_advantage(x, ids.int(), None, "ppo", 0.0, False)
    with pytest.raises((ValueError, KeyError), match=r"correction|ppo"):
        rest = {"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32), "advantages": x, "rollout_logprobs": x}
        grpo_loss(logits, ids, config=with_name("correction"), impl="reference", **rest)


def rows(**change: Any) -> Any:
    """_C.LogitRows of two rows of four logits, some arguments changed."""
    logits, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "logits": logits.data_ptr(), "bfloat16": False, "rows": 2, "vocabulary": 4, "stride": 4,
        "target_ids": ids.data_ptr(), "temperature": 1.0, "threads": 1,
    }  # fmt: skip
    return _C.LogitRows(**arguments | change)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("logits", {"logits": 4097}),
        ("logits", {"logits": 4097, "bfloat16": True}),
        ("logits", {"logits": 0}),
        ("rows", {"rows": -1}),
        ("vocabulary", {"vocabulary": 0}),
        ("stride", {"stride": -4}),
        ("stride", {"stride": 3}),
        ("target_ids", {"target_ids": 4100}),
        ("target_ids", {"target_ids": 0}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": math.nan}),
        ("threads", {"threads": 0}),
    ],
)
def test_the_border_to_cpp_refuses_what_an_address_shows(argument: str, change: dict[str, Any]) -> None:
    """Unaligned and missing addresses, strides that run backwards, sizes and numbers out of range, by name."""
    with pytest.raises(ValueError, match=f"^{argument}: "):
        rows(**change)


def test_the_border_to_cpp_refuses_tensors_of_other_shapes() -> None:
    """What an address does not show, the module that takes it does: dtypes, shapes, memory layouts; empty is fine."""
    z, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    c = (torch.zeros(2),) * 5
    cases: list[tuple[str, Any]] = [
        ("logits", lambda: native.row_partials(z.double(), ids, None, 1.0)),
        ("logits", lambda: native.row_partials(torch.zeros(4, 2).t(), ids, None, 1.0)),
        ("target_ids", lambda: native.row_partials(z, ids[:1], None, 1.0)),
        ("target_ids", lambda: native.row_partials(z, ids.int(), None, 1.0)),
        ("target_ids", lambda: native.row_partials(z, torch.zeros(4, dtype=torch.int64)[::2], None, 1.0)),
        ("active", lambda: native.row_partials(z, ids, torch.ones(2), 1.0)),
        ("grad", lambda: native.row_gradients(z, ids, c, 1.0, torch.zeros(2, 3))),
        ("grad", lambda: native.row_gradients(z, ids, c, 1.0, z.bfloat16())),
        ("inputs", lambda: native.row_gradients(z, ids, (*c[:4], torch.zeros(1)), 1.0, z.clone())),
        ("group_id", lambda: native.group_advantage(torch.zeros(3), ids, None, "grpo", 0.0, False)),
        (
            "inputs",
            lambda: native.group_advantage(torch.zeros(2), ids.int(), torch.ones(3), "grpo", 0.0, False),
        ),
        ("rewards", lambda: _C.group_advantage(4097, 4096, 0, 1, 0, 0.0, False, 4096)),
        ("eps", lambda: _C.group_advantage(0, 0, 0, 0, 0, math.nan, False, 0)),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            call()
    empty = native.row_partials(z[:0], ids[:0], None, 1.0)
    assert [x.numel() for x in empty] == [0] * 4
    assert native.group_advantage(torch.zeros(0), ids[:0].int(), None, "grpo", 0.0, False).numel() == 0
