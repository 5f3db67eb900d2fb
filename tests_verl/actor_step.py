# ruff: noqa: E402 - the platform is set before verl's other modules look at it
"""One optimizer step of verl's own actor worker (FSDP2 on one process) on a CPU, against mgrpo's weighted loss.

Run as a program: it sets verl's platform, which a process has once. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

os.environ |= {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the class of engine, which verl registers for no CPU

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA


class Cpu(PlatformCUDA):
    """verl's platform for a machine without an accelerator."""

    device_name = "cpu"  # type: ignore[assignment]
    device_module = torch.cpu  # type: ignore[assignment]

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self) -> None:
        pass


torch.cpu.max_memory_allocated = torch.cpu.max_memory_reserved = lambda: 0  # type: ignore[attr-defined]
platform_manager.set_platform(Cpu())

from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl_kit import LOSS_TYPES, Team, batch_of, make_team, mgrpo_config

import mgrpo

PROMPT, VOCABULARY, LR = 4, 32, 0.05
OVERRIDES = (
    "model.use_remove_padding=False",
    "model.enable_gradient_checkpointing=False",
    "actor.strategy=fsdp2",
    "actor.ppo_micro_batch_size_per_gpu=1",
    "actor.fsdp_config.use_torch_compile=False",
    "actor.optim.optimizer=SGD",
    f"actor.optim.lr={LR}",
    "actor.optim.clip_grad=1e9",
    "actor.optim.weight_decay=0",
)


def model_folder(folder: str) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(folder)
    return folder


def rows(values: Tensor) -> Tensor:
    """(B, S) as verl's workers hold it: nested."""
    return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)


def our_step(model: Any, ids: Tensor, team: Team, mode: str) -> tuple[float, float]:
    """SGD on the weighted loss, through linear_grpo_loss; returns the norm of the gradient and the loss."""
    assigned = team.assign()
    hidden = model.model(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
    count, width = team.mask.shape
    loss, _ = mgrpo.linear_grpo_loss(
        hidden.reshape(count * width, -1),
        model.lm_head.weight,
        ids[:, PROMPT:].flatten(),
        config=mgrpo.GrpoLossConfig(**LOSS_TYPES[mode], delta=3.0),
        cu_seqlens=torch.arange(0, count * width + 1, width, dtype=torch.int32),
        advantages=torch.from_numpy(assigned.advantage).float(),
        seq_weight=torch.from_numpy(assigned.weight).float(),
        loss_mask=team.mask.flatten(),
        old_logprobs=team.old_logprobs.flatten(),
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.optim.SGD(model.parameters(), lr=LR).step()
    return float(norm), float(loss.detach())


def actor_worker(folder: str, config: Any) -> TrainingWorker:
    """verl's worker of one process, made as ActorRolloutRefWorker makes its actor."""
    model_config = omega_conf_to_dataclass(config.model)
    actor = omega_conf_to_dataclass(config.actor)
    actor.model_config = model_config
    actor.engine.use_dynamic_bsz = actor.use_dynamic_bsz
    actor.engine.micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
    settings = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    worker = TrainingWorker(settings)
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def compare(mode: str, folder: str) -> dict[str, float]:
    """Loss, norm and weights after one step of verl's worker, and how far they are from our_step's."""
    team = make_team(12, queries=1, width=6)
    config = mgrpo_config(
        f"actor_rollout_ref.actor.loss_agg_mode={mode}",
        "actor_rollout_ref.actor.loss_scale_factor=32",
        f"actor_rollout_ref.model.path={folder}",
        *(f"actor_rollout_ref.{override}" for override in OVERRIDES),
        "+actor_rollout_ref.model.load_tokenizer=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    )
    worker = actor_worker(folder, config.actor_rollout_ref)
    advantages = compute_advantage(batch_of(team), "mgrpo", config=config.algorithm).batch["advantages"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (len(team.mask), PROMPT + team.mask.shape[1]), generator=generator)
    columns = {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": team.mask,
        "loss_mask": team.mask,
        "old_log_probs": team.old_logprobs,
        "advantages": advantages,
    }
    batch = TensorDict({name: rows(column) for name, column in columns.items()}, batch_size=len(ids))
    tu.assign_non_tensor(
        batch, temperature=1.0, mini_batch_size=len(ids), global_batch_size=len(ids), epochs=1
    )
    metrics = tu.get(worker.train_mini_batch(batch), "metrics")
    own = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    before = {name: value.clone() for name, value in own.state_dict().items()}
    norm, loss = our_step(own, ids, team, mode)
    trained = {name: value.full_tensor() for name, value in worker.engine.module.state_dict().items()}
    after = own.state_dict()
    return {
        "loss": loss,
        "loss_gap": abs(metrics["loss"][0] - loss),
        "norm": norm,
        "norm_gap": abs(metrics["grad_norm"][0] - norm),
        "moved": max(float((after[name] - before[name]).abs().max()) for name in after),
        "weight_gap": max(float((after[name] - trained[name]).abs().max()) for name in after),
    }


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = model_folder(sys.argv[1])
    print(json.dumps({mode: compare(mode, model) for mode in sys.argv[2:]}))
