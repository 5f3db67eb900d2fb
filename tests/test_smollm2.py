"""examples/smollm2: the converter's formulas and files against hand-made ones, and the example's configs."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mgrpo.config import RunConfig, load_config
from mgrpo.environments.loader import load_task
from mgrpo.model.loading import load_policy
from mgrpo.run.folder import started_engines
from tests.runs import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"
MODEL = EXAMPLE.parent.parent / "models" / "smollm2"
RNG = np.random.default_rng(5)


def module(name: str) -> ModuleType:
    """A file of the example as the module it is when the example runs as a script."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


reader: Any = module("gguf_reader")
convert: Any = module("convert")
result: Any = module("result")


# -- writing GGUF, value by value --


def half(x: float) -> bytes:
    return struct.pack("<e", x)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Type and value of one metadata entry."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, list):
        kind = 8 if isinstance(item[0], str) else 5
        head = struct.pack("<IIQ", 9, kind, len(item))
        return head + b"".join(string(i) if kind == 8 else struct.pack("<i", i) for i in item)
    return struct.pack("<II", 4, item)


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]
) -> None:
    """tensors: name -> (type, shape outermost first, data)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % 32)
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += content
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def q8_0(values: np.ndarray) -> bytes:
    """Blocks of 32 with scale 1/16 of integers."""
    rows = values.reshape(-1, 32)
    return b"".join(half(0.0625) + row.astype(np.int8).tobytes() for row in rows)


# -- dequantisation --


def test_q4_1_blocks() -> None:
    """x = d q + m; low halves are the first 16 values, high halves the last 16."""
    packed = RNG.integers(0, 256, 16, dtype=np.uint8)
    block = half(0.5) + half(-3.0) + packed.tobytes()
    got = reader.BLOCKS[3].decode(np.frombuffer(block * 2, np.uint8).reshape(2, 20))
    wanted = [0.5 * (b & 15) - 3.0 for b in packed] + [0.5 * (b >> 4) - 3.0 for b in packed]
    assert got.dtype == np.float32 and got.tolist() == [wanted, wanted]


def test_q8_0_blocks() -> None:
    """x = d q with signed q."""
    q = RNG.integers(-128, 128, 32).astype(np.int8)
    got = reader.BLOCKS[8].decode(np.frombuffer(half(0.25) + q.tobytes(), np.uint8).reshape(1, 34))
    assert got.tolist() == [[0.25 * int(x) for x in q]]


def test_q6_k_blocks() -> None:
    """Value by value from the description of the format, written as the loops that llama.cpp has in mind."""
    low, high = RNG.integers(0, 256, 128), RNG.integers(0, 256, 64)
    scales = RNG.integers(-128, 128, 16)
    wanted = np.zeros(256)
    for n in range(2):
        for i in range(32):
            a, b, h = int(low[64 * n + i]), int(low[64 * n + 32 + i]), int(high[32 * n + i])
            quarters = (a & 15, b & 15, a >> 4, b >> 4)
            for j, bits in enumerate(quarters):
                q = (bits | ((h >> (2 * j)) & 3) << 4) - 32
                at = 128 * n + 32 * j + i
                wanted[at] = 0.125 * int(scales[at // 16]) * q
    block = bytes(low.tolist()) + bytes(high.tolist()) + scales.astype(np.int8).tobytes() + half(0.125)
    got = reader.BLOCKS[14].decode(np.frombuffer(block, np.uint8).reshape(1, 210))
    assert got[0].tolist() == wanted.tolist()


def test_tensors_and_metadata_are_found(tmp_path: Path) -> None:
    """Shapes come outermost first, data from their own offsets, metadata by their keys."""
    a, b = RNG.normal(size=(3, 5)).astype("<f4"), RNG.normal(size=7).astype("<f2")
    metadata = {"a.b": "text", "n": 7, "x": 0.5, "list": ["p", "q"], "ints": [1, -2]}
    write_gguf(tmp_path / "m.gguf", metadata, {"a": (0, (3, 5), a.tobytes()), "b": (1, (7,), b.tobytes())})
    with reader.GgufFile(tmp_path / "m.gguf") as file:
        assert file.metadata == metadata and list(file.names()) == ["a", "b"]
        assert (file.tensor("a") == a).all() and (file.tensor("b") == b.astype(np.float32)).all()
        assert file.type_name("b") == "F16"
        with pytest.raises(reader.GgufError, match="no tensor 'c'"):
            file.tensor("c")


def test_bad_files_are_named(tmp_path: Path) -> None:
    """Every error says which file and what is wrong with it."""
    path = tmp_path / "m.gguf"
    good = {"a": (0, (2, 4), np.zeros(8, "<f4").tobytes())}
    for content, message in (
        (b"", "0 bytes, too short"),
        (b"PK\x03\x04" + bytes(40), "begins with"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, expected"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "ends at byte 24"),
    ):
        path.write_bytes(content)
        with pytest.raises(reader.GgufError, match=message):
            reader.GgufFile(path)
    write_gguf(path, {}, {"a": (2, (2, 32), b"")})
    with pytest.raises(reader.GgufError, match="tensor a has type 2, expected one of 0"):
        reader.GgufFile(path)
    write_gguf(path, {}, {"a": (3, (2, 33), b"")})
    with pytest.raises(reader.GgufError, match="33 values, expected a multiple of 32"):
        reader.GgufFile(path)
    write_gguf(path, {}, good)
    path.write_bytes(path.read_bytes()[:-4])
    with reader.GgufFile(path) as file, pytest.raises(reader.GgufError, match="tensor a ends after the file"):
        file.tensor("a")


# -- a whole model --

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, INNER, HEADS, KV = 64, 96, 4, 2


def tiny_gguf(path: Path, layers: int = 1) -> dict[str, np.ndarray]:
    """A Llama in Q8_0; the float values that were written, by GGUF name."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*WORDS, *alphabet, "th", "Ġth"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["t h", "Ġ th"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{part}": (HIDDEN, HIDDEN) for part in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.attn_{part}": (HIDDEN // HEADS * KV, HIDDEN) for part in "kv"}
        shapes |= {f"blk.{layer}.ffn_{part}": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{layer}.{part}_norm": (HIDDEN,) for part in ("attn", "ffn")}
    tensors, values = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values[name] = RNG.uniform(0.5, 1.5, shape).astype(np.float32)
            tensors[f"{name}.weight"] = (0, shape, values[name].astype("<f4").tobytes())
        else:
            q = RNG.integers(-4, 5, shape)
            values[name] = q * 0.0625
            tensors[f"{name}.weight"] = (8, shape, q8_0(q))
    write_gguf(path, metadata, tensors)
    return values


def rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """llama.cpp's rotation of (T, heads, d): neighbours (2i, 2i + 1) by t / theta^(2i / d)."""
    steps, _, d = x.shape
    angle = np.arange(steps)[:, None, None] / theta ** (np.arange(0, d, 2) / d)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    out[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    return out


def logits(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The model in float64 numpy, in llama.cpp's layout: it knows nothing of the converter."""

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    n, d = len(ids), HIDDEN // HEADS
    x = w["token_embd"][ids]
    h = norm(x, w["blk.0.attn_norm"])
    q = rotated((h @ w["blk.0.attn_q"].T).reshape(n, HEADS, d), 1e5)
    k = rotated((h @ w["blk.0.attn_k"].T).reshape(n, KV, d), 1e5).repeat(HEADS // KV, axis=1)
    v = (h @ w["blk.0.attn_v"].T).reshape(n, KV, d).repeat(HEADS // KV, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, HIDDEN)
    x = x + mixed @ w["blk.0.attn_output"].T
    h = norm(x, w["blk.0.ffn_norm"])
    gate = h @ w["blk.0.ffn_gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w["blk.0.ffn_up"].T)) @ w["blk.0.ffn_down"].T
    return np.asarray(norm(x, w["output_norm"]) @ w["token_embd"].T)


def test_a_converted_model_computes_what_the_gguf_says(tmp_path: Path) -> None:
    """Names, the order of rotated rows, grouped heads, rotation base and the tied head: one wrong, other logits."""
    values = tiny_gguf(tmp_path / "m.gguf")
    convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    policy = load_policy(tmp_path / "out")
    ids = policy.tokenizer.encode("the thin 42nd", add_special_tokens=False)
    with torch.no_grad():
        got = policy.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    wanted = logits(values, ids)
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight


def test_a_converted_tokenizer_merges_splits_digits_and_chats(tmp_path: Path) -> None:
    """Merges apply, digits stand alone, control tokens are one id, any text comes back, the template is the file's."""
    tiny_gguf(tmp_path / "m.gguf")
    convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_policy(tmp_path / "out").tokenizer
    assert tokenizer.tokenize("the th") == ["th", "e", "Ġth"]
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    for text in ("naïve  日本\n\t{x}", "a<|im_end|>b", " 12 ", "𝄞"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids.count(2) == text.count("<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_the_folder_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle leaves nothing; an existing folder is never touched; bfloat16 is written as such."""
    tiny_gguf(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:

        def fails(*_: object, **__: object) -> None:
            raise OSError("disk full")

        patch.setattr(convert.safetensors.torch, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    convert.convert(tmp_path / "m.gguf", tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o644}
    with pytest.raises(FileExistsError, match="exists already"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "out")


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    """Another architecture, a tensor without a place, a tokenizer of another kind."""
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "gemma"}, {})
    with pytest.raises(reader.GgufError, match="architecture 'gemma', expected 'llama'"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(reader.GgufError, match=r"'blk\.0\.attn_bias\.weight' has no place"):
        convert.hugging_face_name("blk.0.attn_bias.weight")
    with pytest.raises(reader.GgufError, match="expected \\('gpt2', 'smollm'\\)"):
        convert.build_tokenizer({"tokenizer.ggml.model": "llama"})


# -- the example's configs --


@pytest.mark.parametrize("name", ["smollm2", "smollm2-shared", "qwen3-gpu"])
def test_configs_are_valid(name: str) -> None:
    """All files load, name two policies of their own, and their task takes their options."""
    config = load_config(EXAMPLE / f"{name}.toml")
    assert {config.policy_of(role) for role in config.roles} == {"main", "sub"} == set(config.training_roles)
    load_task(config.task, config.roles)


def test_the_config_without_vllm_is_valid() -> None:
    """What `make smollm2 ENGINE=hf` overrides."""
    sets = [f'agents.{role}.engine={{type="hf",dtype="bfloat16"}}' for role in ("main", "sub")]
    config = load_config(EXAMPLE / "smollm2.toml", sets)
    assert {config.agents[role].engine.type for role in config.roles} == {"hf"}


def test_the_shared_config_differs_in_what_is_shared_alone() -> None:
    """One server, or one base in the worker; task, rewards, sizes are those of smollm2.toml, so that the two can be
    compared."""
    apart, shared = (load_config(EXAMPLE / f"{name}.toml") for name in ("smollm2", "smollm2-shared"))
    assert [len(started_engines(config)) for config in (apart, shared)] == [2, 1]
    sets = ['agents.main.engine={type="hf",dtype="bfloat16",adapters=true}']
    config = load_config(EXAMPLE / "smollm2-shared.toml", sets)
    assert all(agent.engine.type == "hf" and agent.engine.adapter_only for agent in config.agents.values())

    def rest(config: RunConfig) -> dict[str, Any]:
        tree = config.model_dump()
        for agent in tree["agents"].values():
            del agent["engine"], agent["policy"], agent["optimizer"]
        return tree

    assert rest(apart) == rest(shared)


RUN = """
seed = 1
[task]
name = "tests.murmur:MurmurTask"
[agents.main]
model = "{model}"
max_length = 64
reward = {{ format = 0.2, correct = 0.8 }}
optimizer = {{ lr = 1e-3 }}
policy = {{ dtype = "bfloat16", last_layers = 1 }}
engine = {{ dtype = "bfloat16" }}
[agents.sub]
model = "{model}"
max_length = 64
reward = {{ outcome = 0.5, expert = 0.5 }}
optimizer = {{ lr = 1e-3 }}
policy = {{ dtype = "bfloat16", last_layers = 1 }}
engine = {{ dtype = "bfloat16" }}
[trainer]
steps = 3
questions = 2
group_size = 4
minibatches = 1
[eval]
every = 10
validation = 1
heldout = 1
start_validation = 1
[record]
checkpoints_mb = 0
"""


def test_two_copies_of_one_folder_become_two_policies(tmp_path: Path) -> None:
    """Trained as the example trains, from one folder: both move away from it and from each other, only in the last
    layer and the final norm, and result.py says so."""
    tiny_gguf(tmp_path / "m.gguf", layers=2)
    convert.convert(tmp_path / "m.gguf", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run.toml").write_text(RUN.format(model=tmp_path / "model"))
    train(tmp_path / "run.toml", tmp_path / "out")
    start = load_file(tmp_path / "model" / "model.safetensors")
    main, sub = (load_file(tmp_path / "out/agents" / r / "final/model.safetensors") for r in ("main", "sub"))
    for name, value in start.items():
        trained = name.startswith(("model.layers.1.", "model.norm."))
        assert torch.equal(main[name], value) != trained, name
        assert torch.equal(sub[name], value) != trained, name
        assert torch.equal(main[name], sub[name]) != trained, name
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    lines = result.report(tmp_path / "out")
    assert [line.split(":")[0] for line in lines[-3:]] == [
        "main, start to end",
        "sub, start to end",
        "main to sub, at the end",
    ]
    assert all(": 10 of 20 tensors differ, by " in line for line in lines[-3:])
    assert sum(line[:4].strip().isdigit() for line in lines) == 3  # one line a step
    assert any(line.startswith("heldout at step 3: sampled ") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="make smollm2-model was not run")
def test_the_real_model_chats() -> None:
    """The converted SmolLM2 knows the capital of France."""
    policy = load_policy(MODEL)
    ids = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = policy.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in policy.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
