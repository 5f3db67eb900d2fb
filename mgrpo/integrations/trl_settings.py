"""What each setting of TRL 1.16's GRPOConfig means to MGRPOTrainer and to AgentTrainer, and which values are refused.

`SETTINGS` has every field that GRPOConfig defines; the fields that it inherits from transformers' TrainingArguments do
what they do in any Trainer, apart from those in `_REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

import mgrpo
from mgrpo.errors import ConfigError

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
"""TRL's loss types that mgrpo has; each computes there what it computes here."""

HONOURED, NO_EFFECT, RUN, ONLY_DEFAULT = "honoured", "no effect", "the run's", "refused unless default"

SETTINGS: dict[str, tuple[str, str]] = {  # name -> (in MGRPOTrainer, in AgentTrainer)
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "cast_lm_head_to_fp32"), (HONOURED, HONOURED)),
    "disable_dropout": (HONOURED, "always on"),
    "router_aux_loss_coef": ("only 0 with experts", RUN),
    **dict.fromkeys(
        (
            *(
                "beta",
                "use_bias_correction_kl",
                "epsilon",
                "epsilon_high",
                "delta",
                "loss_type",
                "temperature",
            ),
            *("sapo_temperature_neg", "sapo_temperature_pos", "importance_sampling_level", "num_iterations"),
            *("max_completion_length", "scale_rewards", "multi_objective_aggregation", "reward_weights"),
            *(
                "mask_truncated_completions",
                "sync_ref_model",
                "ref_model_mixup_alpha",
                "ref_model_sync_steps",
            ),
            *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "use_vllm"),
            *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
            "vllm_importance_sampling_cap",
        ),
        (HONOURED, RUN),
    ),
    **dict.fromkeys(
        (
            *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min"),
            *("entropy_coef_max", "entropy_coef_delta", "entropy_target", "off_policy_mask_threshold"),
            *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        ),
        (ONLY_DEFAULT, ONLY_DEFAULT),
    ),
    **dict.fromkeys(
        (
            *("num_generations", "num_generations_eval", "ds3_gather_for_generation", "shuffle_dataset"),
            *(
                "pad_to_multiple_of",
                "generation_batch_size",
                "steps_per_generation",
                "top_p",
                "top_k",
                "min_p",
            ),
            *("generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation"),
            *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
            *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
            *("vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
            *(
                "vllm_tensor_parallel_size",
                "max_tool_calling_iterations",
                "log_completions",
                "log_multimodal",
            ),
            *("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
            *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
            "use_transformers_paged",
        ),
        (HONOURED, NO_EFFECT),
    ),
}
"""How MGRPOTrainer and AgentTrainer treat each setting that GRPOConfig defines. "the run's": run.toml decides, and the
setting must keep GRPOConfig's default."""

_REFUSED: dict[
    str, tuple[Callable[[Any], bool], str]
] = {  # for both trainers: name -> (is refused, what to set)
    "loss_type": (lambda x: x not in LOSSES, f"one of {', '.join(LOSSES)}"),
    "entropy_coef": (bool, "0.0"),
    "use_adaptive_entropy": (bool, "False"),
    "top_entropy_quantile": (lambda x: x < 1.0, "1.0"),
    "off_policy_mask_threshold": (lambda x: x is not None, "None"),
    "deepspeed": (bool, "None, and use DDP or FSDP"),
    "use_liger_kernel": (bool, "False; the head and the loss are mgrpo's"),
    "torch_compile": (bool, "False"),
}


def refuse(args: Any, *, votes: bool) -> None:
    """ConfigError for the first setting of `args` that MGRPOTrainer cannot honour. votes: whether rows of sub-agents
    are to come."""
    for name, (refused, instead) in _REFUSED.items():
        value = getattr(args, name)
        if refused(value):
            raise ConfigError(f"{name}: {value!r} cannot be honoured; set {instead}")
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    mode = args.vllm_importance_sampling_mode
    if corrected and mode.startswith("token") and args.importance_sampling_level == "sequence":
        raise ConfigError(
            f"vllm_importance_sampling_mode: {mode!r} cannot be honoured with importance_sampling_level 'sequence'; "
            f"set {mode.replace('token', 'sequence')!r}"
        )
    if votes and args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f"multi_objective_aggregation: {args.multi_objective_aggregation!r} cannot be honoured for rows of "
            "sub-agents; set 'sum_then_normalize'"
        )


def refuse_for_agent(args: Any, role: str) -> None:
    """ConfigError for the first setting that AgentTrainer cannot honour: what a run decides by its own file must keep
    GRPOConfig's default."""
    for name in ("deepspeed", "use_liger_kernel", "torch_compile"):
        refused, instead = _REFUSED[name]
        if refused(getattr(args, name)):
            raise ConfigError(f"{name}: {getattr(args, name)!r} cannot be honoured; set {instead}")
    for field in fields(args):
        if SETTINGS.get(field.name, ("", ""))[1] not in (RUN, ONLY_DEFAULT):
            continue
        value = getattr(args, field.name)
        if value != field.default:
            raise ConfigError(
                f"{field.name}: {value!r} has no effect on agent {role!r}, whose loss and sampling are the run's; "
                f"leave {field.default!r} and set agents.{role} in the run's file"
            )
    if args.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"gradient_accumulation_steps: {args.gradient_accumulation_steps} cannot be honoured: the run cuts its "
            "minibatches itself; set 1"
        )


def loss_config(args: Any) -> mgrpo.GrpoLossConfig:
    """The settings of the loss that GRPOTrainer computes with `args`. ConfigError where one is out of bounds."""
    given: dict[str, Any] = {
        "type": args.loss_type,
        "temperature": args.temperature,
        "kl_coef": args.beta,
        # TRL has no bound; float32 has one near 88 nats, for a product of two ratios at half of it
        "log_ratio_clip": 30.0 if args.beta and args.use_bias_correction_kl else 60.0,
    }
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "sapo":
        given |= {name: getattr(args, name) for name in ("sapo_temperature_pos", "sapo_temperature_neg")}
    elif args.loss_type == "cispo":
        given["clip_eps_high"] = high
    else:
        given |= {"clip_eps_low": args.epsilon, "clip_eps_high": high, "delta": args.delta}
    if args.loss_type == "dr_grpo":
        given["max_completion_length"] = args.max_completion_length
    if args.importance_sampling_level != "token":
        given["ratio_level"] = args.importance_sampling_level
    if args.beta and args.use_bias_correction_kl:
        given["kl_bias_correction"] = True
    try:
        return mgrpo.GrpoLossConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc'])) or 'loss'}: {first['msg']}") from error
