"""examples/qwen3_moe: its config is valid, and trains two steps with tiny random models in the place of the large."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mgrpo.config import load_config
from mgrpo.environments.loader import load_task
from mgrpo.metrics import read_metrics
from mgrpo.model.policy import Policy, save_policy
from tests.chat_templates import QWEN3
from tests.families import family
from tests.runs import summary, train

CONFIG = Path(__file__).parent.parent / "examples" / "qwen3_moe" / "qwen3-30b-a3b.toml"
FUSED = '{ rank = 2, targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"] }'


def test_the_config_is_valid() -> None:
    """It loads, names two policies of their own, fits 64 GPUs, and its task takes its options."""
    config = load_config(CONFIG)
    assert {config.policy_of(role) for role in config.roles} == {"main", "sub"} == set(config.training_roles)
    servers = sum(len(config.agents[role].engine.running_servers) for role in config.roles)
    assert sum(config.ranks(role) for role in config.roles) + 8 * servers == 64
    load_task(config.task, config.roles)


def test_it_trains_with_tiny_models(tmp_path: Path) -> None:
    """Two steps on a CPU: one agent with all its weights and the auxiliary loss, the other with adapters on attention
    and experts. Both leave a checkpoint's names, their experts have moved, and their routers are reported."""
    tokenizer = QWEN3.tokenizer()
    tokens = len(tokenizer) + 3
    shape = {"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    save_policy(Policy(family("Qwen3Moe", vocab_size=tokens, **shape), tokenizer), tmp_path / "model")
    here = {"model": f'"{tmp_path / "model"}"', "engine": '{ type = "hf" }', "max_length": "128"}
    sets = [f"agents.{role}.{name}={value}" for role in ("main", "sub") for name, value in here.items()]
    sets += [
        f"agents.{role}.policy.{name}" for role in ("main", "sub") for name in ('device="cpu"', "ranks=1")
    ]
    sets += ['task={ name = "tests.murmur:MurmurTask" }', "agents.main.policy.aux_loss_coef=1e-3"]
    sets += [
        f"agents.sub.policy.lora={FUSED}",
        "agents.sub.optimizer.lr=1e-3",
        "agents.main.optimizer.lr=1e-3",
    ]
    sets += ["trainer.steps=2", "trainer.questions=4", "trainer.group_size=4", "trainer.micro_batch=256"]
    sets += ["eval.validation=1", "eval.heldout=1", "eval.start_validation=1"]
    train(CONFIG, tmp_path / "out", *sets)
    assert summary(tmp_path / "out")["finished"]
    start = load_file(tmp_path / "model" / "model.safetensors")
    for role in ("main", "sub"):
        final = load_file(tmp_path / "out" / "agents" / role / "final" / "model.safetensors")
        assert final.keys() == start.keys()
        assert "model.layers.1.mlp.experts.7.down_proj.weight" in final
        moved = {name for name in final if not torch.equal(final[name].float(), start[name].float())}
        assert any(".experts." in name for name in moved), role
    found = {name: value for record in read_metrics(tmp_path / "out") for name, value in record.items()}
    for role in ("main", "sub"):
        assert 1.0 <= found[f"{role}/moe/load_imbalance"] <= 4.0
        assert 0.0 <= found[f"{role}/moe/dead_experts"] <= 0.75
        assert 0.0 < found[f"{role}/moe/router_entropy"] < 2.1
