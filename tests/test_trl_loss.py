"""The loss that mgrpo computes inside TRL's trainer is TRL's own: value, gradient, and all settings that move them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

from trl import GRPOTrainer  # noqa: E402

from mgrpo.errors import ConfigError  # noqa: E402
from mgrpo.integrations import trl_settings  # noqa: E402
from mgrpo.integrations.trl import MGRPOTrainer, add_grpo_head  # noqa: E402
from tests import trl_cases as cases  # noqa: E402
from tests import trl_ranks as ranks  # noqa: E402

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Folders of the model with its head untied and tied."""
    return {tied: cases.save_model(tmp_path_factory.mktemp(f"m{tied}"), tied) for tied in (False, True)}


def gradients(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def with_logprobs(trainer: Any, batch: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Log-probs near the policy's: of the old policy, of the reference, and the ratio of the engines."""
    noise = batch.pop("noise")
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -cases.COMPLETION - 1 : -1]
    logps = torch.log_softmax(logits.float() / trainer.temperature, -1)
    logps = logps.gather(-1, batch["completion_ids"][..., None])[..., 0]
    if not settings.pop("on_policy", False):
        batch["old_per_token_logps"] = logps + 0.3 * noise[0]
    if (engines := settings.pop("engines", None)) is not None:
        ratio = (0.3 * noise[2]).exp()
        ratio = ratio.mean(1, keepdim=True) if engines == "sequence" else ratio
        batch["importance_sampling_ratio"] = torch.where(ratio > 1.3, 0.0, ratio)  # a mask mode
    if trainer.beta:
        batch["ref_per_token_logps"] = logps + 0.3 * noise[1]


def both(models: dict[bool, str], folder: Path, tied: bool = False, **settings: Any) -> tuple[Any, Any]:
    special = {k: settings.pop(k) for k in ("on_policy", "tools", "engines") if k in settings}
    args = [cases.arguments(folder, **settings) for _ in range(2)]
    theirs = cases.build(GRPOTrainer, models[tied], args[0])
    ours = cases.build(MGRPOTrainer, models[tied], args[1])
    batch = cases.generation(7, tools=special.pop("tools", False))
    with_logprobs(theirs, batch, special)
    for trainer in (theirs, ours) if "importance_sampling_ratio" in batch else ():
        trainer.use_vllm = True  # no server is asked: the ratio is what it would have led to
    return gradients(theirs, batch), gradients(ours, batch)


def distance(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """Largest difference of the gradients, over the largest entry of TRL's."""
    assert theirs.keys() == ours.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((theirs[n] - ours[n]).abs().max()) for n in theirs) / largest


GRID: list[dict[str, Any]] = [
    *({"loss_type": kind, "epsilon_high": 0.28} for kind in CLIPPED),
    *({"loss_type": kind, "delta": 1.3, "beta": 0.1} for kind in CLIPPED),
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "beta": 0.1},
    {"loss_type": "dapo", "temperature": 0.7, "beta": 0.05},
    {"loss_type": "dapo", "temperature": 1.4, "on_policy": True},
    {"loss_type": "grpo", "on_policy": True, "tools": True},
    {"loss_type": "cispo", "epsilon_high": 5.0, "on_policy": True},
    {"loss_type": "dapo", "tied": True, "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "gradient_accumulation_steps": 4},
    {"loss_type": "dapo", "gradient_accumulation_steps": 4, "steps_per_generation": 8},
    {"loss_type": "bnpo", "cast_lm_head_to_fp32": True, "tied": True},
    {"loss_type": "dapo", "engines": "token", "beta": 0.1, "vllm_importance_sampling_mode": "token_mask"},
    {"loss_type": "sapo", "engines": "sequence"},
    {"loss_type": "cispo", "engines": "token", "vllm_importance_sampling_mode": "token_truncate"},
    {"loss_type": "grpo", "engines": "sequence", "importance_sampling_level": "sequence", "beta": 0.1},
]


@pytest.mark.parametrize("settings", GRID, ids=lambda s: "-".join(f"{v}" for v in s.values()))
def test_loss_and_gradient_are_trls(
    models: dict[bool, str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Value to 1e-7, gradient to 1e-6 of its largest entry, in float32."""
    (loss, grads), (mine, my_grads) = both(models, tmp_path, **settings)
    assert mine == pytest.approx(loss, abs=1e-7, rel=1e-6)
    assert distance(grads, my_grads) < 1e-6
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_under_autocast_ours_is_no_farther_from_float32(
    models: dict[bool, str], tmp_path: Path, tied: bool
) -> None:
    """bf16=True, GRPOConfig's default: backbone and operands of the head are rounded in the same places in both; TRL
    rounds the logits too. So the two agree to bfloat16's rounding, and ours is no farther from float32 than TRL's."""
    settings = {"loss_type": "dapo", "beta": 0.1, "tied": tied}
    _, (exact, exact_grads) = both(models, tmp_path, **settings)
    (loss, grads), (mine, my_grads) = both(models, tmp_path, bf16=True, **settings)
    assert mine == pytest.approx(loss, abs=1e-2)
    assert abs(mine - exact) < 1.2 * abs(loss - exact) + 2e-3
    assert 0 < distance(exact_grads, my_grads) < 1.2 * distance(exact_grads, grads) + 1e-3


REFUSED = [
    ({"loss_type": "luspo"}, "loss_type: 'luspo' cannot be honoured; set one of grpo"),
    ({"loss_type": "vespo"}, "loss_type"),
    ({"entropy_coef": 0.01}, "entropy_coef: 0.01 cannot be honoured; set 0.0"),
    ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: 0.2 cannot be honoured; set 1.0"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ({"torch_compile": True}, "torch_compile"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "importance_sampling_level": "sequence"},
     "vllm_importance_sampling_mode: 'token_mask' .* set 'sequence_mask'"),
    ({"temperature": 0.0}, "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused_before_a_model_is_loaded(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MGRPOTrainer("no/such/model", cases.reward, cases.arguments(tmp_path, **given), cases.prompts())
    assert "\n" not in str(error.value)


def test_every_setting_of_grpo_config_has_its_place() -> None:
    """A version of TRL with a new setting fails here, not in a run."""
    from dataclasses import fields

    from transformers import TrainingArguments
    from trl import GRPOConfig

    inherited = {field.name for field in fields(TrainingArguments)}
    assert {field.name for field in fields(GRPOConfig)} - inherited == set(trl_settings.SETTINGS)
    assert set(trl_settings._REFUSED) <= {field.name for field in fields(GRPOConfig)}


def test_the_page_says_of_each_setting_what_it_does() -> None:
    """docs/embedding/trl.md names every setting in the row of what the two trainers make of it."""
    page = (Path(__file__).parent.parent / "docs" / "embedding" / "trl.md").read_text()
    for name, (ours, agents) in trl_settings.SETTINGS.items():
        rows = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert len(rows) == 1, name
        assert f"| {ours} | {agents} |" in rows[0], name


def test_a_head_that_the_loss_does_not_know_is_refused(models: dict[bool, str]) -> None:
    """A bias or a soft cap behind the head would change the logits without a word."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[False])
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"final_logit_softcapping 30\.0 acts on the logits"):
        add_grpo_head(model)
    model.config.final_logit_softcapping = None
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(cases.VOCABULARY))
    with pytest.raises(ConfigError, match="has a bias"):
        add_grpo_head(model)


def test_generation_does_not_see_the_head(models: dict[bool, str]) -> None:
    """Without `grpo` the forward is the model's own, and unknown arguments are still refused by generate()."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[False])
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    add_grpo_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 6
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(ids, max_new_tokens=3, nonsense=1)
    with pytest.raises(ValueError, match="loss_mask: 3 tokens a row"):
        model(input_ids=ids, grpo={"loss_mask": torch.ones(1, 3)})


def test_a_whole_training_is_trls(models: dict[bool, str], tmp_path: Path) -> None:
    """LoRA with a KL term, two micro-batches a step, two iterations over a generation: the losses of TRL's loop agree
    to five digits, and so do the adapters at the end."""
    from peft import LoraConfig

    ended = []
    for kind in (GRPOTrainer, MGRPOTrainer):
        args = cases.arguments(
            tmp_path, beta=0.1, gradient_accumulation_steps=2, num_iterations=2, max_steps=4, loss_type="grpo"
        )
        trainer = kind(
            models[False], ranks.score, args, cases.prompts(6), rollout_func=ranks.rollouts_alone,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"),
        )  # fmt: skip
        trainer.train()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        adapters = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n}
        ended.append((logs, adapters))
    (theirs, a), (ours, b) = ended
    assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in theirs], rel=1e-5, abs=1e-7)
    assert [x["grad_norm"] for x in ours] == pytest.approx([x["grad_norm"] for x in theirs], rel=1e-4)
    assert ours[-1]["kl"] > 0
    assert all(torch.allclose(a[n], b[n], rtol=0, atol=1e-6) for n in a)
