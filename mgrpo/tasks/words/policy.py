"""A fresh policy for the task: a token-shift decoder and a tokenizer with one token per word.

The learning rate of SFT falls with the width. One update of Adam changes each weight by about the
learning rate, and so a product with `width` inputs by width times as much. With 4e-3 at width 96 the attention
logits in SFT run away: every head puts all its weight on one place, a softmax has no gradient there,
and RL can no longer find a rule such as "open what was asked for", only answers by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mgrpo.tasks.words.protocol import NONE, PAD, STOP

MODEL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,  # with 4, a choice among the three results blurs: one head has to see them all
}

BASE_WIDTH, BASE_LR = 64, 4e-3


def sft_lr(width: int) -> float:
    """4e-3 at width 64, in proportion to 1 / width."""
    return BASE_LR * BASE_WIDTH / width


def build_tokenizer(vocabulary: Sequence[str], positions: int) -> Any:
    """Words split at white space; a word outside the vocabulary reads as `none`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token=NONE))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=NONE,
        pad_token=PAD,
        eos_token=STOP,
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )


def build_policy(seed: int, path: str, width: int, vocabulary: Sequence[str], positions: int = 128) -> None:
    """Write a randomly initialised model and its tokenizer to the folder `path`, Hugging Face layout.
    positions: words of the longest trajectory."""
    import torch

    from mgrpo.model.policy import Policy, save_policy
    from mgrpo.tasks.atlas.decoder import ShiftDecoderConfig, ShiftDecoderForCausalLM

    tokenizer = build_tokenizer(vocabulary, positions)
    config = ShiftDecoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=positions,
        **MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ShiftDecoderForCausalLM(config)
    save_policy(Policy(model, tokenizer, path), path)
