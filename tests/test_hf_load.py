"""Versions into the in-process engine, whole and as patches: exact to the bit, or refused with the old one intact."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.engines.hf.memory import Device, Host, Memory, Strided, memory_of, parts_of
from mgrpo.errors import CorruptionError, InfrastructureError
from mgrpo.model.policy import Policy, state_of
from mgrpo.weights import layout as cut
from mgrpo.weights.layout import Layout, Slice
from mgrpo.weights.patch import difference
from mgrpo.weights.version import Part, Weights
from tests.families import family
from tests.models import tiny_model, tiny_policy, tiny_tokenizer
from tests.version_kit import Versions, moved, versions

pytestmark = pytest.mark.usefixtures("one_thread", "short_slices")
FAMILIES = ["shift", "llama", "Qwen3Moe", "GptOss", "GPTNeoX", "DeepseekV3"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of tiny models have many slices, which begin and end within their rows."""
    monkeypatch.setattr(cut, "SLICE", 1 << 10)


def model_of(name: str, seed: int = 0) -> Any:
    return tiny_model(name, seed) if name in ("shift", "llama") else family(name, seed)  # type: ignore[arg-type]


def engine_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 9) -> HfEngine:
    return HfEngine(Policy(model_of(name, seed).to(dtype), tiny_tokenizer(), name), slots=4)


def load(engine: HfEngine, weights: object, version: int = 1) -> None:
    asyncio.run(engine.load(weights, version))


def holds(engine: HfEngine, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Bit for bit, in the engine's dtype."""
    own = state_of(engine.policy.model)
    assert own.keys() == state.keys()
    return all(torch.equal(own[n], t.to(dtype) if t.is_floating_point() else t) for n, t in state.items())


def copies(engine: HfEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(engine.policy.model).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_holds_what_the_trainer_holds(name: str, dtype: torch.dtype) -> None:
    """A whole version and ten patches, of which some come together: after each the engine's weights are the trainer's
    rounded to the engine's dtype, in the memory where they were."""
    engine, state = engine_of(name, dtype), {n: t.clone() for n, t in state_of(model_of(name)).items()}
    where = {n: t.data_ptr() for n, t in engine.policy.model.named_parameters()}
    with versions(dtype) as sent:
        held = sent.put(state)
        load(engine, sent.whole(), held)
        assert holds(engine, state, dtype) and engine.label == "main.e1.v1"
        for step in range(10):
            state = moved(state, step, 0.9 if step == 4 else 0.03)
            newest = sent.put(state)
            if step not in (2, 7):
                load(engine, sent.since(held), newest)
                held = newest
                assert holds(engine, state, dtype)
                assert (engine.version, engine.label) == (newest, f"main.e1.v{newest}")
    assert where == {n: t.data_ptr() for n, t in engine.policy.model.named_parameters()}


@pytest.mark.parametrize("name", ["shift", "GptOss"])
def test_a_patch_that_ends_in_other_bytes_is_undone(name: str) -> None:
    """The last slice of the second of two patches has another checksum than the trainer's: the error names tensor and
    version, the engine serves its old version to the bit, and takes the right patch afterwards."""
    engine, state = engine_of(name), dict(state_of(model_of(name)))
    with versions() as sent:
        load(engine, sent.whole() if sent.put(state) else None)
        for step in range(2):
            state = moved(state, step)
            sent.put(state)
        right, wrong = sent.since(1), sent.since(1)
        before = copies(engine)
        flip_checksum(wrong.parts[1])
        last = list(cut_of(right))[-1]
        with pytest.raises(
            CorruptionError, match=rf"{last} of main.e1.v3, bytes \d+\.\.\d+: not the trainer's"
        ):
            load(engine, wrong, 3)
        assert holds(engine, before) and (engine.version, engine.label) == (1, "main.e1.v1")
        load(engine, right, 3)
        assert holds(engine, state) and engine.version == 3


def cut_of(weights: Weights) -> Iterator[str]:
    """Names of the tensors that its last patch changes, in order."""
    *_, (_, changes) = weights.patches()
    return (weights.layout.tensors[change.slice.tensor].name for change in changes)


def flip_checksum(part: Part) -> None:
    """A bit of the last change's checksum; the head of a patch is 4 + 16 bytes a change."""
    (count,) = part.spool.read(0, 4).view("<u4").tolist()
    at = 4 + 16 * count - 4
    part.spool.write(at, bytes([int(part.spool.read(at, 1)[0]) ^ 1]))


def test_a_patch_that_is_cut_or_damaged_changes_nothing() -> None:
    """A payload of which a bit is flipped, and a patch without its last bytes."""
    engine, state = engine_of("llama"), dict(state_of(model_of("llama")))
    with versions() as sent:
        sent.put(state)
        load(engine, sent.whole())
        sent.put(moved(state, 1))
        before = copies(engine)
        data = sent.since(1).parts[0].spool
        for where in (data.size // 2, data.size - 3):
            bad = sent.since(1)
            bad.parts[0].spool.write(where, bytes([int(data.read(where, 1)[0]) ^ 64]))
            with pytest.raises(CorruptionError):
                load(engine, bad, 2)
            assert holds(engine, before) and engine.version == 1
        short = sent.since(1)
        short.parts[0].spool.size -= 5
        with pytest.raises(CorruptionError):
            load(engine, short, 2)
        assert holds(engine, before) and engine.label == "main.e1.v1"


def test_a_patch_of_another_version_is_refused() -> None:
    """Of a version before, of another role, or where the engine's weights came without a label."""
    engine, state = engine_of("shift"), dict(state_of(model_of("shift")))
    with versions() as sent, versions(role="sub") as other:
        for step in range(3):
            sent.put(moved(state, step))
            other.put(moved(state, step))
        load(engine, sent.whole(), 3)
        before = copies(engine)
        for weights in (sent.since(1), other.since(2)):
            with pytest.raises(
                CorruptionError, match=rf"is a patch of {weights.base}, the engine holds main.e1.v3"
            ):
                load(engine, weights, 3)
        load(engine, state, 7)
        assert engine.label == ""
        with pytest.raises(CorruptionError, match="the engine holds weights without a label"):
            load(engine, sent.since(2), 3)
        assert holds(engine, state) and not holds(engine, before)


def test_weights_of_another_model_are_refused_by_name() -> None:
    """Another dtype, shape or name, whole or as a patch: nothing is touched, and the engine serves on."""
    engine, state = engine_of("llama"), dict(state_of(model_of("llama")))
    before = copies(engine)
    norm = "model.norm.weight"
    cases: list[tuple[str, dict[str, Tensor], torch.dtype | None]] = [
        (r"weights have \S+ as BF16, the engine holds F32", state, torch.bfloat16),
        (rf"weights have {norm} of shape \(3,\), expected \(32,\)", state | {norm: torch.ones(3)}, None),
        (rf"weights lack {norm}", {n: t for n, t in state.items() if n != norm}, None),
        ("weights have extra, which this model does not", state | {"extra": torch.ones(3)}, None),
    ]
    for message, tensors, dtype in cases:
        with versions(dtype) as sent:
            sent.put(tensors)
            whole = sent.whole()
            with pytest.raises(ValueError, match=message):
                load(engine, whole)
            sent.put(moved(tensors, 1))
            with pytest.raises(ValueError, match=message):
                load(engine, sent.since(1))
    with pytest.raises(ValueError, match="came without weights"):
        load(engine, Weights("main.e1.v1", 1, Layout.of([])))
    with pytest.raises(ValueError, match="5 bytes of weights are not in safetensors format"):
        load(engine, b"abcde")
    assert holds(engine, before) and engine.version == 0


def test_names_of_tied_tensors_are_not_applied_twice() -> None:
    """A sender that names the head beside the embedding that it is: XOR twice would undo the patch."""
    engine, model = engine_of("shift"), model_of("shift")
    assert model.lm_head.weight is model.model.embed_tokens.weight

    def with_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}

    state = dict(state_of(model))
    with versions() as sent:
        sent.put(with_head(state))
        load(engine, sent.whole())
        state = moved(state, 5)
        sent.put(with_head(state))
        load(engine, sent.since(1), 2)
    assert holds(engine, state)


def test_bytes_and_tensors_come_in_any_dtype() -> None:
    """What is loaded by hand, without a label, is cast as ever."""
    engine, state = engine_of("llama", torch.bfloat16), dict(state_of(model_of("llama")))
    load(engine, safetensors.torch.save(state), 4)
    assert holds(engine, state, torch.bfloat16) and (engine.version, engine.label) == (4, "")


def test_a_damaged_whole_version_changes_nothing() -> None:
    """A flipped byte is found by its slice's checksum before the first byte is written."""
    engine, state = engine_of("llama"), dict(state_of(model_of("llama")))
    with versions() as sent:
        sent.put(state)
        weights, before = sent.whole(), copies(engine)
        at = weights.parts[0].spool.size - 2
        weights.parts[0].spool.write(at, bytes([int(weights.parts[0].spool.read(at, 1)[0]) ^ 1]))
        with pytest.raises(CorruptionError, match=r"arrived damaged"):
            load(engine, weights)
        assert holds(engine, before)


def test_torn_weights_sample_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a whole version cannot be read to their end: no token comes from half of it, under any label; the
    next whole version heals the engine."""
    engine, state = engine_of("llama"), dict(state_of(model_of("llama")))

    def ask() -> np.ndarray[Any, Any]:
        return asyncio.run(engine.generate([3, 4], SamplingParams(4), seed=1)).versions

    with versions() as sent:
        sent.put(state)
        load(engine, sent.whole())
        sent.put(moved(state, 1))
        whole, patch = sent.whole(), sent.since(1)
        read, calls = Weights.slices, 0

        def breaks(self: Weights) -> Iterator[Any]:
            for number, piece in enumerate(read(self)):
                if number == 7:
                    raise OSError("the disk is gone")
                yield piece

        monkeypatch.setattr(Weights, "verify", lambda self: None)
        monkeypatch.setattr(Weights, "slices", breaks)
        with pytest.raises(OSError, match="the disk is gone"):
            load(engine, whole, 2)
        monkeypatch.undo()
        with pytest.raises(InfrastructureError, match="its weights are torn"):
            ask()
        with pytest.raises(CorruptionError, match="the engine holds torn weights"):
            load(engine, patch, 2)
        load(engine, whole, 2)
        assert ask().tolist() == [2] * 4 and calls == 0


def test_every_token_has_the_log_prob_of_its_version_across_a_patch() -> None:
    """A request during which patches arrive: each token's log-prob is that which a model with the weights of its
    version gives to the whole history."""
    engine, states = engine_of("llama"), [dict(state_of(model_of("llama")))]
    prompt = [5, 17, 3, 8]

    async def use(sent: Versions) -> Any:
        await engine.load(sent.whole(), 1)
        job = asyncio.create_task(engine.generate(prompt, SamplingParams(20), seed=3))
        for version in (2, 3):
            while engine._arrays.count.max() < 6 * (version - 1):
                await asyncio.sleep(0)
            states.append(moved(states[-1], version, 0.3))
            sent.put(states[-1])
            await engine.load(sent.since(version - 1), version)
        return await job

    with versions() as sent:
        sent.put(states[0])
        out = asyncio.run(asyncio.wait_for(use(sent), 60))
    assert out.versions.tolist() == [1] * 6 + [2] * 6 + [3] * 8
    row = torch.tensor([[*prompt, *out.token_ids.tolist()]])
    for version, state in enumerate(states, 1):
        policy = tiny_policy("llama")
        policy.model.load_state_dict(state)
        with torch.no_grad():
            logits = policy.vocabulary.logits(policy.hidden(row)[0], policy.head_weight)
        given = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
        of_it = out.versions == version
        assert np.abs(out.logprobs - given.numpy())[of_it].max() < 1e-4
        assert np.abs(out.logprobs - given.numpy())[~of_it].max() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "GptOss"])
def test_versions_reach_a_gpu(name: str) -> None:
    """As test_the_engine_holds_what_the_trainer_holds, on an accelerator: changed elements go there, or slices."""
    model = model_of(name, 9).to("cuda", torch.bfloat16)
    engine = HfEngine(Policy(model, tiny_tokenizer(), name), slots=4)
    state = dict(state_of(model_of(name)))
    with versions(torch.bfloat16) as sent:
        load(engine, sent.whole() if sent.put(state) else None)
        for version in (2, 3):
            state = moved(state, version, 0.03 if version == 2 else 0.9)
            sent.put(state)
            load(engine, sent.since(version - 1), version)
            held = state_of(engine.policy.model)
            assert all(torch.equal(held[n].cpu(), t.bfloat16()) for n, t in state.items())


# -- memory of every kind --


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous, transposed, cut out of larger ones, with one dimension and with none."""
    g = torch.Generator().manual_seed(2)

    def of(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 100).to(dtype)

    return {
        "plain": of(7, 11),
        "line": of(97),
        "number": of(),
        "transposed": of(11, 7).T,
        "cut": of(5, 9, 8)[1:4, 2:7, ::2],
        "column": of(30, 3)[:, 1],
        "turned": of(4, 5, 6).permute(2, 0, 1),
    }


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8])
@pytest.mark.parametrize("name", list(tensors(torch.float32)))
def test_slices_of_any_memory(name: str, dtype: torch.dtype) -> None:
    """Reading, writing and changing slices gives what the same does to a contiguous copy, and touches nothing else: of
    what the copy's bytes are, whether or not a tensor is contiguous, and by elements as on an accelerator."""
    tensor = tensors(dtype)[name]
    size, g = tensor.element_size(), np.random.default_rng(4)
    kinds: list[type[Memory]] = [Strided, *((Host, Device) if tensor.is_contiguous() else ())]
    assert isinstance(memory_of(tensor), Host if tensor.is_contiguous() else Strided)
    for kind in kinds:
        for start, stop in ((0, tensor.numel()), (1, tensor.numel() - 1), (3, 13), (8, 9)):
            if not 0 <= start < stop <= tensor.numel():
                continue
            at = tensors(dtype)[name]
            piece = Slice(0, 0, start * size, stop * size, 0)
            memory, whole = kind(at), at.clone(memory_format=torch.contiguous_format).view(-1)
            old = whole[start:stop].clone().view(torch.uint8).numpy()
            assert np.array_equal(memory.read(piece), old)
            for share in (0.05, 0.9):  # sparse, dense
                new = old ^ (g.random(old.shape) < share) * g.integers(0, 256, old.shape, np.uint8)
                change = difference(piece, size, old, new)
                if change is None:
                    continue
                memory.apply(change)
                assert change.check(memory.read(piece)) and np.array_equal(memory.read(piece), new)
                memory.apply(change)
                assert np.array_equal(memory.read(piece), old)
                memory.write(piece, new)
                whole[start:stop].view(torch.uint8).numpy()[:] = new
                bits = at.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
                assert torch.equal(bits, whole.view(torch.uint8))
                old = new


def test_parts_are_few() -> None:
    """A slice of a matrix is at most its first row's rest, whole rows and its last row's beginning."""
    matrix = torch.arange(60).view(6, 10).T.contiguous().T
    parts = list(parts_of(matrix, 13, 47))
    assert [part.numel() for part in parts] == [7, 20, 7]
    assert torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(13, 47))
