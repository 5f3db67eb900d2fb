"""What of mgrpo works with which model: the rows and columns of the table in docs/models.md (model_table.py).

A row is a tiny model with random weights, as transformers' own configuration class makes it, with the settings in which
its architecture differs from others (windows shorter than the rows, several experts a token, a tied head) and a head
that is longer than the vocabulary. A column is a check that raises AssertionError where a number is wrong. What it
returns is the cell: "yes", or what mgrpo refuses, in mgrpo's words.

One process takes the steps; beside it two ranks, started once for all rows, take the same (tests/model_ranks.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config import load_config, view_of
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy, state_of
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import logprobs_of
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.families import CONTEXT, family
from tests.fsdp_ranks import CUTS, cut
from tests.models import VOCAB, tiny_tokenizer
from tests.rows import rows_of
from tests.runs import RELAY
from tests.version_kit import versions

STEPS = 2
WINDOW = 6  # tokens; rows have up to 12
SDPA = 'attention="sdpa"'  # as several ranks compute it
HALF = 'dtype="bfloat16"'
State = dict[str, Tensor]

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5": ("Qwen2", {}),
    "Qwen3": ("Qwen3", _TIED),
    "Qwen3-MoE": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True}),
    "Qwen3-Next": ("Qwen3Next", _EXPERTS),
    "Qwen3.5": ("Qwen3_5", {}),
    "Llama 3": ("Llama", {}),
    "SmolLM2": ("Llama", _TIED),
    "SmolLM3": ("SmolLM3", {}),
    "Gemma 2": ("Gemma2", {}),
    "Gemma 3": (
        "Gemma3Text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Gemma 3, with images": (
        "Gemma3",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Ministral 3": ("Ministral3", {}),
    "MiniMax-M2": ("MiniMaxM2", _LOCAL),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Mixtral": ("Mixtral", _LOCAL),
    "OLMo 2": ("Olmo2", {"eos_token_id": 1}),
    "OLMo 3": ("Olmo3", {"sliding_window": WINDOW, "eos_token_id": 1}),
    "OLMoE": ("Olmoe", _EXPERTS),
    "DeepSeek-V3": ("DeepseekV3", _GROUPED),
    "gpt-oss": ("GptOss", {**_LOCAL, "sliding_window": WINDOW}),
    "LFM2": ("Lfm2", {}),
    "LFM2-MoE": ("Lfm2Moe", _EXPERTS),
    "Phi-3": ("Phi3", {"eos_token_id": 1}),
    "GLM-4": ("Glm4", {}),
    "GLM-4.5": ("Glm4Moe", _GROUPED),
    "Granite": ("Granite", {}),
}


# -- what both processes do --------------------------------------------------------------------------------------------


def make(title: str, folder: Path) -> str:
    """The row's checkpoint in `folder`, as transformers writes it; the name of its class."""
    name, changes = ROWS[title]
    model = family(name, vocab_size=VOCAB + 3, initializer_range=0.2, **changes)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and norms are made as zeros and ones, which hide a mistake
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=noise))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return type(model).__name__


def trainer_of(folder: Path, ranks: Ranks, *sets: str) -> TorchTrainer:
    """A trainer with the settings agents.main.policy.*, with its checkpoints in `folder`."""
    ours = [f"agents.main.policy.{part}" for part in sets]
    config = load_config(RELAY, [*ours, f"agents.main.policy.ranks={ranks.size}"])
    return TorchTrainer(view_of(config, "main"), folder, ranks)


def batch_of(step: int) -> MiniBatch:
    """Two micro-batches: one for each of two ranks. Another cut adds in another order, and Adam makes a whole step of
    what should be zero, such as the gradient of a bias of all keys."""
    return cut(rows_of(step, near=True), CUTS[1], 2)


def weights(trainer: TorchTrainer) -> State:
    return {name: tensor.clone() for name, tensor in trainer.weights()}


def steps(trainer: TorchTrainer, number: int = STEPS) -> list[dict[str, float]]:
    """Metrics of the first steps, in which ratios are those of this policy: all rows have a gradient."""
    found = [trainer.train([batch_of(step)], recompute_old=True) for step in range(number)]
    for step in found:
        assert step["policy/grad_norm"] > 0 and all(map(_finite, step.values())), step
    return found


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same names with the same bits."""
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


def furthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def reason(error: Exception, folder: Path) -> str:
    """What a refusal says, without the name of the policy."""
    words = str(error).replace(f"policy folder {folder}", "").replace(str(folder), "").lstrip(": ")
    return " ".join(words.split())


# -- one process -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One model on its way through the columns."""

    title: str
    folder: Path
    kind: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    before: State = field(default_factory=dict)
    after: State = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    half: State = field(default_factory=dict)
    half_metrics: list[dict[str, float]] = field(default_factory=list)
    error: Exception | None = None

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """The first error inside is the row's: other rows go on."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def trainer(self, name: str, *sets: str) -> TorchTrainer:
        return trainer_of(self.folder / name, Ranks(), *sets)

    def policy(self, **settings: Any) -> Policy:
        return load_policy(self.start, PolicyConfig(**settings))


def loads(row: Row) -> str:
    """The trainer's weights are those of the files, with their names and to the bit: all of them, or those of the
    language model alone."""
    trainer = row.trainer("one", SDPA)
    trainer.load(row.start)
    row.before = weights(trainer)
    disk = safetensors.torch.load_file(row.start / "model.safetensors")
    assert same(row.before, {name: disk[name] for name in row.before})
    policy = row.policy()
    row.kind = type(policy.model).__name__
    trained = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    row.trained = {n for n, t in state_of(policy.model).items() if t.untyped_storage().data_ptr() in trained}
    text = architecture.text_of(policy.model.config.to_dict())
    assert len(row.trained) > 6 * text["num_hidden_layers"] > 0
    if len(row.before) < len(disk):
        return "its language model"
    return "yes"


def trains(row: Row) -> str:
    """Two steps move every weight that trains and no other; saved, exported and read again bit for bit."""
    trainer = row.trainer("one", SDPA)
    trainer.load(row.start)
    row.metrics = steps(trainer)
    row.after = weights(trainer)
    assert {n for n, t in row.after.items() if not torch.equal(t, row.before[n])} == row.trained
    trainer.save(STEPS)
    trainer.saved(wait=True)
    trainer.export(row.folder / "final")
    return "yes"


def saves(row: Row) -> str:
    """The exported folder has the names, shapes and dtypes of the one that was loaded, and holds the trained weights to
    the bit, as does what loads from it and what goes on from the checkpoint."""
    disk = safetensors.torch.load_file(row.folder / "final" / "model.safetensors")
    assert same(disk, row.after)
    assert {n: (t.shape, t.dtype) for n, t in disk.items()} == {
        n: (t.shape, t.dtype) for n, t in row.before.items()
    }
    assert same(state_of(load_policy(row.folder / "final").model), row.after)
    again = row.trainer("one", SDPA)
    checkpoint = again.load(row.start)
    assert checkpoint is not None and checkpoint.step == STEPS
    assert same(weights(again), row.after)
    return "yes"


def halves(row: Row) -> str:
    """A step in bfloat16: what trains stays float32 and finite, and hidden states are those of float32 to what bfloat16
    can say (the middle one: a token may go to another expert)."""
    states = []
    for dtype in ("float32", "bfloat16"):
        rows = rows_of(0)
        with torch.no_grad():
            policy = row.policy(dtype=dtype, attention="sdpa")
            states.append(policy.hidden_before(rows.ids, rows.lengths, rows.loss_mask[:, 1:]).float())
    off = (states[1] - states[0]).norm(dim=1) / states[0].norm(dim=1)
    assert 0 < float(off.median()) < 0.05, off
    trainer = row.trainer("half", SDPA, HALF)
    trainer.load(row.start)
    row.half_metrics = steps(trainer, 1)
    row.half = weights(trainer)
    assert all(t.dtype == torch.float32 for n, t in row.half.items() if n in row.trained)
    assert all(t.isfinite().all() for t in row.half.values())
    assert furthest(row.half, row.before) > 1e-3
    return "yes"


def attends(row: Row) -> str:
    """The ways to compute attention that a CPU has; all that are there agree."""
    found, expected = [], None
    for kind in ("rows", "sdpa", "varlen"):
        try:
            policy = row.policy(attention=kind)
        except ConfigError as error:
            row.refusals[f'`attention = "{kind}"`'] = reason(error, row.start)
            continue
        assert policy.attention == kind
        rows = rows_of(0)
        with torch.no_grad():
            states = policy.hidden_before(rows.ids, rows.lengths, rows.loss_mask[:, 1:])
        expected = states if expected is None else expected
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        found.append(kind)
    return ", ".join(found)


def adapts(row: Row) -> str:
    """A step with adapters on the default targets; where these are refused, on all that the error advises."""
    try:
        _adapt(row, "lora={rank=2}", list(LoraConfig().targets))
    except ConfigError as error:
        words = str(error)
        assert "policy.lora.targets has" in words
        named = re.findall(r"\[(.*?)\]", words) or re.findall(r"linear layers of \w+ are (.*)", words)
        targets = [name.strip(' "') for names in named for name in names.split(",")]
        assert targets, words
        _adapt(row, f"lora={{rank=2,targets={targets}}}".replace("'", '"'), targets)
        return " ".join(f"`{name}`" for name in targets)
    return "default targets"


def _adapt(row: Row, setting: str, targets: Sequence[str]) -> None:
    """What is published keeps its names and its shapes, and changes where there is a target and nowhere else."""
    trainer = row.trainer("adapters", setting)
    trainer.load(row.start)
    before = weights(trainer)
    assert furthest(before, row.before) == 0  # B starts at 0
    steps(trainer, 1)
    after = weights(trainer)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    experts = any(target.startswith("experts.") for target in targets)
    ours = [n for n in moved if n.split(".")[-2] in targets or (experts and ".experts." in n)]
    assert moved == set(ours)
    assert {t for t in targets if "." not in t} <= {n.split(".")[-2] for n in ours}
    assert not experts or any(".experts." in n for n in ours)


def publishes(row: Row) -> str:
    """An in-process engine takes the first weights whole and the last as a patch, holds them to the bit, and samples
    with the trainer's log-probs to 1e-4."""
    policy = row.policy()
    length = min(CONTEXT, *architecture.windows(policy.model.config.to_dict()).values(), CONTEXT)
    try:
        engine = HfEngine(policy, slots=4, max_length=length, version=0)
    except ConfigError as error:
        row.refusals["in-process engine"] = reason(error, row.start)
        return "refused"
    with versions() as sent:
        sent.put(row.before)
        asyncio.run(engine.load(sent.whole(), 1))
        sent.put(row.after)
        asyncio.run(engine.load(sent.since(1), 2))
    assert same(state_of(engine.policy.model), row.after)
    sampled = asyncio.run(_sampled(engine, length))
    _compare(sampled, load_policy(row.folder / "final"))
    return "yes" if length == CONTEXT else "up to its window"


Sampled = list[tuple[list[int], Generation]]


async def _sampled(engine: HfEngine, length: int) -> Sampled:
    """Histories as long as allowed, of prompts of several lengths at once."""
    prompts = [list(range(n, 2 * n)) for n in (1, length // 3, length // 2)]
    try:
        found = await asyncio.gather(
            *(engine.generate(p, SamplingParams(min(8, length - len(p)), 1.0), seed=len(p)) for p in prompts)
        )
    finally:
        await engine.close()
    return list(zip(prompts, found, strict=True))


def _compare(sampled: Sampled, policy: Policy) -> None:
    for prompt, answer in sampled:
        ids = torch.tensor([[*prompt, *answer.token_ids.tolist()]])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        row = MicroBatch(
            ids, mask, torch.zeros(ids.shape), torch.tensor([ids.shape[1]]), torch.ones(1), torch.ones(1)
        )
        expected = logprobs_of(policy, row, 1.0)
        torch.testing.assert_close(torch.from_numpy(answer.logprobs), expected, rtol=0, atol=1e-4)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "loads": loads,
    "two steps": trains,
    "saved": saves,
    "bfloat16": halves,
    "attention": attends,
    "adapters": adapts,
    "in-process engine": publishes,
}


def run(row: Row) -> None:
    """Fill the row's cells. A model that is not loaded has no others."""
    for column, check in COLUMNS.items():
        try:
            row.cells[column] = check(row)
        except ConfigError as error:
            if column != "loads":
                raise
            row.cells[column] = "refused"
            row.refusals["loading"] = reason(error, row.start)
            return


def _close(ones: Sequence[dict[str, float]], twos: Sequence[dict[str, float]], bound: float) -> None:
    for one, two in zip(ones, twos, strict=True):
        assert one.keys() == two.keys()
        assert all(abs(two[n] - v) <= bound * (abs(v) + 0.1) for n, v in one.items()), (one, two)


def compare_ranks(row: Row, found: Mapping[str, Any]) -> str:
    """Two ranks, whose layers run again in the backward pass, take the steps of one: the same metrics and weights, from
    the same bits; what they saved goes on in one process. In bfloat16 their step is within 3 % of one process's: a tied
    head's gradient is rounded on its way. Refused is what one process refuses, in the same words."""
    if row.cells["loads"] == "refused":
        assert reason(ConfigError(found["refused"]), row.start) == row.refusals["loading"]
        return ""
    assert same(found["before"], row.before)
    assert furthest(found["after"], row.after) < 1e-5
    assert found["units"], f"{row.kind}: decoder layers are not gathered one by one"
    _close(row.metrics, found["metrics"], 1e-4)
    off = sum(float((t - found["half"][n]).float().square().sum()) for n, t in row.half.items())
    step = sum(float((t - row.before[n]).float().square().sum()) for n, t in row.half.items())
    assert off < 0.03**2 * step, (off, step)
    _close(row.half_metrics, found["half metrics"], 1e-3)
    trainer = row.trainer("two")
    assert trainer.load(row.start) is not None
    assert same(weights(trainer), found["after"])
    assert same(
        safetensors.torch.load_file(row.folder / "two" / "final" / "model.safetensors"), found["after"]
    )
    return "yes"
