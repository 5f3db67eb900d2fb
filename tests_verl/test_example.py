"""What the page and the example tell a user to type, run with verl: outputs of an agent loop become advantages."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue
from tensordict.tensorclass import NonTensorStack
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1 import trainer_base
from verl_kit import compose_config, mgrpo_config

from mgrpo.integrations import verl as adapter

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "embed_verl"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding" / "verl.md").read_text(), re.DOTALL)


def example_config() -> Any:
    lines = (EXAMPLE / "overrides.txt").read_text().split()
    return compose_config(*(line for line in lines if "rollout.n=" not in line))


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embed_verl_agent_loop", EXAMPLE / "agent_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Words:
    """A tokenizer of letters, and a server that says what it was given to say."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any) -> Any:
        tokens = self.encode(self.texts.pop(0))
        return SimpleNamespace(token_ids=tokens, log_probs=[-0.5] * len(tokens))


def play(team: type, *texts: str, truth: str = "42") -> list[AgentLoopOutput]:
    """One rollout of the example's loop."""
    loop = object.__new__(team)
    loop.tokenizer = loop.server_manager = Words(*texts)

    async def ct_build_initial_tokens(messages: list[dict[str, str]]) -> list[int]:
        return loop.tokenizer.encode(messages[0]["content"])

    loop.ct_build_initial_tokens = ct_build_initial_tokens
    task = {"raw_prompt": [{"role": "user", "content": "Why?"}], "reward_model": {"ground_truth": truth}}
    return asyncio.run(loop.run({}, **task))


def advantages_of(
    sessions: list[list[AgentLoopOutput]], config: Any, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """[(tokens,)] of each output, session by session, as verl's v1 trainer computes them."""
    keys, fields = [], []
    for session, outputs in enumerate(sessions):
        for output in outputs[:-1]:
            output.reward_score = outputs[-1].reward_score  # as verl's postprocessing does
        keys += [f"u_{session}_{at}" for at in range(len(outputs))]
        fields += [output.as_dict() for output in outputs]
    extra = {"extra_fields": NonTensorStack(*[field["extra_fields"] for field in fields])}
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda keys, partition_id, select_fields: extra)
    pad = torch.nn.utils.rnn.pad_sequence
    tensors = {
        "token_level_rewards": pad([field["rm_scores"] for field in fields], batch_first=True),
        "response_mask": pad([field["response_mask"] for field in fields], batch_first=True),
    }
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(["u"] * len(keys), dtype=object)})
    done = trainer_base.compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm
    )
    return [
        row[: len(field["response_mask"])]
        for row, field in zip(done.batch["advantages"], fields, strict=True)
    ]


def test_example_carries_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts, one solved: planners are compared with planners, searchers with searchers by their own rewards."""
    team = load_example().Team
    config = example_config()
    adapter.check(config)
    won = play(team, "a?\nb?\nc?", "one", "two", " ", "so 42")
    lost = play(team, "a?", "three", "so 41")
    assert [len(won), len(lost)] == [4, 2]
    assert [output.extra_fields["mgrpo"]["role"] for output in won] == ["searcher"] * 3 + ["main"]
    assert won[-1].response_mask == [1] * 8 + [0] * won[-1].response_mask.count(0) + [1] * 5
    found = advantages_of([won, lost], config, monkeypatch)
    searchers, planner = found[:3], found[3]
    assert planner.max() > 0 and found[5].max() == 0 and found[5].min() < 0
    assert (
        (planner != 0) == torch.tensor(won[-1].response_mask).bool()
    ).all()  # no advantage in what it was told
    assert sum(bool(row.any()) for row in searchers) == 2  # d_max of the three, drawn
    assert found[4].min() < 0


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three blocks, with a rollout to play, rows to name and a config to check."""
    loop, names, check = BLOCKS

    async def played(
        loop: Any, sampling_params: Any, kwargs: Any
    ) -> list[tuple[AgentLoopOutput, str, int, float]]:
        made = load_example().output_of
        first, last = (made([1], [2, 3], [1, 1], [-1.0, -1.0]) for _ in range(2))
        last.reward_score = kwargs["reward"]
        return [(first, "sub", 0, kwargs["reward"] / 2), (last, "main", 0, kwargs["reward"])]

    space: dict[str, Any] = {"play": played, "np": np, "config": mgrpo_config()}
    exec(loop, space)
    sessions = [asyncio.run(object.__new__(space["Team"]).run({}, reward=reward)) for reward in (0.0, 1.0)]
    low_sub, low, high_sub, high = advantages_of(sessions, mgrpo_config(), monkeypatch)
    assert (low < 0).all() and (high > 0).all() and torch.equal(low, -high)
    assert (low_sub < 0).all() and (high_sub > 0).all()

    space |= {"rows": [("q", "main", 0, 0), ("q", "sub", 0, 1)], "data": SimpleNamespace(non_tensor_batch={})}
    exec(names, space)
    assert list(space["data"].non_tensor_batch["uid"]) == ["mgrpo/q/main/0/0", "mgrpo/q/sub/0/1"]
    exec(check, space)
