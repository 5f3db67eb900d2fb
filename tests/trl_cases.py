"""A tiny model, a tokenizer of words and made-up generations, for the tests of mgrpo inside TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, PROMPT, COMPLETION, ROWS = 48, 5, 9, 4


def save_model(folder: Path, tied: bool = False) -> str:
    """A Llama of two layers with its tokenizer; its logits are far from uniform."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    fast.save_pretrained(folder)
    return str(folder)


def arguments(folder: Path, **more: Any) -> Any:
    """GRPOConfig for the CPU in float32, everything else as TRL has it."""
    from trl import GRPOConfig

    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": ROWS,
        "num_generations": 2,
        "max_completion_length": COMPLETION,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return GRPOConfig(**(given | more))


def prompts(n: int = 8) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"w{3 + i} w{9 + i}" for i in range(n)]})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs between completions."""
    return [float(sum(map(ord, text)) % 7) / 7 for text in completions]


def build(kind: Any, model: str, args: Any, **more: Any) -> Any:
    """A trainer, after the part of train() that _compute_loss needs."""
    made = kind(model, reward, args, train_dataset=prompts(), **more)
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    made.model.train()
    return made


def generation(seed: int, rows: int = ROWS, **without: bool) -> dict[str, torch.Tensor]:
    """What _generate_and_score_completions returns: prompts padded on the left, completions on the right, one of a
    single token; log-probs near the policy's for old, reference and sampler."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, VOCABULARY, (rows, PROMPT), generator=g)
    completion = torch.randint(2, VOCABULARY, (rows, COMPLETION), generator=g)
    prompt_lengths = torch.randint(1, PROMPT + 1, (rows, 1), generator=g)
    lengths = torch.randint(1, COMPLETION + 1, (rows, 1), generator=g)
    lengths[0], lengths[1] = 1, COMPLETION
    prompt_mask = (torch.arange(PROMPT) >= PROMPT - prompt_lengths).long()
    mask = (torch.arange(COMPLETION) < lengths).long()
    tool = (torch.rand(rows, COMPLETION, generator=g) < 0.7).long()
    tool[:, 0] = 1
    batch = {
        "prompt_ids": prompt * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": completion * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        "num_items_in_batch": (mask * tool).sum(),
        "noise": torch.randn(3, rows, COMPLETION, generator=g),
        "tool_mask": tool,
    }
    if without.get("tools", False):
        batch.pop("tool_mask")
        batch["num_items_in_batch"] = mask.sum()
    return batch
