"""Mixtures of experts: what is found in them, what their routers are said to do, and the loss that evens them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, MeshConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.moe import experts_of, routers_of
from mgrpo.model.policy import Policy, state_of, trained_state
from mgrpo.trainers.batch import MicroBatch
from mgrpo.trainers.torch.learner import Learner
from tests.families import FAMILIES, family
from tests.models import tiny_model, tiny_tokenizer
from tests.moe_ranks import AUX, CUTS, DIVIDED, OTHERS, UNDIVIDED, cut, mixture, moe_policy, step
from tests.ranks import run_ranks
from tests.rows import ROWS, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_EXPERTS = {
    "GptOss": 2,
    "Qwen3Moe": 2,
    "Qwen2Moe": 2,
    "Mixtral": 2,
    "DeepseekV2": 1,
    "DeepseekV3": 1,
    "Olmoe": 2,
    "MiniMaxM2": 2,
    "Qwen3Next": 2,
    "Glm4Moe": 1,
    "Lfm2Moe": 1,
}
DENSE = [name for name in FAMILIES if name not in WITH_EXPERTS and name not in ("Llama4Text", "Bert")]


@pytest.mark.parametrize(("name", "layers"), WITH_EXPERTS.items())
def test_experts_and_routers_are_found(name: str, layers: int) -> None:
    """One of each a layer, side by side, in the order of layers; no name of a model is in the code."""
    model = family(name)
    experts, routers = list(experts_of(model)), [router.name for router in routers_of(model)]
    assert len(experts) == len(routers) == layers
    assert [n.rpartition(".")[0] for n in experts] == [n.rpartition(".")[0] for n in routers]
    assert experts == sorted(experts)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_have_none(name: str) -> None:
    """Convolutions and mixing coefficients have three dimensions too, and are no experts."""
    model = family(name)
    assert not experts_of(model) and not routers_of(model)


def real_rows(rows: MicroBatch) -> list[Tensor]:
    """What enters the model of each trajectory that has an advantage, alone: (1, n - 1)."""
    return [rows.ids[i : i + 1, : rows.lengths[i] - 1] for i in range(ROWS) if rows.advantages[i] != 0]


def routed(model: Any, rows: MicroBatch, top_k: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, over all real tokens: probabilities (T, E), and which experts were chosen (T, E), as transformers
    reports the routers of one trajectory at a time."""
    logits = [model.model(input_ids=ids, output_router_logits=True).router_logits for ids in real_rows(rows)]
    out = []
    for layer in zip(*logits, strict=True):
        p = torch.cat([part.flatten(0, -2) for part in layer]).softmax(-1)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(top_k, -1).indices, 1.0)
        out.append((p, chosen.detach()))
    return out


@pytest.mark.parametrize("attention", ["rows", "sdpa", "varlen"])
@pytest.mark.parametrize("aux", [0.0, AUX])
def test_metrics_are_those_of_the_real_tokens(attention: str, aux: float) -> None:
    """Padding and trajectories without an advantage count nowhere, however attention lays out its rows, with the loss
    or without it."""
    rows = rows_of(3, near=True)
    policy = moe_policy(PolicyConfig(attention=attention, aux_loss_coef=aux))
    found = step(policy, cut(rows, CUTS[1]))[0]
    imbalance, dead, entropy, loss = 0.0, 0.0, 0.0, 0.0
    with torch.no_grad():
        layers = routed(moe_policy(PolicyConfig(experts="eager")).model.double(), rows, 2)
    for p, chosen in layers:
        tokens, experts = p.shape
        load = chosen.sum(0)
        imbalance += float(load.max() / load.mean()) / len(layers)
        dead += float((load == 0).double().mean()) / len(layers)
        entropy += float(-(p * p.log()).sum() / tokens) / len(layers)
        loss += float(experts / 2 * (load / tokens * p.mean(0)).sum()) / len(layers)
    assert imbalance > 1.2 and loss > 1.01
    assert found["moe/load_imbalance"] == pytest.approx(imbalance, rel=1e-9)
    assert found["moe/dead_experts"] == pytest.approx(dead, abs=1e-9)
    assert found["moe/router_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["moe/aux_loss"] == pytest.approx(loss, rel=1e-5)


def test_experts_that_nobody_reaches_are_dead() -> None:
    """Routers that know two of eight experts: six are dead, and the two take four times their share."""
    policy = moe_policy(PolicyConfig())
    with torch.no_grad():
        for router in policy.routing.routers:
            router.module.weight[2:] = 0.0
            router.module.weight[:2] = 0.0
            router.module.weight[:2, 0] = torch.tensor([50.0, 60.0])
        for name, parameter in policy.model.named_parameters():
            if "post_attention_layernorm" in name:  # the routers' input: its first feature is always positive
                parameter.zero_()
    found = step(policy, cut(rows_of(3, near=True), CUTS[0]))[0]
    # All logits are equal then, so top-k takes the same two experts for every token.
    assert found["moe/dead_experts"] == 0.75
    assert found["moe/load_imbalance"] == pytest.approx(4.0)
    assert found["moe/router_entropy"] == pytest.approx(torch.log(torch.tensor(8.0)).item(), rel=1e-5)
    assert found["moe/aux_loss"] == pytest.approx(1.0, rel=1e-5)


def largest(tensors: Sequence[Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors)


def aux_gradient(rows: MicroBatch, cuts: Sequence[Sequence[int]], config: PolicyConfig) -> list[Tensor]:
    """What the auxiliary loss adds to the gradient, over its weight."""
    pure = config.model_copy(update={"aux_loss_coef": 0.0})
    with_it, without = (step(moe_policy(c), cut(rows, cuts))[1] for c in (config, pure))
    return [(a - b) / config.aux_loss_coef for a, b in zip(with_it, without, strict=True)]


@pytest.mark.parametrize("attention", ["rows", "sdpa", "varlen"])
def test_the_loss_is_the_formulas(attention: str) -> None:
    """Its gradient is that of L written out in float64 over single trajectories, in 1, 2 and 5 micro-batches. With f
    of each micro-batch instead of the whole's it would be another one."""
    rows = rows_of(3, near=True)
    model = moe_policy(PolicyConfig(experts="eager")).model.double()
    layers = routed(model, rows, 2)
    loss = sum(4 * (c.mean(0) * p.mean(0)).sum() for p, c in layers) / len(layers)
    loss.backward()
    expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    scale = largest(expected)
    assert scale > 1e-3
    for cuts in CUTS:
        found = aux_gradient(rows, cuts, PolicyConfig(attention=attention, aux_loss_coef=AUX))
        assert largest([a - b for a, b in zip(found, expected, strict=True)]) < 2e-5 * scale
    apart = torch.zeros(())
    model.zero_grad(set_to_none=True)
    tokens = sum(len(p) for p, _ in layers)
    for part in CUTS[1]:
        some = rows_of(3, near=True)
        some.advantages[~torch.isin(torch.arange(ROWS), torch.tensor(list(part)))] = 0.0
        found_layers = routed(model, some, 2)
        apart = apart + sum(
            4 * len(p) / tokens * (c.mean(0) * p.mean(0)).sum() for p, c in found_layers
        ) / len(found_layers)
    apart.backward()
    other = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    assert largest([a - b for a, b in zip(other, expected, strict=True)]) > 1e-2 * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_count_once_and_keep_the_gradient(dtype: Any) -> None:
    """With gradient checkpointing a layer's forward runs twice: metrics and gradient do not notice."""
    rows = rows_of(3, near=True)
    kept, again = (
        step(
            moe_policy(PolicyConfig(dtype=dtype, aux_loss_coef=AUX, gradient_checkpointing=g)),
            cut(rows, CUTS[1]),
        )
        for g in (False, True)
    )
    assert kept[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_a_model_balanced_by_a_bias_has_its_own_probabilities() -> None:
    """DeepSeek-V3's sigmoid scores, divided by their sum; what is chosen is what its router chose, bias and groups
    included."""
    policy = Policy(family("DeepseekV3", n_routed_experts=8, num_experts_per_tok=2), tiny_tokenizer(), "v3")
    (router,) = policy.routing.routers
    bias = torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 4.0])
    router.module.e_score_correction_bias.copy_(bias)
    p = router.probabilities(torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.8808]]) / 1.3808, rtol=1e-4, atol=0)
    found = step(policy, cut(rows_of(3, near=True), CUTS[0]))[0]
    assert found["moe/dead_experts"] == 0.75 and found["moe/load_imbalance"] == 4.0


def test_the_loss_evens_out_the_experts() -> None:
    """Steps on the same rows with the loss spread the tokens more evenly than steps without it."""
    last = {}
    for aux in (0.0, 0.3):
        policy = moe_policy(PolicyConfig(aux_loss_coef=aux))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
        learner = Learner(policy, optimizer, GrpoLossConfig(), 1e9)
        batch = cut(rows_of(3, near=True), CUTS[1])
        results = [learner.train([batch], recompute_old=True) for _ in range(25)]
        last[aux] = results[-1]["moe/aux_loss"] - results[0]["moe/aux_loss"]
    assert last[0.3] < -0.05 < last[0.0]


def test_what_does_not_fit_a_dense_model_is_refused() -> None:
    """By setting and architecture."""
    with pytest.raises(
        ConfigError, match=r"tiny: policy\.aux_loss_coef=0\.001 needs a mixture of experts .*Llama"
    ):
        Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig(aux_loss_coef=1e-3))
    with pytest.raises(
        ConfigError, match=r'tiny: policy\.experts="eager" has no effect: Llama\w+ has no fused'
    ):
        Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig(experts="eager"))
    with pytest.raises(
        ConfigError, match=r"tiny: policy\.train_router=false has no effect: Llama\w+ has no router"
    ):
        Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig(train_router=False))
    policy = Policy(tiny_model("llama"), tiny_tokenizer(), "tiny")
    assert policy.experts is None
    assert not any(name.startswith("moe/") for name in step(policy, cut(rows_of(3), CUTS[0]))[0])


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "GptOss"])
def test_routers_can_stay_as_they_are(name: str) -> None:
    """Everything else moves; a checkpoint holds what trains; the published weights are whole."""
    policy = Policy(family(name), tiny_tokenizer(), name, PolicyConfig(train_router=False))
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    routers = {
        f"{router.name}.{n}" for router in policy.routing.routers for n, _ in router.module.named_parameters()
    }
    learner = Learner(policy, torch.optim.AdamW(policy.parameters(), lr=1e-3), GrpoLossConfig(), 1.0)
    learner.step(cut(rows_of(3, near=True), CUTS[0]))
    after = dict(policy.model.named_parameters())
    assert routers and {n for n, p in after.items() if not p.requires_grad} == routers
    assert {n for n in after if torch.equal(after[n], before[n])} == routers
    assert trained_state(policy.model).keys() == after.keys() - routers
    assert state_of(policy.model).keys() == state_of(family(name)).keys()
    with pytest.raises(ValueError, match=r"train_router=false has no effect with lora\.rank=2"):
        PolicyConfig(train_router=False, lora=LoraConfig(rank=2))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_how_experts_multiply_is_chosen_once(name: str) -> None:
    """auto is grouped products, whatever config.json says; the ways agree in float32."""
    model = family(name)
    model.config._experts_implementation = "eager"
    ids = torch.arange(12)[None]
    policy = Policy(model, tiny_tokenizer(), name)
    assert policy.experts == "grouped_mm" == model.config._experts_implementation
    found = policy.hidden(ids)
    for way in ("eager", "batched_mm"):
        other = Policy(family(name), tiny_tokenizer(), name, PolicyConfig(experts=way))
        assert other.experts == way
        torch.testing.assert_close(other.hidden(ids), found, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """What two ranks found, and what they refused: see tests/moe_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.moe_ranks", str(folder))
    found, refused = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("found", "refused"))
    return found, refused


@pytest.mark.parametrize("cut_of", [*(f"cp/{number}" for number in range(len(CUTS))), *DIVIDED])
def test_ranks_that_divide_rows_route_their_own_tokens(two_ranks: Any, cut_of: str) -> None:
    """Two ranks of mesh.cp: every token counts once and padding nowhere, so the routers' metrics, the auxiliary loss
    and the gradient are those of one process, for each cut and each architecture."""
    alone = moe_policy(PolicyConfig(aux_loss_coef=AUX)) if "/" in cut_of else mixture(cut_of, MeshConfig())
    metrics, gradient = step(alone, cut(rows_of(3, near=True), CUTS[1]))
    theirs, grads = two_ranks[0][cut_of]
    assert theirs.keys() == metrics.keys() and "moe/aux_loss" in theirs
    for name in theirs:
        assert theirs[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    assert len(grads) == len(gradient) and largest(gradient) > 1e-4
    assert largest([a - b for a, b in zip(grads, gradient, strict=True)]) < 1e-5 * largest(gradient)


@pytest.mark.parametrize("name", UNDIVIDED)
def test_a_mixture_that_needs_whole_rows_is_refused(two_ranks: Any, name: str) -> None:
    """Sinks and layers that carry a state, by the setting."""
    assert "policy.mesh.cp=2" in two_ranks[1][name] and name not in two_ranks[0]


def test_two_ranks_report_and_learn_what_one_does(two_ranks: Any) -> None:
    """The routers of both ranks' tokens together: metrics and gradient of one process, for every cut; one rank has
    micro-batches without rows. Adapters of experts likewise."""
    found, _ = two_ranks
    for aux in (0.0, AUX):
        metrics, gradient = step(
            moe_policy(PolicyConfig(aux_loss_coef=aux)), cut(rows_of(3, near=True), CUTS[0])
        )
        for number in range(len(CUTS)):
            theirs, grads = found[f"{aux}/{number}"]
            assert theirs.keys() == metrics.keys() and "moe/aux_loss" in theirs
            for name in theirs:
                if name.startswith("moe/"):
                    assert theirs[name] == pytest.approx(metrics[name], rel=1e-5), name
            assert largest([a - b for a, b in zip(grads, gradient, strict=True)]) < 1e-5 * largest(gradient)
    for name, config in OTHERS.items():
        metrics, gradient = step(moe_policy(config), cut(rows_of(3, near=True), CUTS[1]))
        theirs, grads = found[name]
        bound = 1e-5 if config.dtype == "float32" else 2e-2
        assert theirs["moe/aux_loss"] == pytest.approx(metrics["moe/aux_loss"], rel=bound), name
        assert len(grads) == len(gradient) and largest(gradient) > 1e-4, name
        assert largest([a - b for a, b in zip(grads, gradient, strict=True)]) < bound * largest(gradient), (
            name
        )
