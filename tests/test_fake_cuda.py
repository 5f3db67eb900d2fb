"""Every path of the trainer, of replay and of the in-process engine that a GPU would run, on tensors that pass for a
GPU's (fake_cuda.py): nothing lies on the wrong device or in the wrong dtype, results are the CPU's, and the host waits
for the device where docs/kernels.md says so and nowhere else.

A policy that is sharded over ranks is left out: its parameters are DTensors, which ask torch's C++ where the tensors
that they hold lie, and say that they are in main memory (docs/kernels.md, Waiting for the device).

Triton's interpreter is chosen when the kernels are imported, so the tests run in a process of their own.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo import grpo_loss, linear_grpo_loss
from mgrpo.config import load_config
from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.model.probe import probe, probe_ids
from mgrpo.model.stream import WeightStream
from mgrpo.pipeline.batch import StepBatch
from mgrpo.pipeline.replay import Replayer
from mgrpo.record.reader import Recording
from mgrpo.record.schema import StepSettings
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.checkpoint import latest_checkpoint, save_checkpoint
from mgrpo.trainers.torch.learner import Learner, adamw, logprobs_of
from mgrpo.weights.publisher import WeightPublisher
from tests.families import family
from tests.loss_grid import settings
from tests.models import tiny_model, tiny_tokenizer
from tests.rows import routed, rows_of
from tests.runs import RELAY
from tests.shared_kit import share_everything
from tests.test_attention import MODELS
from tests.version_kit import moved, versions

ROOT = Path(__file__).parent.parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="run by test_device_paths_without_a_device")
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")
seen: Counter[str] = Counter()
"""Every wait of the tests of this process."""


@pytest.mark.skipif(INTERPRETING, reason="is the process that it starts")
@pytest.mark.timeout(1200)
def test_device_paths_without_a_device() -> None:
    """Run this file's tests with TRITON_INTERPRET=1; their failures are printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from tests.fake_cuda import fake_cuda

    torch.set_num_threads(1)
    with fake_cuda(monkeypatch) as device:
        yield device
        seen.update({place: n for place, n in device.waits.items() if place.startswith("mgrpo.")})


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    if name == "shift":
        return tiny_model("shift")
    return (MODELS[name]() if name in MODELS else family(name)).eval()


def policy_of(name: str, device: str, **more: Any) -> Policy:
    from tests.fake_cuda import put

    if device == "cpu":
        more = {**more, "activation_offload": False}  # which a policy in main memory refuses
    config = PolicyConfig.model_validate({"device": device, **more})
    model = model_of(name)
    return Policy(put(model) if device == "cuda" else model, tiny_tokenizer(), name, config)


def minibatch(alike: bool = False) -> MiniBatch:
    """alike: all rows begin alike, with a prefix that is held and some tokens more."""
    rows = routed(rows_of(1, near=True), 2, 2, 1)
    if alike:
        rows.ids[:, :6], rows.prefix = rows.ids[0, :6], rows.ids[0, :3]
    parts = [rows.rows(torch.arange(len(rows.lengths)) % 2 == i) for i in range(2)]
    return MiniBatch(parts, float(rows.weights.sum()))


def trained(
    policy: Policy, loss: Any, reference: Policy | None, alike: bool = False
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics of one step with recomputed log-probs, and the parameters after it."""
    from tests.fake_cuda import unwrap

    optimizer = adamw(policy, 1e-3)
    learner = Learner(policy, optimizer, loss, 1.0, reference)
    metrics = learner.train([minibatch(alike)], recompute_old=True)
    return metrics, [unwrap(p.detach()).clone() for p in policy.model.parameters()]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, padded": ("llama-gqa", {"attention": "sdpa"}, {}),
    "qwen3, packed": ("qwen3", {"attention": "varlen", "dtype": "bfloat16"}, {}),
    "qwen3, KL and two phases": ("qwen3", {"attention": "sdpa"}, {"type": "gspo", "kl_coef": 0.1}),
    "mixture": ("Qwen3Moe", {"attention": "sdpa", "aux_loss_coef": 0.1, "routing_replay": True}, {}),
    "offload": ("llama-gqa", {"attention": "sdpa", "activation_offload": True}, {}),
    "checkpoints and offload, packed": (
        "qwen3",
        {
            "attention": "varlen",
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
            "activation_offload": True,
        },
        {},
    ),
    "adapters": ("qwen3", {"attention": "sdpa", "lora": {"rank": 2}}, {"kl_coef": 0.1}),
    "shared prefixes": ("qwen3", {"attention": "varlen", "dtype": "bfloat16"}, {}),
}


@inside
@numpy_warns
@pytest.mark.parametrize("case", CASES)
def test_a_training_step(case: str, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed log-probs, forward, loss, backward, clip and optimizer step: metrics and weights are the CPU's."""
    name, options, terms = CASES[case]
    loss = settings(terms.get("type", "dapo"), **{k: v for k, v in terms.items() if k != "type"})

    def reference(device: str, policy: Policy) -> Policy | None:
        if not terms.get("kl_coef"):
            return None
        return policy.base() if "lora" in options else policy_of(name, device, attention="sdpa")

    policy = policy_of(name, "cuda", **options)
    there = reference("cuda", policy)
    cuda.waits.clear()  # those of loading
    if alike := case == "shared prefixes":
        share_everything(monkeypatch)
    metrics, weights = trained(policy, loss, there, alike)
    assert (cuda.pinned > 0) == options.get("activation_offload", False)
    if case == "checkpoints and offload, packed":  # neither makes the host wait
        assert dict(cuda.waits) == waits_of_a_step()
    here = policy_of(name, "cpu", **options)
    expected, exact = trained(here, loss, reference("cpu", here), alike)
    tolerance = 2e-2 if options.get("dtype") == "bfloat16" else 1e-4
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    # Adam's first step is the learning rate in the gradient's direction, whatever its size: where a gradient is all
    # but 0 its sign is rounding's.
    off = torch.cat([(a - b).abs().flatten() for a, b in zip(weights, exact, strict=True)])
    assert float(off.max()) <= 2.1e-3 and float((off > 1e-4).float().mean()) < 0.02


@inside
@numpy_warns
def test_a_step_waits_as_often_as_the_page_says(cuda: Any) -> None:
    """One step of two micro-batches, with recomputed log-probs: the counts of the page's table, and no place that it
    does not name."""
    policy = policy_of("qwen3", "cuda", attention="varlen", dtype="bfloat16")
    cuda.waits.clear()
    trained(policy, settings("dapo"), None)
    page, found = waits_of_a_step(), dict(cuda.waits)
    assert found == page, f"docs/kernels.md, Waiting for the device, in this step: {sorted(found.items())}"


@inside
@numpy_warns
def test_publishing(cuda: Any) -> None:
    """The weight stream and the publisher send what the CPU's send, in the engine's dtype; each tensor is copied to the
    host once."""
    there, here = policy_of("qwen3", "cuda"), policy_of("qwen3", "cpu")
    cuda.waits.clear()
    sums = []
    for policy in (there, here):
        publisher = WeightPublisher(torch.bfloat16)
        try:
            publisher.publish("a", 1, WeightStream(policy.model).read())
            sums.append(publisher._history.sums("a"))
            assert sums[-1] is not None
        finally:
            publisher.close()
    assert len(sums[0]) == len(sums[1]) > 0
    for a, b in zip(*sums, strict=True):
        np.testing.assert_array_equal(a, b)
    tensors = len(WeightStream(here.model).tensors)
    assert sum(cuda.waits.values()) == tensors, cuda.waits


@inside
@numpy_warns
def test_log_probs_and_the_probe(cuda: Any) -> None:
    """What replay compares and what a server's weights are judged by."""
    there, here = policy_of("llama-gqa", "cuda"), policy_of("llama-gqa", "cpu")
    cuda.waits.clear()
    rows = rows_of(3)
    torch.testing.assert_close(logprobs_of(there, rows, 0.7).cpu(), logprobs_of(here, rows, 0.7))
    found = probe(there, probe_ids(here, 24))
    assert found.logprobs == pytest.approx(probe(here, found.token_ids).logprobs, abs=1e-5)


@inside
@numpy_warns
@pytest.mark.parametrize("config", [settings("dapo", kl_coef=0.1), settings("gspo")], ids=lambda c: c.type)
def test_padded_rows_and_what_nobody_looks_at(config: Any, cuda: Any) -> None:
    """Padded calls with a float mask, token weights and values of tokens are the CPU's, with one wait a pass over the
    head and none from logits. A weight that is not finite and a -100 under the mask make idle rows that are counted; a
    denominator below 0 makes the loss NaN."""
    from tests import test_padded

    data = test_padded.batch()
    data["loss_mask"] = data["loss_mask"] * 0.5
    passes = 3 if config.type == "gspo" else 2  # of them one for the rows that the loss leaves out
    for op, waits in ((linear_grpo_loss, passes), (grpo_loss, 0)):
        expected = test_padded.run(data, config, op, tokens=True)
        there = {name: x.to("cuda") for name, x in data.items()}
        cuda.waits.clear()
        found = test_padded.run(there, config, op, tokens=True)
        assert sum(cuda.waits.values()) == waits, cuda.waits
        torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
        bad = {name: x.clone() for name, x in data.items()}
        bad["token_weight"][0, 1], bad["target_ids"][0, 3] = float("inf"), -100
        loss, metrics, *_ = test_padded.run({k: x.to("cuda") for k, x in bad.items()}, config, op)
        assert loss.cpu().isfinite() and int(metrics["nonfinite_rows"].cpu()) == 2
        loss = test_padded.run(there, config, op, denominator=torch.tensor(-1.0).to("cuda"))[0]
        assert loss.cpu().isnan()
    cuda.waits.clear()


BOUNDS = {"grpo_loss": (15, 20), "linear_grpo_loss": (44, 70)}
"""Operations and kernels of a call, forward and backward, at most: of what the bench gives; of what a training step
does, with old and rollout log-probs, weights and masked rows. The head has four chunks."""


def loss_call(op: str, every: bool, launches: Counter[str]) -> int:
    """How much a call queues. every: all that a training step gives, and masked rows."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(32, 8, generator=g), torch.randn(16, 8, generator=g)
    mask = (torch.arange(32) % 5 != 0) | torch.tensor(not every)
    inputs = {"cu_seqlens": torch.arange(0, 33, 8, dtype=torch.int32), "loss_mask": mask}
    inputs["advantages"] = torch.randn(4, generator=g)
    if every:
        near = -torch.rand(2, 32, generator=g)
        inputs |= {"old_logprobs": near[0], "rollout_logprobs": near[1], "seq_weight": torch.ones(4)}
    config = settings("dapo")
    there: dict[str, Any] = {name: x.to("cuda") for name, x in inputs.items()}
    ids = torch.randint(16, (32,), generator=g).to("cuda")
    more: dict[str, Any] = {"denominator": 32.0} if every else {}
    if op == "grpo_loss":
        leaves = [(hidden @ weight.t()).to("cuda").requires_grad_()]
    else:
        leaves = [x.bfloat16().to("cuda").requires_grad_() for x in (hidden, weight)]
    launches.clear()
    if op == "grpo_loss":
        loss, _ = grpo_loss(leaves[0], ids, config=config, inplace=True, **there, **more)
    else:
        loss, _ = linear_grpo_loss(*leaves, ids, config=config, chunk=8, **there, **more)
    torch.autograd.grad(loss, leaves)
    return launches.total()


@inside
@numpy_warns
@pytest.mark.parametrize("op", BOUNDS)
def test_a_loss_call_queues_few_operations(op: str, cuda: Any) -> None:
    """Each costs the host time before the first large kernel may start, or the device behind the last one."""
    for every, bound in zip((False, True), BOUNDS[op], strict=True):
        total = loss_call(op, every, cuda.launches)
        assert total <= bound, (total, sorted(cuda.launches.items()))
        assert cuda.launches["token_loss_kernel"] == 1, cuda.launches


def turns(
    device: str, name: str, dtype: torch.dtype, waits: Counter[str]
) -> tuple[list[Generation], HfEngine]:
    """Sessions of two turns on fewer slots than there are requests, prompts in chunks, at three temperatures; between
    the turns a whole version, while the second one runs its patch."""
    from tests.fake_cuda import put

    model = model_of(name).to(dtype)
    engine = HfEngine(
        Policy(put(model) if device == "cuda" else model, tiny_tokenizer(), name), slots=3, prefill_chunk=4
    )
    waits.clear()  # those of loading and of judging the model
    state = {name: tensor.float() for name, tensor in state_of(model_of(name)).items()}
    prompts = [[5, 17, 3, 8, 90, 41, 2], [2, 60], [33], [12, 7, 9, 4, 1]]

    async def turn(rows: list[list[int]]) -> list[Generation]:
        asked = [
            engine.generate(row, SamplingParams(4, (1.0, 0.0, 0.7)[i % 3]), seed=i, session=f"s{i}")
            for i, row in enumerate(rows)
        ]
        return await asyncio.gather(*asked)

    async def use() -> list[Generation]:
        with versions(dtype) as sent:
            await engine.load(state, 0)
            first = await turn(prompts)
            held = sent.put(moved(state, 1, 0.9))
            await engine.load(sent.whole(), held)
            longer = [[*row, *out.token_ids.tolist(), 6, 11] for row, out in zip(prompts, first, strict=True)]
            second = asyncio.create_task(turn(longer))
            while not (engine._arrays.running & (engine._arrays.count > 1)).any():
                await asyncio.sleep(0)
            newest = sent.put(moved(moved(state, 1, 0.9), 2))
            await engine.load(sent.since(held), newest)
            return [*first, *await second]

    return asyncio.run(asyncio.wait_for(use(), 120)), engine


@inside
@numpy_warns
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("shift", torch.float32),
        ("llama-gqa", torch.float32),
        ("qwen3", torch.bfloat16),
        ("Qwen3Moe", torch.bfloat16),
    ],
)
def test_the_engine(name: str, dtype: torch.dtype, cuda: Any) -> None:
    """Prefill, decode on the slot cache, sampling and new weights in place: tokens, log-probs, versions and weights are
    those of the engine in main memory."""
    here, engine = turns("cpu", name, dtype, cuda.waits)
    there, device_engine = turns("cuda", name, dtype, cuda.waits)
    for a, b in zip(there, here, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish_reason == b.finish_reason
        assert a.versions.tolist() == b.versions.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert {v for out in here for v in out.versions.tolist()} == {0, 1, 2}
    weights, expected = (state_of(e.policy.model) for e in (device_engine, engine))
    for key, tensor in expected.items():
        assert weights[key].dtype == dtype and torch.equal(weights[key].cpu(), tensor), key


def replayed(
    device: str, folder: Path, waits: Counter[str]
) -> tuple[list[dict[str, float]], list[list[torch.Tensor]]]:
    """Metrics and weights of two steps as replay takes them: one from the start, one from the checkpoint of the
    first."""
    from tests.fake_cuda import unwrap

    config = load_config(
        RELAY,
        [
            f'agents.left.model="{folder / "policy"}"',
            f'agents.left.policy.device="{device}"',
            "agents.left.loss.kl_coef=0.1",
        ],
    )
    replayer = Replayer(config, Recording([]), lambda role: folder / device)
    root = folder / device / "record" / "checkpoints"
    step = StepBatch(0, [], [], [], [], [], [minibatch()], {})
    metrics, weights = [], []
    for number in range(2):
        known = dict(waits)
        learner = replayer._learner("left", latest_checkpoint(root) if number else None, False)
        assert learner.policy.device.type == device
        restored = {place: n for place, n in waits.items() if ".checkpoint." in place}
        waits.clear()  # those of loading and of judging the model
        waits.update({**known, **restored})
        metrics.append(replayer._train(learner, StepSettings(1e-3, 1, 1), [step]))
        weights.append([unwrap(p.detach()).clone() for p in learner.policy.model.parameters()])
        if number:
            break
        with pytest.MonkeyPatch.context() as patch:  # torch's writer wants a stream where there is a GPU
            patch.setattr(torch.cuda, "is_available", lambda: False)
            save_checkpoint(root, number, learner.policy, learner.optimizer, keep=1)
    return metrics, weights


@inside
@numpy_warns
def test_replay_takes_steps_again(cuda: Any, tmp_path: Path) -> None:
    """From the starting policy and from a checkpoint: the reference's and the policy's log-probs, loss, and a fused
    optimizer step on restored moments are the CPU's."""
    save_policy(Policy(model_of("shift"), tiny_tokenizer(), "start"), tmp_path / "policy")
    expected, exact = replayed("cpu", tmp_path, cuda.waits)
    found, weights = replayed("cuda", tmp_path, cuda.waits)
    for number in range(2):
        tolerance = (1e-4, 2e-3)[number]  # the first step's differences are in the second's weights
        assert found[number] == pytest.approx(expected[number], rel=tolerance, abs=tolerance)
        off = torch.cat(
            [(a - b).abs().flatten() for a, b in zip(weights[number], exact[number], strict=True)]
        )
        assert float(off.max()) <= 4.2e-3 and float((off > 1e-4).float().mean()) < 0.02
    assert found[0] != found[1]


@inside
def test_the_fake_device_refuses_and_counts(cuda: Any) -> None:
    """It would fail where a GPU does: tensors of two devices, numpy on the device; and each kind of wait is seen."""
    x = torch.ones(3, device="cuda")
    cuda.waits.clear()
    assert x.device.type == "cuda" and (x + 1).is_cuda and not x.cpu().is_cuda
    with pytest.raises(RuntimeError, match="expected all tensors to be on cuda:0"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert float((x * torch.tensor(2.0)).sum()) == 6.0 and bool(x.any()) and x.tolist() == [1.0] * 3
    x[x > 0].nonzero()
    torch.ones(2).to("cuda")
    kinds = Counter(place.rpartition(": ")[2] for place in cuda.waits.elements())
    assert kinds == {"to the host": 2, "a number": 2, "nonzero": 2, "to the device": 1}
    cuda.waits.clear()


@inside
def test_every_wait_is_on_the_page_with_its_reason() -> None:
    """The last test of the file: what all the others met, and what the page lists, are the same places."""
    table = waits_on_the_page()
    assert all(reason for _, reason in table.values())
    new, gone = sorted(seen.keys() - table.keys()), sorted(table.keys() - seen.keys())
    assert not new and not gone, (
        f"docs/kernels.md, Waiting for the device: not there {new}; met no more {gone}"
    )


def waits_of_a_step() -> dict[str, int]:
    """place: times in the step that is counted, of those that it has."""
    return {place: n for place, (n, _) in waits_on_the_page().items() if n}


def waits_on_the_page() -> dict[str, tuple[int, str]]:
    """place: (times in the step that is counted, reason), from docs/kernels.md."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (\d+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {f"mgrpo.{place}: {what.strip()}": (int(n), why.strip()) for place, what, n, why in rows}
