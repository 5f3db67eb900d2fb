"""The hooks that make slime train an agent with M-GRPO. Against a double of its interfaces (tests/slime_double.py), and
against slime's own loss and contract tests where SLIME_CHECKOUT names a checkout; without Ray, Megatron and GPU."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mgrpo
from mgrpo.errors import ConfigError
from mgrpo.integrations import slime
from tests import slime_double
from tests.slime_double import Sample, Status

needs_checkout = pytest.mark.skipif(
    not slime_double.CHECKOUT, reason="SLIME_CHECKOUT names no checkout of slime"
)
ROOT = Path(__file__).parent.parent
K = 4


def arguments(**given: Any) -> SimpleNamespace:
    settings = {"d_max": {"sub": 2}, "seed": 3} | given.pop("mgrpo", {})
    return SimpleNamespace(**({"n_samples_per_prompt": K, "mgrpo": settings} | given))


def team(rng: np.random.Generator, queries: int, most: int = 4, planner: bool = False) -> list[Sample]:
    """`queries` groups of K rollouts with 0..most invocations each, of which not all tokens are trained."""
    samples = []
    for rollout in range(queries * K):
        base = Sample(group_index=rollout // K, index=rollout, metadata={"source_name": "team"})
        rows = [
            trajectory(rng, role, i, int(rng.integers(1, 9)))
            for role, n in (("main", int(planner)), ("sub", int(rng.integers(0, most + 1))))
            for i in range(n)
        ]
        made = slime.samples_of(base, rows, {"main": 0.5, "sub": 0.0})
        for sample in made:
            sample.reward = float(rng.integers(0, 3)) if sum(sample.loss_mask) else 0.0
        samples += made
    return samples


def trajectory(rng: np.random.Generator, role: str, invocation: int, length: int) -> mgrpo.Trajectory:
    mask = np.array([0, 1, *(rng.random(length - 1) < 0.7)], np.uint8)
    n = length + 1
    return mgrpo.Trajectory(
        query="q", rollout=0, role=role, invocation=invocation,
        tokens=rng.integers(0, 7, n).astype(np.int32), loss_mask=mask,
        logprobs=(-rng.random(n) * mask).astype(np.float32), versions=np.zeros(n, np.int32),
    )  # fmt: skip


def term(logp: torch.Tensor, data: dict[str, Any]) -> torch.Tensor:
    """slime's compute_policy_loss plus 0.1 KL (k3) plus nothing else, for each response token."""
    lengths = torch.tensor(data["response_lengths"])
    advantages = torch.tensor(data["rewards"], dtype=torch.float64).repeat_interleave(lengths)
    old = torch.cat([torch.tensor(x, dtype=torch.float64) for x in data["rollout_log_probs"]])
    ratio = (logp - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    kl = (-1.0 - logp).exp() - (-1.0 - logp) - 1
    return torch.maximum(-ratio * advantages, -clipped * advantages) + data.get("kl_coef", 0.1) * kl


def host_loss(data: dict[str, Any], logp: list[torch.Tensor], rows: list[int], size: int, of: Any) -> Any:
    """What slime's loss_function makes of one optimizer step with these samples, on one rank."""
    taken = {key: [values[j] for j in rows] for key, values in data.items() if isinstance(values, list)}
    denominators = torch.tensor(taken["rollout_mask_sums"], dtype=torch.float32).double()
    masks = [torch.tensor(mask) for mask in taken["loss_masks"]]
    reduce = of([len(t) for t in taken["tokens"]], taken["response_lengths"], masks, denominators)
    return (
        reduce(term(torch.cat([logp[j] for j in rows]), taken | {"kl_coef": data.get("kl_coef", 0.1)})) / size
    )


def logprobs(samples: list[Sample], rng: np.random.Generator) -> list[torch.Tensor]:
    """A policy's, a little off the sampler's: (response_length,) each, below 0."""
    return [
        -(
            torch.tensor(s.rollout_log_probs, dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=n))
        ).abs()
        - 1e-3
        for s in samples
        if (n := s.response_length)
    ]


def our_loss(samples: list[Sample], logp: list[torch.Tensor], rollouts: set[int], kl: float) -> torch.Tensor:
    """mgrpo's weighted loss of the optimizer step with these rollouts, advantages and votes by mgrpo.assign."""
    rows, assigned = votes(samples)
    mine = [i for i, j in enumerate(rows) if samples[j].index in rollouts]
    chosen = [samples[rows[i]] for i in mine]
    x = torch.cat([logp[rows[i]] for i in mine])
    logits = torch.stack([x, torch.log1p(-x.exp())], 1)  # log-prob of token 0 is x
    loss, _ = mgrpo.grpo_loss(
        logits, torch.zeros(len(x), dtype=torch.int64), impl="reference",
        config=mgrpo.GrpoLossConfig(type="grpo", kl_coef=kl),
        cu_seqlens=torch.tensor(np.cumsum([0] + [s.response_length for s in chosen]), dtype=torch.int32),
        loss_mask=torch.tensor(np.concatenate([s.loss_mask for s in chosen])),
        old_logprobs=torch.tensor(np.concatenate([s.rollout_log_probs for s in chosen])),
        ref_logprobs=torch.full((len(x),), -1.0, dtype=torch.float64) if kl else None,
        advantages=torch.tensor(assigned.advantage[mine]), seq_weight=torch.tensor(assigned.weight[mine]),
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("planner", [False, True])
def test_slimes_reducer_computes_our_weighted_loss(planner: bool) -> None:
    """Policy and KL term and their gradients, steps of two groups, with rollouts that have no invocation, more than
    d_max of them, and tokens that are not trained."""
    rng = np.random.default_rng(7 + planner)
    samples = team(rng, 6, planner=planner)
    size = 2 * K
    data = slime.convert_samples(arguments(global_batch_size=size), samples)
    kept = {id(tokens): j for j, tokens in enumerate(data["tokens"])}
    assert len(kept) < len(samples), "the draw has to drop something"
    logp = logprobs(samples, rng)
    host = [logp[j].clone().requires_grad_() for j, s in enumerate(samples) if id(s.tokens) in kept]
    ours = [x.clone().requires_grad_() for x in logp]
    of_host = dict(zip((j for j, s in enumerate(samples) if id(s.tokens) in kept), host, strict=True))
    for rows in slime_double.steps(data["rollout_ids"], size):
        theirs = host_loss(data, host, rows, size, slime_double.reducer)
        mine = our_loss(samples, ours, {data["rollout_ids"][j] for j in rows}, kl=0.1)
        torch.testing.assert_close(theirs, mine, rtol=1e-7, atol=1e-9)  # denominators travel as float32
        theirs.backward()
        mine.backward()
    for j, x in enumerate(ours):
        g = torch.zeros_like(x) if x.grad is None else x.grad
        if j in of_host:
            torch.testing.assert_close(of_host[j].grad, g, rtol=1e-6, atol=1e-9)
        else:
            assert not g.any(), "a sample that is left out trains nothing in our loss either"


def votes(samples: list[Sample]) -> tuple[list[int], mgrpo.Assigned]:
    """The samples with trained tokens, and what mgrpo.assign says of them."""
    rows = [j for j, s in enumerate(samples) if sum(s.loss_mask or [])]
    own = [samples[j].metadata["mgrpo"] for j in rows]
    return rows, mgrpo.assign(
        [samples[j].group_index for j in rows],  # type: ignore[misc]
        [x["role"] for x in own], [samples[j].index % K for j in rows],  # type: ignore[operator]
        [x["invocation"] for x in own], [samples[j].reward for j in rows],
        d_max={"sub": 2}, seed=3, step=0,
    )  # fmt: skip


@needs_checkout
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_slimes_loss_function_computes_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of slime's loss from logits, with KL and entropy, in the steps that slime cuts: value and gradient."""
    loss, schedule = slime_double.slime_modules(monkeypatch)
    rng = np.random.default_rng(17)
    samples, size = team(rng, 4, planner=True), 2 * K
    data = slime.convert_samples(arguments(global_batch_size=size, advantage_estimator=kind), samples)
    args = SimpleNamespace(
        advantage_estimator=kind, eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=None, use_opsm=False, use_tis=False,
        get_mismatch_metrics=False, entropy_coef=0.01, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3",
        use_unbiased_kl=False, rollout_top_p=1.0, rollout_temperature=1.0, use_rollout_logprobs=False,
        log_probs_chunk_size=-1, allgather_cp=False, calculate_per_token_loss=False, loss_type="policy_loss",
        recompute_loss_function=False,
    )  # fmt: skip
    config = mgrpo.GrpoLossConfig(type=kind, clip_eps_high=0.28, kl_coef=0.1, entropy_coef=0.01)
    rows, assigned = votes(samples)
    place = {id(samples[j].tokens): i for i, j in enumerate(rows)}
    cuts = slime_double.slime_steps(schedule, data["rollout_ids"], size)
    assert cuts == slime_double.steps(data["rollout_ids"], size) and len(cuts) == 2
    for cut in cuts:
        lengths = [len(data["tokens"][j]) for j in cut]
        responses = [data["response_lengths"][j] for j in cut]
        logits = torch.tensor(rng.normal(size=(1, sum(lengths), 8)), dtype=torch.float32, requires_grad=True)
        old = [torch.tensor(data["rollout_log_probs"][j]) - 1.0 for j in cut]
        ref = [torch.full((n,), -2.0) for n in responses]
        batch = {
            "unconcat_tokens": [torch.tensor(data["tokens"][j]) for j in cut],
            "total_lengths": lengths, "response_lengths": responses, "log_probs": old, "ref_log_probs": ref,
            "loss_masks": [torch.tensor(data["loss_masks"][j]) for j in cut],
            "rollout_mask_sums": torch.tensor([data["rollout_mask_sums"][j] for j in cut]),
            "advantages": [torch.full((n,), data["rewards"][j]) for j, n in zip(cut, responses, strict=True)],
        }  # fmt: skip
        theirs, _, _ = loss.loss_function(args, batch, 1, size, logits)
        (their_grad,) = torch.autograd.grad(theirs, logits)
        ends = np.cumsum(lengths)
        scored = [torch.arange(end - n - 1, end - 1) for end, n in zip(ends, responses, strict=True)]
        mine = [place.get(id(data["tokens"][j])) for j in cut]  # None: a rollout without invocations
        real = [i for i, row in enumerate(mine) if row is not None]
        chosen = [row for row in mine if row is not None]

        def cat(values: list[torch.Tensor], real: list[int] = real) -> torch.Tensor:
            return torch.cat([values[i] for i in real])

        tokens = torch.cat(batch["unconcat_tokens"])
        ours, _ = mgrpo.grpo_loss(
            logits[0][cat(scored)], tokens[cat(scored) + 1].long(), config=config, impl="reference",
            cu_seqlens=torch.tensor(np.cumsum([0] + [responses[i] for i in real]), dtype=torch.int32),
            loss_mask=cat(batch["loss_masks"]), old_logprobs=cat(old), ref_logprobs=cat(ref),
            advantages=torch.tensor(assigned.advantage[chosen], dtype=torch.float32),
            seq_weight=torch.tensor(assigned.weight[chosen], dtype=torch.float32),
        )  # fmt: skip
        (our_grad,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(theirs, ours, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(their_grad, our_grad, rtol=1e-5, atol=1e-7)


def test_the_votes_fit_in_the_rewards_of_slimes_own_converter() -> None:
    """reward_post_process: slime divides by all trained tokens of a rollout, dropped samples included."""
    rng = np.random.default_rng(1)
    samples = team(rng, 3)
    raw, rewards = slime.reward_post_process(arguments(), samples)
    total: dict[int, int] = {}
    for s in samples:
        total[s.index] = total.get(s.index, 0) + sum(s.loss_mask or [])  # type: ignore[index,arg-type]
    data = {
        "tokens": [s.tokens for s in samples], "response_lengths": [s.response_length for s in samples],
        "loss_masks": [s.loss_mask for s in samples], "rewards": rewards, "kl_coef": 0.0,
        "rollout_log_probs": [s.rollout_log_probs for s in samples],
        "rollout_mask_sums": [total[s.index] for s in samples],  # type: ignore[index]
    }  # fmt: skip
    logp = logprobs(samples, rng)
    theirs = host_loss(data, logp, list(range(len(samples))), 3 * K, slime_double.reducer)
    mine = our_loss(samples, logp, set(range(3 * K)), kl=0.0)
    torch.testing.assert_close(theirs, mine, rtol=1e-12, atol=1e-12)
    assert raw == [s.reward for s in samples]


def test_a_vote_above_the_tokens_of_its_sample_is_in_the_advantage() -> None:
    """slime bounds a denominator at 1: one token, one of two rollouts with an invocation, so a vote of 2."""
    rng = np.random.default_rng(0)
    samples = []
    for rollout in range(4):
        base = Sample(group_index=rollout // 4, index=rollout)
        rows = [trajectory(rng, "sub", 0, 1)] if rollout < 2 else []
        samples += slime.samples_of(base, rows, float(rollout))
    data = slime.convert_samples(arguments(), samples)
    assert data["rollout_mask_sums"] == [1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(data["rewards"], [-2.0, 2.0, 0.0, 0.0], rtol=1e-5)
    assert data["rollout_ids"] == [0, 1, 2, 3]  # slime still counts four rollouts
    assert data["loss_masks"][2:] == [[0], [0]]


def test_samples_of_keeps_what_a_trajectory_says() -> None:
    rng = np.random.default_rng(5)
    given = trajectory(rng, "sub", 1, 6)
    base = Sample(group_index=2, index=9, metadata={"source_name": "team"})
    (made,) = slime.samples_of(base, [given], {"sub": 0.25})
    assert made.tokens == given.tokens.tolist() and made.response_length == 6
    assert made.loss_mask == given.loss_mask[1:].tolist()
    assert made.rollout_log_probs == given.logprobs[1:].tolist()
    assert (made.rollout_id, made.reward, made.status) == (9, 0.25, Status.COMPLETED)
    assert made.metadata == {"source_name": "team", "mgrpo": {"role": "sub", "invocation": 1}}
    with pytest.raises(ValueError, match="no reward, only of 'main'"):
        slime.samples_of(base, [given], {"main": 0.25})
    given.loss_mask[:] = 0
    with pytest.raises(ValueError, match="0 sampled tokens and no prompt"):
        slime.samples_of(base, [given], 0.25)


REFUSED = {
    "calculate_per_token_loss": (True, "leave it out"),
    "custom_pg_loss_reducer_function_path": ("a.b", "leave it out"),
    "custom_advantage_function_path": ("a.b", "leave it out"),
    "normalize_advantages": (True, "leave it out"),
    "use_rollout_routing_replay": (True, "leave it out"),
    "log_passrate": (True, "leave it out"),
    "rewards_normalization": (False, "--disable-rewards-normalization"),
    "advantage_estimator": ("ppo", "grpo"),
    "loss_type": ("sft_loss", "policy_loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_cannot_be_honoured_is_refused(name: str) -> None:
    """By every hook, and by the one that runs before anything else, with argument, value and what to set."""
    value, instead = REFUSED[name]
    samples = team(np.random.default_rng(2), 1)
    for hook in (lambda args: slime.check(args), lambda args: slime.convert_samples(args, samples)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: {value!r} cannot.*{instead}"):
            hook(arguments(**{name: value}))


def test_votes_in_the_rewards_refuse_the_terms_that_would_not_see_them() -> None:
    samples = team(np.random.default_rng(2), 1)
    for given in ({"use_kl_loss": True, "kl_loss_coef": 0.1}, {"entropy_coef": 0.1}, {"use_opd": True}):
        with pytest.raises(ConfigError, match="convert_samples"):
            slime.reward_post_process(arguments(**given), samples)
        with pytest.raises(ConfigError, match="convert_samples"):
            slime.check(arguments(**given))
        slime.convert_samples(arguments(**given), samples)
        slime.check(arguments(custom_convert_samples_to_train_data_path="a.b", **given))
    slime.reward_post_process(arguments(use_kl_loss=False, kl_loss_coef=0.1), samples)


def test_settings_are_checked() -> None:
    for mapping, words in (
        ({"dmax": 3}, "mgrpo.dmax: unknown"),
        ({"estimator": "rloo"}, "'rloo' contradicts --disable-grpo-std-normalization"),
    ):
        with pytest.raises(ConfigError, match=words):
            slime.check(SimpleNamespace(mgrpo=mapping, grpo_std_normalization=False))
    for mapping, words in (
        ({"d_max": {"sub": 0}}, "mgrpo: .*d_max"),
        ({"mode": "some"}, "mgrpo: .*mode"),
        ({"estimator": "ppo"}, "mgrpo: estimator: 'ppo'"),
    ):
        with pytest.raises(ConfigError, match=words):
            slime.check(SimpleNamespace(mgrpo=mapping))
    with pytest.raises(ConfigError, match="expected a mapping"):
        slime.check(SimpleNamespace(mgrpo=3))
    samples = team(np.random.default_rng(2), 2)
    plain = slime.convert_samples(arguments(grpo_std_normalization=False), samples)
    named = slime.convert_samples(arguments(mgrpo={"estimator": "dr_grpo"}), samples)
    assert plain["rewards"] == named["rewards"]
    assert plain["rewards"] != slime.convert_samples(arguments(), samples)["rewards"]


def test_wrong_groups_are_refused() -> None:
    """A rollout that is missing, one in two groups, an invocation that comes twice, a step that would train nothing, a
    role without d_max."""
    rng = np.random.default_rng(4)
    samples = team(rng, 1, most=3)
    with pytest.raises(ValueError, match="group_index 0: 3 rollouts, expected n_samples_per_prompt = 4"):
        slime.convert_samples(arguments(), [s for s in samples if s.index != 2])
    twice = samples + [s for s in samples if sum(s.loss_mask or [])][:1]
    with pytest.raises(ValueError, match="invocation 0 comes twice"):
        slime.convert_samples(arguments(), twice)
    moved = [*team(rng, 2)]
    moved[-1].rollout_id = 0
    with pytest.raises(ValueError, match="rollout_id 0 is in groups 0 and 1"):
        slime.convert_samples(arguments(), moved)
    silent = [slime.samples_of(Sample(group_index=0, index=i), [], 0.0)[0] for i in range(K)]
    with pytest.raises(ValueError, match=r"none of its 4 rollouts has an invocation.*reward_nonzero"):
        slime.convert_samples(arguments(global_batch_size=K), silent)
    samples[0].metadata = {"mgrpo": {"role": "judge", "invocation": 0}}
    samples[0].loss_mask, samples[0].response_length = [1], 1
    with pytest.raises(ValueError, match="d_max: no number for role 'judge'"):
        slime.convert_samples(arguments(), samples)


def test_a_removed_sample_is_no_invocation() -> None:
    """slime masks it; the others of its rollout share its vote, and a rollout that has only such stays, masked."""
    samples = team(np.random.default_rng(11), 2)
    gone = [s for s in samples if s.index == samples[0].index]
    for s in gone:
        s.remove_sample, s.reward = True, None
    data = slime.convert_samples(arguments(), samples)
    first = [j for j, rollout in enumerate(data["rollout_ids"]) if rollout == gone[0].index]
    assert len(first) == 1 and not any(data["loss_masks"][first[0]])
    assert len(set(data["rollout_ids"])) == 2 * K


def test_the_filter_looks_at_each_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested lists as slime's compact rollouts give them; a role's rewards that differ keep the group."""
    slime_double.install(monkeypatch)
    group = [team(np.random.default_rng(3), 1, planner=True)]
    for s in group[0]:
        s.reward = 1.0 if s.metadata.get("mgrpo", {}).get("role") == "main" else 0.0
    verdict = slime.reward_nonzero(arguments(), group)
    assert (verdict.keep, verdict.reason) == (False, "zero_std")
    group[0][-1].reward = 0.5
    assert slime.reward_nonzero(arguments(), group).keep
    for s in group[0]:
        s.remove_sample = True
    assert slime.reward_nonzero(arguments(), group).reason == "no_invocations"


def test_the_log_counts_invocations() -> None:
    samples = team(np.random.default_rng(3), 1)
    metrics: dict[str, float] = {}
    args = arguments()
    assert slime.rollout_log(5, args, samples, metrics, 1.0) is False
    rows = [s for s in samples if sum(s.loss_mask or [])]
    assert metrics["mgrpo/sub/invocations"] == len(rows) / K
    assert metrics["mgrpo/sub/rollouts_without"] == 1 - len({s.index for s in rows}) / K


@needs_checkout
def test_slimes_own_contract_tests_pass_with_the_hooks() -> None:
    """In the environment of SLIME_PYTHON (default: this one), which has what slime's modules import at their top."""
    hooks = {
        "CUSTOM_REWARD_POST_PROCESS_PATH": "reward_post_process",
        "CUSTOM_CONVERT_SAMPLES_TO_TRAIN_DATA_PATH": "convert_samples",
        "DYNAMIC_SAMPLING_FILTER_PATH": "reward_nonzero",
        "CUSTOM_ROLLOUT_LOG_FUNCTION_PATH": "rollout_log",
        "ROLLOUT_FUNCTION_PATH": "rollout",
    }
    paths = {f"SLIME_CONTRACT_{key}": f"mgrpo.integrations.slime.{name}" for key, name in hooks.items()}
    python = os.environ.get("SLIME_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import httpx, aiohttp, yaml, tqdm"], capture_output=True).returncode:
        pytest.skip(f"{python} lacks httpx, aiohttp, pyyaml or tqdm, which slime imports; set SLIME_PYTHON")
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/plugin_contracts"],
        cwd=slime_double.CHECKOUT, env=os.environ | paths | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "36 passed" in done.stdout


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "embedding" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_what_the_page_says_to_type_works() -> None:
    """The generate function of the page on a rollout of two calls and on one of none; its settings; no more than ten
    lines each."""
    (code,), (settings,) = blocks("slime.md", "python"), blocks("slime.md", "yaml")
    rng = np.random.default_rng(2)
    calls = [[trajectory(rng, "sub", i, 3) for i in range(2)], []]

    async def play(args: Any, sample: Sample, params: Any) -> Any:
        return calls[sample.index or 0], {"sub": 1.0}

    space: dict[str, Any] = {"play": play}
    exec(code, space)
    made = [asyncio.run(space["generate"](None, Sample(group_index=0, index=k), {})) for k in range(2)]
    assert [len(samples) for samples in made] == [2, 1] and max(code.count("\n"), settings.count("\n")) <= 10
    args = SimpleNamespace(n_samples_per_prompt=2, **yaml.safe_load(settings))
    assert slime.convert_samples(args, made[0] + made[1])["rollout_ids"] == [0, 0, 1]


def test_the_examples_name_what_is_there() -> None:
    """Hooks that exist, settings that are known, and, with a checkout, arguments of slime."""
    folder = ROOT / "examples" / "embed_slime"
    for name in ("team.yaml", "mrlx.yaml"):
        slime.check(SimpleNamespace(**yaml.safe_load((folder / name).read_text())))
    text = (folder / "arguments.sh").read_text() + (ROOT / "docs/embedding/slime.md").read_text()
    hooks = set(re.findall(r"mgrpo\.integrations\.slime\.(\w+)", text))
    assert len(hooks) >= 5 and all(callable(getattr(slime, hook)) for hook in hooks)
    if slime_double.CHECKOUT:
        known = (Path(slime_double.CHECKOUT) / "slime/utils/arguments.py").read_text()
        given = set(re.findall(r"--[a-z][a-z-]+", text)) | {f"--{name.replace('_', '-')}" for name in REFUSED}
        assert not {flag for flag in given if f'"{flag}"' not in known} - {"--rewards-normalization"}
