"""policy.compile: what torch.compile makes of the decoder layers, captured without its C++ compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import trained
from mgrpo.model.policy import Policy
from mgrpo.model.probe import probe, probe_ids
from tests.models import tiny_model, tiny_tokenizer
from tests.moe_ranks import moe_policy
from tests.shared_kit import forest, furthest, gradients, micro_batch, sampled_near, share_everything
from tests.test_attention import batch

# torch hides it from users, and not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def captured_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graphs are captured and run as they are: the code that inductor writes is not the matter of these tests."""
    monkeypatch.setattr(trained, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def policy(**settings: Any) -> Policy:
    torch.manual_seed(0)
    return Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig.model_validate(settings))


def states_and_gradients(policy: Policy) -> list[torch.Tensor]:
    hidden = policy.hidden_before(*batch())
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    wanted = [p for p in policy.model.base_model.parameters() if p.requires_grad]
    return [hidden.detach(), *torch.autograd.grad((hidden * target).mean(), wanted)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16", "gradient_checkpointing": True, "lora": {"rank": 2}}],
    ids=["float32", "bfloat16, adapters, checkpointing"],
)
def test_the_same_numbers_from_few_graphs(settings: dict[str, Any]) -> None:
    """Hidden states and gradients are those without compiling, to the bit; every layer and every number of tokens
    shares one graph, unbroken; the probe, which is in float32, is computed as it was written."""
    compiled = policy(**settings, compile=True)
    for a, b in zip(states_and_gradients(compiled), states_and_gradients(policy(**settings)), strict=True):
        assert torch.equal(a, b)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2 and not counters["graph_break"]
    ids, lengths, scored = batch()
    compiled.hidden_before(ids[1:], lengths[1:], scored[1:])
    ours, other = (probe(p, probe_ids(compiled, 32)) for p in (compiled, policy(**settings)))
    assert ours == other
    assert counters["stats"]["unique_graphs"] == graphs


def test_shared_prefixes_take_the_graphs_of_their_first_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over a tree is left out of the graphs, so that another tree needs no others; gradients are those of
    whole rows."""
    share_everything(monkeypatch)
    compiled, whole = policy(compile=True), policy(share_prefixes=False)
    assert compiled.shares, compiled.why_not
    graphs = 0
    for seed in range(3):
        g = np.random.default_rng(seed)
        rows = sampled_near(whole, micro_batch(forest(seed)[0], g), g)
        found, expected = (gradients(p, [rows], GrpoLossConfig())[0] for p in (compiled, whole))
        assert furthest(found, expected) < 1e-5
        graphs = graphs or counters["stats"]["unique_graphs"]
    assert 0 < graphs == counters["stats"]["unique_graphs"]


def test_what_cannot_be_compiled_is_refused() -> None:
    """A mixture of experts, and layers on several ranks, by name."""
    with pytest.raises(ConfigError, match=r"policy\.compile=true with .*mixture of experts"):
        moe_policy(PolicyConfig(compile=True))
    for more in ({"ranks": 2}, *({"mesh": {cut: 2, "dp": 2}} for cut in ("tp", "cp", "ep", "replicate"))):
        with pytest.raises(ValidationError, match=r"compile=true and ranks=[24] exclude each other"):
            PolicyConfig.model_validate({"compile": True} | more)
