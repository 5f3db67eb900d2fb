"""Whole groups for slime from a queue of single trajectories, in the form of MrlX's. The queue is a list; MrlX's own
functions stand around it where MRLX_CHECKOUT names a checkout. No Ray, no GPU."""

from __future__ import annotations

import ast
import asyncio
import importlib
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from json import loads
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mgrpo.errors import DeadlineError
from mgrpo.integrations import slime, slime_groups
from tests import slime_double

K = 3
CHECKOUT = os.environ.get("MRLX_CHECKOUT", "")
QUEUE: list[dict[str, Any]] = []
PATCH = Path(__file__).parent.parent / "examples" / "embed_slime" / "mrlx.patch"


def source() -> dict[str, Any] | None:
    return QUEUE.pop(0) if QUEUE else None


async def judge(args: Any, sample: Any, **_: Any) -> float:
    """As MrlX's: of the messages and the planner's score."""
    return float(sample.metadata["reward"]) / 2 + len(sample.metadata["messages"])


@pytest.fixture(autouse=True)
def _slime(monkeypatch: pytest.MonkeyPatch) -> None:
    slime_double.install(monkeypatch)
    QUEUE.clear()
    slime_groups._GROUPS.clear()


def arguments(**given: Any) -> SimpleNamespace:
    settings = {"d_max": 2, "source": f"{__name__}:source", "poll": 0.0, "patience": 0.0} | given.pop(
        "mgrpo", {}
    )
    return SimpleNamespace(
        **({"rollout_batch_size": 2, "n_samples_per_prompt": K, "mgrpo": settings} | given)
    )


def push(query: int, rollout: int, count: int, i: int) -> dict[str, Any]:
    """The i-th of `count` trajectories of a rollout, with MrlX's fields and the two more."""
    n = 3 + i if count else 0
    return {
        "id": f"{query}-{rollout}-{i}", "tokens": list(range(n + 2 if count else 0)), "responseLength": n,
        "lossMask": [1] * n, "response": "text", "messages": ["m"] * i, "reward": 1.0 + rollout,
        "query": query, "rollout": [query * K + rollout, count],
    }  # fmt: skip


def pushes(queries: int, counts: list[int]) -> list[dict[str, Any]]:
    """Rollouts in a random order, each rollout's own in theirs, as planners end."""
    ends = [(q, k) for q in range(queries) for k in range(K)]
    random.Random(5).shuffle(ends)
    return [push(q, k, counts[k], i) for q, k in ends for i in range(max(counts[k], 1))]


def test_groups_are_claimed_whole_from_a_queue_that_mixes_them() -> None:
    """Two of three groups in the first batch, the third in the next, one rollout of each without an invocation; what
    slime then trains on holds every rollout."""
    QUEUE.extend(pushes(3, [2, 0, 4]))
    args = arguments()
    first = slime.rollout(args, 0, None).samples
    rest = slime.rollout(arguments(rollout_batch_size=1), 1, None).samples
    assert not QUEUE
    groups = first + rest
    queries = [{s.group_index for s in slime_double.flat(group)} for group in groups]
    assert all(len(query) == 1 for query in queries) and set.union(*queries) == {0, 1, 2}
    for group in groups:
        assert [len(samples) for samples in group] == [2, 1, 4]  # the one of d_k = 0 is masked
        assert [s.metadata["mgrpo"]["invocation"] for s in group[2]] == [0, 1, 2, 3]
        assert group[1][0].loss_mask == [0]
    indices = [s.index for s in slime_double.flat(groups)]
    assert len(set(indices)) == len(indices)
    data = slime.convert_samples(args, slime_double.flat(first))
    assert Counter(data["rollout_ids"].count(r) for r in set(data["rollout_ids"])) == {2: 4, 1: 2}


def test_rewards_and_filter_are_those_of_the_arguments() -> None:
    """The job's reward function judges each trajectory; a group in which all are equal is dropped and the next is
    waited for."""
    equal = [push(0, k, 1, 0) | {"messages": [], "reward": 1.0} for k in range(K)]
    QUEUE.extend(equal + [push(1, k, 1, 0) for k in range(K)])
    paths = {
        "custom_rm_path": f"{__name__}.judge",
        "dynamic_sampling_filter_path": "mgrpo.integrations.slime.reward_nonzero",
    }
    out = slime.rollout(arguments(rollout_batch_size=1, **paths), 0, None)
    assert [s.reward for s in slime_double.flat(out.samples)] == [0.5, 1.0, 1.5]
    assert out.metrics == {"mgrpo/groups_dropped": 1, "mgrpo/groups_waiting": 0}


def test_a_silent_source_is_given_up() -> None:
    QUEUE.extend(push(0, k, 1, 0) for k in range(K - 1))
    with pytest.raises(DeadlineError, match="no trajectory for 0 s; 0 of 2 groups are whole and 1 are not"):
        slime.rollout(arguments(), 0, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": None}, "no field 'query'"),
        ({"rollout": [0, 3]}, "query 0, rollout 0: d_k 3, and 1 before"),
        ({"rollout": [9, 1]}, "rollout 4 of a group of n_samples_per_prompt = 3"),
        ({"rollout": [8, 0]}, "rollout 8: d_k 0 and 5 tokens"),
        ({"rollout": [0, 1]}, "query 0, rollout 0: trajectory 2 of d_k = 1"),
    ],
)
def test_a_trajectory_that_fits_nowhere_is_refused(change: dict[str, Any], words: str) -> None:
    held = slime_groups.Groups()
    size = K if "group of" in words else K + 1
    for k in range(K):
        held.add(push(0, k, 1, 0), size)
        if size == K and k == K - 2:
            break
    if size == K:
        held.add(push(0, 7, 2, 0), size)
    row = {key: value for key, value in (push(0, 0, 1, 0) | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        held.add(row, size)


def test_the_data_sources_groups_are_taken_as_played() -> None:
    """And refused where they are not."""
    played = slime_double.Sample(group_index=0, index=0, tokens=[1, 2], response_length=1, reward=1.0)
    data = SimpleNamespace(get_samples=lambda n: [[played]] * n)
    args = arguments(mgrpo={"source": None})
    assert slime.rollout(args, 0, data).samples == [[played]] * 2
    scores = slime.rollout(args, 0, data, evaluation=True).data["mgrpo"]
    assert scores["rewards"] == [1.0, 1.0] and scores["samples"] == [played] * 2
    data.get_samples = lambda n: [[slime_double.Sample(index=4)]]
    with pytest.raises(ValueError, match=r"sample 4: 0 tokens, reward None: not played; set mgrpo.source"):
        slime.rollout(args, 0, data)


@pytest.mark.skipif(not CHECKOUT, reason="MRLX_CHECKOUT names no checkout of MrlX")
def test_mrlx_with_its_two_more_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MrlX's own push, queue server, fetch and reward, patched as the example says: only its HTTP is a call here, and
    its main agent's score is given."""
    shutil.copytree(Path(CHECKOUT) / "MrlX-DeepResearch", tmp_path / "MrlX-DeepResearch")
    subprocess.run(
        ["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", str(PATCH)], cwd="/", check=True
    )
    folder = tmp_path / "MrlX-DeepResearch"
    for path in (folder / "db", folder / "agent_co_train"):
        monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("DATABASE_SERVER_IP", "nowhere")
    monkeypatch.setenv("KEY_SUFFIX", "test")
    before = set(sys.modules)
    server = importlib.import_module("database_server")

    def post(url: str, json: dict[str, Any], **_: Any) -> Any:
        name, request = (
            ("task_commit", "TaskCommitRequest") if "Commit" in url else ("task_fetch", "TaskFetchRequest")
        )
        answer = getattr(server, name)(getattr(server, request)(**json))
        body = answer if isinstance(answer, dict) else loads(answer.body)
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: body)

    requests: Any = ModuleType("requests")
    requests.post, requests.exceptions = post, SimpleNamespace(RequestException=OSError)
    monkeypatch.setitem(sys.modules, "requests", requests)
    http: Any = ModuleType("slime.utils.http_utils")
    http.post = None
    monkeypatch.setitem(sys.modules, "slime.utils.http_utils", http)
    tools: Any = ModuleType("agent_utils.sub_agent_tools")
    reward: Any = ModuleType("main_agent_reward")
    for name in _names(folder / "agent_co_train/main_agent_multiturn.py", "agent_utils.sub_agent_tools"):
        setattr(tools, name, None)

    async def score(**_: Any) -> float:
        return 1.0

    reward.compute_score_em = score
    monkeypatch.setitem(sys.modules, "agent_utils.sub_agent_tools", tools)
    monkeypatch.setitem(sys.modules, "main_agent_reward", reward)
    planner = importlib.import_module("main_agent_multiturn")
    for k, count in enumerate([2, 0, 1]):
        call = {
            "response": "r",
            "response_length": 2,
            "tokens": [1, 2, 3],
            "loss_mask": [1, 1],
            "messages": [{}] * 2,
        }
        sample = slime_double.Sample(group_index=4, index=12 + k, reward=None)
        sample.label = None  # type: ignore[attr-defined]
        sample.metadata = {"question": "q", "sub_agent_traj": [call] * count}
        asyncio.run(planner.reward_func(None, sample))
    args = arguments(
        rollout_batch_size=1, custom_rm_path="sub_agent_multiturn.reward_func",
        mgrpo={"source": "agent_utils.database_utils:get_subagent_data"},
    )  # fmt: skip
    samples = slime_double.flat(slime.rollout(args, 0, None).samples)
    assert [(s.rollout_id, sum(s.loss_mask)) for s in samples] == [(12, 2), (12, 2), (13, 0), (14, 2)]
    assert [s.reward for s in samples if any(s.loss_mask)] == [1.0] * 3  # MrlX's: right format, right answer
    data = slime.convert_samples(args, samples)
    np.testing.assert_allclose(data["rollout_mask_sums"], [2 / 0.75, 2 / 0.75, 1.0, 2 / 1.5])
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def _names(path: Path, module: str) -> list[str]:
    """What a file imports from a module."""
    return [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    ]
